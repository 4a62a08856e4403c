"""Reading a rewritten record back: its alternatives with style and probability. The reverse of `caption`."""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from capmerge.marks import MARK, STYLES, WEIGHTS
from capmerge.wildcard import Drawn, escape, parse_line


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
        raise BrokenRecordError(f'expected strings "caption" and "{MARK}", as a rewrite writes them.')
    if not caption and not letters:
        return []
    lines = caption.split("\n")
    if len(lines) == 1 < len(letters):
        parsed = parse_line(caption)
        if len(parsed.groups) == 1 and not any(parsed.literals):
            lines = [escape(parsed.option(0, number)) for number in range(len(parsed.groups[0]))]
    if len(lines) != len(letters):
        raise BrokenRecordError(f'found {len(lines)} lines and {len(letters)} letters in "{MARK}", expected one letter a line.')
    if unknown := set(letters) - STYLES.keys():
        raise BrokenRecordError(f'found the letter {min(unknown)!r} in "{MARK}", expected t, c or b.')
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
        Written(line, letters[found[0]], tuple(found), Fraction(sum(weights[place] for place in found), total))
        for line, found in places.items()
    ]


def place_drawn(letters: str, drawn: Drawn) -> int:
    """Where what was drawn stands among the `letters` of the mark: its line, or its option of an in-line wildcard of several letters."""
    in_line = len(letters) > 1 and drawn.lines == 1
    return drawn.options[0] if in_line else drawn.line
