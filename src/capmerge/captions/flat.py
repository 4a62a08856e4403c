"""Reads rewritten records the fast way: those whose every line is one text of one field.

Nearly all records are such: lines of tags and lines of captions without weights and without in-line
wildcards. Which lines are equal and what they are worth depends on few things, so that is prepared
once for each `Pattern`, by the same rule as in `alternatives`, which reads all other records. A
test holds both against each other.
"""

from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

from capmerge.captions.alternatives import Share
from capmerge.captions.fields import MARK, WEIGHTS
from capmerge.captions.tally import Kind, kind_of
from capmerge.captions.wildcard import has_brace, has_stand_in, parse_line

_MOST_PATTERNS = 4096
_OPEN, _CLOSE = "\0", "\1"  # stand for doubled braces in a line without these characters


@dataclass(eq=False, frozen=True, slots=True)
class Pattern:
    """What all flat records have in common whose lines have equal letters and are equally often."""

    styles: str
    """The letter of each alternative, `t` or `c`."""
    shares: tuple[Share, ...]
    """The probability of each alternative."""
    tags: int | None
    """The number of the alternative that holds the tags; None without tags."""
    captions: slice
    """The numbers of the alternatives that are caption lines."""
    kind: Kind


class FlatRecord(NamedTuple):
    """A rewritten record whose alternatives are one text each."""

    pattern: Pattern
    texts: list[str]
    """The distinct texts that are trained, nothing doubled, none empty."""


def read_flat(record: dict[str, Any]) -> FlatRecord | None:
    """Return what a flat record says; None for a record that `alternatives` must read.

    It is None, too, for a record that is not as a rewrite writes it.
    """
    caption, letters = record.get("caption"), record.get(MARK)
    if caption.__class__ is not str or letters.__class__ is not str or WEIGHTS in record:
        return None
    lines = caption.split("\n") if letters else []
    if len(lines) != len(letters) or not (letters or caption == ""):
        return None
    numbers: tuple[int, ...] = ()
    distinct = dict.fromkeys(lines)
    if len(distinct) < len(lines):
        places = dict(zip(distinct, range(len(distinct)), strict=True))
        numbers = tuple([places[line] for line in lines])
        lines = list(distinct)
    if "{" in caption or "}" in caption:
        texts = [text for line in lines if (text := only_text(line)) is not None]
        # Different lines may be equal texts, as `}` and `}}` are.
        if len(set(texts)) < len(lines):
            return None
        lines = texts
    pattern = _pattern(letters, numbers)
    return None if pattern is None or "" in distinct else FlatRecord(pattern, lines)


def only_text(line: str) -> str | None:
    """Return the text that a `line` is read as, if the grammar always reads it as the same one.

    >>> only_text("a {{b|c}}"), only_text("a {b|c}")
    ('a {b|c}', None)
    """
    if not has_brace(line):
        return line
    if has_stand_in(line) or _OPEN in line or _CLOSE in line:
        parsed = parse_line(line)
        return None if parsed.groups else parsed.text(())
    # As the grammar hides doubled braces. Without a single one that opens there is no group.
    hidden = line.replace("{{", _OPEN).replace("}}", _CLOSE)
    return None if "{" in hidden else hidden.replace(_OPEN, "{").replace(_CLOSE, "}")


@lru_cache(_MOST_PATTERNS)
def _pattern(letters: str, numbers: tuple[int, ...]) -> Pattern | None:
    """Return the pattern of records with these `letters`; None if such records are not flat.

    `numbers` holds the number of the alternative of each line; it is empty where all lines differ.
    """
    if letters.strip("tc"):
        return None
    numbers = numbers or tuple(range(len(letters)))
    times = Counter(numbers)
    styles = "".join(letters[numbers.index(number)] for number in range(len(times)))
    first, count = styles.find("c"), styles.count("c")
    if styles[first : first + count] != "c" * count:
        return None
    shares = [Fraction(times[number], len(letters)) for number in range(len(times))]
    tags = styles.find("t")
    return Pattern(
        styles,
        tuple((share.numerator, share.denominator) for share in shares),
        None if tags < 0 else tags,
        slice(first, first + count) if count else slice(0, 0),
        kind_of(tags >= 0, count > 0),
    )
