"""Reading a rewritten record back: its alternatives with style and probability. The reverse of `caption`."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from capmerge.captions.draw import Drawn
from capmerge.captions.fields import MARK, STYLES, TAG_SPANS, WEIGHTS
from capmerge.captions.wildcard import (
    TooManyOutcomesError,
    escape,
    has_brace,
    line_outcomes,
    parse_line,
)

Share = tuple[int, int]
"""A probability in lowest terms: numerator, denominator."""


class BrokenRecordError(ValueError):
    """A record whose fields are not what a rewrite writes; the message says what was found and what was expected."""


@dataclass(frozen=True, slots=True)
class Written:
    """One alternative of a rewritten record."""

    line: str
    """As written: braces doubled."""
    style: str
    """`t`, `c` or `b`."""
    places: tuple[int, ...]
    """Where it stands among the letters of the mark: more than one place when it is repeated."""
    share: Fraction
    """Of the probability; the shares of a record sum to 1."""


def written_alternatives(record: dict[str, Any]) -> list[Written]:
    """The distinct alternatives of a rewritten `record`, in their order; empty for an empty caption.

    Raises `BrokenRecordError` when caption, mark and weights do not belong together.
    """
    caption, letters, weights = record.get("caption"), record.get(MARK), record.get(WEIGHTS)
    if not isinstance(caption, str) or not isinstance(letters, str):
        raise BrokenRecordError(
            f'expected strings "caption" and "{MARK}", as a rewrite writes them.'
        )
    if not caption and not letters:
        return []
    lines = caption.split("\n")
    if len(lines) == 1 < len(letters):
        parsed = parse_line(caption)
        if len(parsed.groups) == 1 and not any(parsed.literals):
            lines = [escape(parsed.option(0, number)) for number in range(len(parsed.groups[0]))]
    if len(lines) != len(letters):
        raise BrokenRecordError(
            f'found {len(lines)} lines and {len(letters)} letters in "{MARK}", expected one letter a line.'
        )
    if unknown := set(letters) - STYLES.keys():
        raise BrokenRecordError(
            f'found the letter {min(unknown)!r} in "{MARK}", expected t, c or b.'
        )
    if weights is None:
        weights = [1] * len(lines)
    elif (
        not isinstance(weights, list)
        or len(weights) != len(lines)
        or not all(type(w) is int and w >= 0 for w in weights)
        or not any(weights)
    ):
        raise BrokenRecordError(f'expected "{WEIGHTS}" to be one whole number a line, not all 0.')
    places: dict[str, list[int]] = {}
    for place, line in enumerate(lines):
        places.setdefault(line, []).append(place)
    total = sum(weights)
    return [
        Written(
            line,
            letters[found[0]],
            tuple(found),
            Fraction(sum(weights[place] for place in found), total),
        )
        for line, found in places.items()
    ]


def place_drawn(letters: str, drawn: Drawn) -> int:
    """Where what was drawn stands among the `letters` of the mark: its line, or its option of an in-line wildcard of several letters."""
    in_line = len(letters) > 1 and drawn.lines == 1
    return drawn.options[0] if in_line else drawn.line


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
        raise BrokenRecordError(
            f'expected "{TAG_SPANS}" to be {expected} pairs [start, end), one for each b of "{MARK}".'
        )
    return [
        _trained(
            alternative,
            spans[letters[: alternative.places[0]].count("b")]
            if alternative.style == "b"
            else None,
        )
        for alternative in found
        if alternative.share
    ]


def fields_of(alternatives: Sequence[Trained]) -> tuple[str, list[tuple[str, ...]]]:
    """A record's tags and the texts of each of its caption lines, as its lines hold them; "" and none when it has none.

    Each from the lines of its own style, `t` or `c`, and from those of both only where there are
    none: else a text would count once for each template that holds it. Of several lines of tags it
    is the first. A template's fixed text, a prefix too, is told from tags by the span in a line of
    both, and otherwise belongs to the field that it stands beside.
    """
    tags = [
        alternative.tags
        for style in "tb"
        for alternative in alternatives
        if alternative.style == style
    ]
    style = "c" if any(alternative.style == "c" for alternative in alternatives) else "b"
    captions = dict.fromkeys(
        alternative.captions for alternative in alternatives if alternative.style == style
    )
    return tags[0] if tags else "", [texts for texts in captions if any(texts)]


def _trained(written: Written, span: list[int] | None) -> Trained:
    line, share = written.line, (written.share.numerator, written.share.denominator)
    texts, listed = _outcomes(line)
    if span is None:
        is_tags = written.style == "t"
        return Trained(
            texts,
            written.style,
            share,
            next(iter(texts)) if is_tags else "",
            () if is_tags else tuple(texts),
            listed,
        )
    start, end = span
    around = ", ".join(filter(None, (line[:start].strip(", "), line[end:].strip(", "))))
    tags, captions = (tuple(_outcomes(part)[0]) for part in (line[start:end], around))
    return Trained(texts, written.style, share, tags[0], captions, listed)


def _is_span(span: Any) -> bool:
    return (
        isinstance(span, list)
        and len(span) == 2
        and all(type(end) is int and end >= 0 for end in span)
    )


def _outcomes(line: str) -> tuple[dict[str, Fraction], bool]:
    """Every text of a line with its probability, and True; where they are too many to list the two extremes, and False."""
    if not has_brace(line):
        return {line: Fraction(1)}, True
    try:
        return line_outcomes(line), True
    except TooManyOutcomesError:
        parsed = parse_line(line)
        drawn = (
            [options.index(pick(options, key=len)) for options in parsed.groups]
            for pick in (max, min)
        )
        return dict.fromkeys(map(parsed.text, drawn), Fraction(1, 2)), False
