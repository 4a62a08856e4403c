"""A rewritten record as it is trained: its distinct alternatives with their texts, styles and shares. Pure.

The only reader of what `caption.Merger` wrote, by the field `capmerge`; an original record is merged first, so that what
the options would give and what a file holds are one and the same.
"""

from fractions import Fraction
from math import gcd
from typing import Any, NamedTuple

from capmerge.caption import Record, UnmergeableError, json_name
from capmerge.marks import MARK, TAG_SPANS, WEIGHTS
from capmerge.stats import Share
from capmerge.wildcard import TooManyOutcomesError, has_brace, line_extremes, line_outcomes


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


def trained_alternatives(record: Record) -> list[Trained]:
    """The distinct alternatives of a rewritten record, in the order of its lines.

    Raises `UnmergeableError` when its fields do not agree with what `capmerge` says.
    """
    mark, caption = record[MARK], record.get("caption")
    if not isinstance(mark, str) or not isinstance(caption, str):
        name = MARK if not isinstance(mark, str) else "caption"
        raise UnmergeableError(f'"{name}" is {json_name(record.get(name))}, expected the string that a rewrite writes.')
    if not mark and not caption:
        return []
    lines = written_lines(caption, mark)
    weights = _weights(record, len(lines))
    spans = _spans(record, mark)
    found: dict[str, tuple[str, int, tuple[int, int] | None]] = {}
    for line, style, weight in zip(lines, mark, weights, strict=True):
        span = next(spans) if style == "b" else None
        style, before, span = found.get(line, (style, 0, span))  # noqa: PLW2901  # the first of equal lines says what they are
        found[line] = style, before + weight, span
    total = sum(weights)
    return [_trained(line, style, _lowest(weight, total), span) for line, (style, weight, span) in found.items()]


def written_lines(caption: str, mark: str) -> list[str]:
    """The written lines of a caption, or the options of its one in-line wildcard: one for each letter of `mark`.

    Raises `UnmergeableError` when there are more or fewer.
    """
    lines = caption.split("\n")
    if len(lines) == 1 < len(mark) and caption.startswith("{") and caption.endswith("}"):
        lines = caption[1:-1].split("|")
    if len(lines) != len(mark):
        problem = f'"caption" has {len(lines)} lines, expected {len(mark)}: one for each letter of "{MARK}".'
        raise UnmergeableError(problem)
    if not set(mark) <= {"t", "c", "b"}:
        raise UnmergeableError(f'"{MARK}" is {mark[:20]!r}, expected letters of t, c and b.')
    return lines


def _trained(line: str, style: str, share: Share, span: tuple[int, int] | None) -> Trained:
    texts, listed = _outcomes(line)
    if span is None:
        text = next(iter(texts))
        return Trained(texts, style, share, text if style == "t" else "", "" if style == "t" else text, listed)
    start, end = span
    around = (line[:start].strip(", "), line[end:].strip(", "))
    tags, rest = (next(iter(_outcomes(part)[0])) for part in (line[start:end], max(around, key=len)))
    return Trained(texts, style, share, tags, rest, listed)


def _outcomes(line: str) -> tuple[dict[str, Fraction], bool]:
    """Every text of a line with its probability, and True; past `MOST_OUTCOMES` the two extremes, and False."""
    if not has_brace(line):
        return {line: Fraction(1)}, True
    try:
        return line_outcomes(line), True
    except TooManyOutcomesError:
        return dict.fromkeys(line_extremes(line), Fraction(1, 2)), False


def _weights(record: Record, lines: int) -> list[int]:
    weights: Any = record.get(WEIGHTS, [1] * lines)
    if not isinstance(weights, list) or len(weights) != lines or not all(type(weight) is int and weight > 0 for weight in weights):
        raise UnmergeableError(f'"{WEIGHTS}" is {str(weights)[:40]}, expected {lines} whole numbers above 0, one a line.')
    return weights


def _spans(record: Record, mark: str) -> Any:
    spans: Any = record.get(TAG_SPANS, [])
    expected = mark.count("b")
    fits = isinstance(spans, list) and len(spans) == expected
    if not fits or not all(isinstance(span, list) and len(span) == 2 and all(type(end) is int for end in span) for span in spans):
        raise UnmergeableError(f'"{TAG_SPANS}" is {str(spans)[:40]}, expected {expected} pairs [start, end), one for each "b".')
    return iter([(start, end) for start, end in spans])


def _lowest(numerator: int, denominator: int) -> Share:
    divisor = gcd(numerator, denominator)
    return numerator // divisor, denominator // divisor
