"""A rewritten record as it is trained: its distinct alternatives with their texts, styles and shares. Pure.

What `rewritten` reads back, with in-line wildcards drawn out and the tags told from the caption. An original record is
merged first, so that what the options would give and what a file holds are one and the same.
"""

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
    caption: str
    """The part that is no tags, its commas and spaces towards them taken off; "" for style `t`."""
    listed: bool = True
    """Whether `texts` are all outcomes: past `wildcard.MOST_OUTCOMES` they are the longest and the shortest."""


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


def _trained(written: Written, span: list[int] | None) -> Trained:
    line, share = written.line, (written.share.numerator, written.share.denominator)
    texts, listed = _outcomes(line)
    if span is None:
        text = next(iter(texts))
        return Trained(texts, written.style, share, text if written.style == "t" else "", "" if written.style == "t" else text, listed)
    start, end = span
    around = (line[:start].strip(", "), line[end:].strip(", "))
    tags, caption = (next(iter(_outcomes(part)[0])) for part in (line[start:end], max(around, key=len)))
    return Trained(texts, written.style, share, tags, caption, listed)


def _is_span(span: Any) -> bool:
    return isinstance(span, list) and len(span) == 2 and all(type(end) is int and end >= 0 for end in span)


def _outcomes(line: str) -> tuple[dict[str, Fraction], bool]:
    """Every text of a line with its probability, and True; past `MOST_OUTCOMES` the two extremes, and False."""
    if not has_brace(line):
        return {line: Fraction(1)}, True
    try:
        return line_outcomes(line), True
    except TooManyOutcomesError:
        parsed = parse_line(line)
        drawn = ([options.index(pick(options, key=len)) for options in parsed.groups] for pick in (max, min))
        return dict.fromkeys(map(parsed.text, drawn), Fraction(1, 2)), False
