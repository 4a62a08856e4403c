"""The alternatives of a rewritten record, with style and probability, as `written` reads them."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

from capmerge.captions.wildcard import (
    TooManyOutcomesError,
    has_brace,
    line_outcomes,
    parse_line,
)
from capmerge.captions.written import Span, WrittenRecord, read_written

Share = tuple[int, int]
"""A probability in lowest terms: numerator, denominator."""


@dataclass(frozen=True, slots=True)
class WrittenAlternative:
    """One distinct line of a rewritten record."""

    line: str
    """The line as written, with braces doubled."""
    style: str
    """The letter of the line in the mark: `t`, `c` or `b`."""
    places: tuple[int, ...]
    """Its positions among the letters of the mark: more than one when the line is repeated."""
    share: Fraction
    """Its share of the probability; the shares of a record sum to 1."""
    tag_span: Span | None
    """The [start, end) of the tags in `line`, for style `b`; else None."""


class TrainedAlternative(NamedTuple):
    """The texts that are trained for one `WrittenAlternative`."""

    texts: dict[str, Fraction]
    """Texts with their probabilities, nothing doubled: one, or all that in-line wildcards give."""
    style: str
    """The letter of the line in the mark: `t`, `c` or `b`."""
    share: Share
    """Its share of the record's probability."""
    tags: str
    """The part that is tags; "" for style `c`."""
    captions: tuple[str, ...]
    """The caption part, stripped of the separators next to the tags; none for style `t`.

    One text, or every text that its in-line wildcards give.
    """
    listed: bool = True
    """True when `texts` are all outcomes.

    False when there are too many to list; `texts` are then the longest and the shortest.
    """


def written_alternatives(record: dict[str, Any]) -> list[WrittenAlternative]:
    """Return the distinct lines of a rewritten `record`, in order; none for an empty caption.

    Raises `BrokenRecordError` as `read_written` does.
    """
    written = read_written(record)
    places: dict[str, list[int]] = {}
    for place, line in enumerate(written.lines):
        places.setdefault(line, []).append(place)
    weights = _weights_of_lines(written)
    total = sum(weights)
    return [
        WrittenAlternative(
            line,
            written.letters[found[0]],
            tuple(found),
            Fraction(sum(weights[place] for place in found), total),
            written.span_at(found[0]),
        )
        for line, found in places.items()
    ]


def trained_alternatives(record: dict[str, Any]) -> list[TrainedAlternative]:
    """Return the distinct alternatives of a rewritten record that are trained, in line order.

    An alternative with weight 0 is left out.

    Raises `BrokenRecordError` as `read_written` does.
    """
    return [
        _trained(alternative) for alternative in written_alternatives(record) if alternative.share
    ]


def _weights_of_lines(written: WrittenRecord) -> list[int]:
    """Return one weight per line; each option of an in-line wildcard counts once."""
    if written.weights is None or written.is_inline:
        return [1] * len(written.lines)
    return written.weights


def fields_of(alternatives: Sequence[TrainedAlternative]) -> tuple[str, list[tuple[str, ...]]]:
    """Return a record's tags, and the texts of each of its caption lines.

    Tags are "" and the list is empty when the record has none. Each field is read from the lines of
    its own style, `t` or `c`, and from lines of style `b` only when there are none of its own:
    otherwise a text would count once for each template that uses it. When several lines hold tags,
    the first counts. In a line of style `b` the span separates the tags from a template's fixed
    text, a prefix included; in other lines the fixed text counts as part of the field beside it.
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


def _trained(written: WrittenAlternative) -> TrainedAlternative:
    line, share = written.line, (written.share.numerator, written.share.denominator)
    texts, listed = _outcomes(line)
    if written.tag_span is None:
        is_tags = written.style == "t"
        tags, captions = (next(iter(texts)), ()) if is_tags else ("", tuple(texts))
        return TrainedAlternative(texts, written.style, share, tags, captions, listed)
    start, end = written.tag_span
    around = ", ".join(filter(None, (line[:start].strip(", "), line[end:].strip(", "))))
    tags = next(iter(_outcomes(line[start:end])[0]))
    captions = tuple(_outcomes(around)[0])
    return TrainedAlternative(texts, written.style, share, tags, captions, listed)


def _outcomes(line: str) -> tuple[dict[str, Fraction], bool]:
    """Return every text of a line with its probability, and True.

    Where they are too many to list: the longest and the shortest, 1/2 each, and False. Both may
    be the same text, where all options of a group are equally long.
    """
    if not has_brace(line):
        return {line: Fraction(1)}, True
    try:
        return line_outcomes(line), True
    except TooManyOutcomesError:
        parsed = parse_line(line)
        texts: dict[str, Fraction] = {}
        for pick in (max, min):
            drawn = [options.index(pick(options, key=len)) for options in parsed.groups]
            text = parsed.text(drawn)
            texts[text] = texts.get(text, Fraction(0)) + Fraction(1, 2)
        return texts, False
