"""A rewritten record as it is trained: its distinct alternatives with their texts, styles and shares. Pure.

What `rewritten` reads back, with in-line wildcards drawn out and the tags told from the caption. An original record is
merged first, so that what the options would give and what a file holds are one and the same.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from capmerge.marks import MARK, TAG_SPANS
from capmerge.rewritten import BrokenRecordError, Written, written_alternatives
from capmerge.stats import Share
from capmerge.wildcard import TooManyOutcomesError, has_brace, line_outcomes, parse_line


class Trained(NamedTuple):
    """One distinct alternative of a record."""

    texts: dict[str, Fraction]
    """What is trained, nothing doubled, with its probability: one text, or all that in-line wildcards give."""
    style: str
    """`t`, `c` or `b`."""
    share: Share
    """Of the record's probability."""
    tags: str
    """The part that is tags; "" for style `c`."""
    captions: tuple[str, ...]
    """All that is no tags, without the commas and spaces towards them: a text, or all of its in-line wildcards; none for style `t`."""
    listed: bool = True
    """Whether `texts` are all outcomes: where those are too many to list they are the longest and the shortest."""


def trained_alternatives(record: dict[str, Any]) -> list[Trained]:
    """The distinct alternatives of a rewritten record, in the order of its lines.

    Raises `BrokenRecordError` when its fields do not belong together.
    """
    found = written_alternatives(record)
    if not any(alternative.style == "b" for alternative in found):
        return [_trained(alternative, None) for alternative in found if alternative.share]
    letters, spans = record[MARK], record.get(TAG_SPANS)
    expected = letters.count("b")
    if not isinstance(spans, list) or len(spans) != expected or not all(map(_is_span, spans)):
        raise BrokenRecordError(f'expected "{TAG_SPANS}" to be {expected} pairs [start, end), one for each b of "{MARK}".')
    return [
        _trained(alternative, spans[letters[: alternative.places[0]].count("b")] if alternative.style == "b" else None)
        for alternative in found
        if alternative.share
    ]


def fields_of(alternatives: Sequence[Trained]) -> tuple[str, list[tuple[str, ...]]]:
    """A record's tags and the texts of each of its caption lines, as its lines hold them; "" and none when it has none.

    Each from the lines of its own style, `t` or `c`, and from those of both only where there are none: else a text would count
    once for each template that holds it. Of several lines of tags it is the first. A template's fixed text, a prefix too, is
    told from tags by the span in a line of both, and otherwise belongs to the field that it stands beside.
    """
    tags = [alternative.tags for style in "tb" for alternative in alternatives if alternative.style == style]
    style = "c" if any(alternative.style == "c" for alternative in alternatives) else "b"
    captions = dict.fromkeys(alternative.captions for alternative in alternatives if alternative.style == style)
    return tags[0] if tags else "", [texts for texts in captions if any(texts)]


def _trained(written: Written, span: list[int] | None) -> Trained:
    line, share = written.line, (written.share.numerator, written.share.denominator)
    texts, listed = _outcomes(line)
    if span is None:
        is_tags = written.style == "t"
        return Trained(texts, written.style, share, next(iter(texts)) if is_tags else "", () if is_tags else tuple(texts), listed)
    start, end = span
    around = ", ".join(filter(None, (line[:start].strip(", "), line[end:].strip(", "))))
    tags, captions = (tuple(_outcomes(part)[0]) for part in (line[start:end], around))
    return Trained(texts, written.style, share, tags[0], captions, listed)


def _is_span(span: Any) -> bool:
    return isinstance(span, list) and len(span) == 2 and all(type(end) is int and end >= 0 for end in span)


def _outcomes(line: str) -> tuple[dict[str, Fraction], bool]:
    """Every text of a line with its probability, and True; where they are too many to list the two extremes, and False."""
    if not has_brace(line):
        return {line: Fraction(1)}, True
    try:
        return line_outcomes(line), True
    except TooManyOutcomesError:
        parsed = parse_line(line)
        drawn = ([options.index(pick(options, key=len)) for options in parsed.groups] for pick in (max, min))
        return dict.fromkeys(map(parsed.text, drawn), Fraction(1, 2)), False
