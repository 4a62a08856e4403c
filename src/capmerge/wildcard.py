r"""sd-scripts' caption grammar: what its `enable_wildcard` makes of a caption, and how to write text that survives it.

With `enable_wildcard`, `process_caption` (library/train_util.py) draws one line of the caption at random, then replaces
each `{a|b}` of that line by one option, after hiding doubled braces behind stand-ins. This module is the only home of
that grammar, and of drawing by it. It knows nothing of records, tags or files.
"""

import re
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from functools import lru_cache
from itertools import accumulate, product
from math import lcm, prod
from typing import Literal, NamedTuple

from capmerge.chance import Chance

Pick = Literal["random", "cycle"]

_GROUP = re.compile(r"\{([^}]+)\}")
_UNBREAKABLE = re.compile(r"\{\{|\}\}|\{(?:\}\}|[^}])++\}")
# The grammar hides "{{" behind U+2985 and "}}" behind U+2986, each repeated until it does not occur in the line.
_OPEN, _CLOSE = "\u2985", "\u2986"
_FUSES_OPEN, _FUSES_CLOSE = re.compile(_OPEN + r"(?=\{\{)"), re.compile(_CLOSE + r"(?=\}\})")

MOST_OUTCOMES = 4096
_MOST_LETTERS = 1 << 24  # of all outcomes of a line together


class TooManyOutcomesError(ValueError):
    """A caption whose wildcards multiply to more than `MOST_OUTCOMES` texts, or to so long ones that they would fill the memory."""


def has_brace(text: str) -> bool:
    """Whether `text` holds a brace, the only character that the grammar reads inside a line."""
    return "{" in text or "}" in text


def escape(text: str) -> str:
    """`text` with its braces doubled, so that the grammar gives back `text` itself.

    >>> escape("a {b|c}")
    'a {{b|c}}'

    U+2985 right before an opening brace and U+2986 right before a closing one get a space between: the stand-in for
    the doubled brace would swap places with them (measured on the real code: the only failures among 9,330 strings).
    """
    if not has_brace(text):
        return text
    return space_stand_ins(text.replace("{", "{{").replace("}", "}}"))


def space_stand_ins(line: str) -> str:
    """A written `line` with a space between a stand-in character and the doubled brace right behind it."""
    if _OPEN in line or _CLOSE in line:
        line = _FUSES_CLOSE.sub(_CLOSE + " ", _FUSES_OPEN.sub(_OPEN + " ", line))
    return line


def outcomes(caption: str) -> dict[str, Fraction]:
    r"""Every text that sd-scripts can train on for `caption`, with its probability; they sum to 1.

    >>> outcomes("a\nb\nb") == {"a": Fraction(1, 3), "b": Fraction(2, 3)}
    True

    Raises `TooManyOutcomesError` when the wildcards of a line multiply past `MOST_OUTCOMES`.
    Source: `process_caption` with `enable_wildcard` on and all else off, sd-scripts since f4a4c11c (2024-03-23).
    """
    lines = caption.split("\n")
    found: dict[str, Fraction] = {}
    for line in lines:
        for text, probability in line_outcomes(line).items():
            found[text] = found.get(text, Fraction(0)) + probability / len(lines)
    return found


def line_outcomes(line: str) -> dict[str, Fraction]:
    """Every text that one `line` can become through its brace groups, with its probability."""
    if not has_brace(line):
        return {line: Fraction(1)}
    parsed = parse_line(line)
    count = parsed.ways
    if not parsed.is_listable():
        raise TooManyOutcomesError(f"the wildcards of one line give {count} texts, at most {MOST_OUTCOMES} are listed")
    found: dict[str, Fraction] = {}
    for drawn in product(*(range(len(options)) for options in parsed.groups)):
        text = parsed.text(drawn)
        found[text] = found.get(text, Fraction(0)) + Fraction(1, count)
    return found


class Line(NamedTuple):
    """A line as the grammar reads it: literal, group, literal, group, ..., literal."""

    literals: list[str]
    groups: list[list[str]]
    """The options of each `{a|b}`."""
    hidden: tuple[str, str]
    """What stands for a doubled brace in literals and options."""

    @property
    def ways(self) -> int:
        """How many ways there are to draw from it."""
        return prod(map(len, self.groups))

    def is_listable(self) -> bool:
        """Whether there are few enough texts to list, at most `MOST_OUTCOMES`, and they fit into the memory."""
        letters = sum(map(len, self.literals)) + sum(max(map(len, options)) for options in self.groups)
        return self.ways <= MOST_OUTCOMES and self.ways * letters <= _MOST_LETTERS

    def text(self, drawn: Sequence[int]) -> str:
        """The text with the option of each group that `drawn` numbers, braces unescaped."""
        pieces = [self.literals[0]]
        for options, number, literal in zip(self.groups, drawn, self.literals[1:], strict=True):
            pieces += options[number], literal
        # Only now: a stand-in may fuse with its neighbour across the seam, and the real code would read it so.
        return self._shown("".join(pieces))

    def option(self, group: int, number: int) -> str:
        """One option of a group by itself, braces unescaped."""
        return self._shown(self.groups[group][number])

    def _shown(self, text: str) -> str:
        return text.replace(self.hidden[0], "{").replace(self.hidden[1], "}")


def parse_line(line: str) -> Line:
    """The literals and groups of one `line`."""
    if not has_brace(line):
        return Line([line], [], ("{", "}"))
    hidden_open, hidden_close = _OPEN, _CLOSE
    while hidden_open in line or hidden_close in line:
        hidden_open, hidden_close = hidden_open + _OPEN, hidden_close + _CLOSE
    # split() with one group alternates: literal, options, literal, options, ..., literal.
    parts = _GROUP.split(line.replace("{{", hidden_open).replace("}}", hidden_close))
    return Line(parts[::2], [options.split("|") for options in parts[1::2]], (hidden_open, hidden_close))


def unbreakable_spans(line: str) -> list[tuple[int, int]]:
    """[start, end) of each doubled brace and of each `{a|b}` in `line`: a text cut inside one would read differently."""
    return [match.span() for match in _UNBREAKABLE.finditer(line)]


class Drawn(NamedTuple):
    """What was drawn from a caption."""

    text: str
    """The very line that is trained: in-line wildcards expanded, braces unescaped."""
    line: int
    """Which line of the caption, from 0; of equal lines the first."""
    lines: int
    """How many lines the caption has."""
    options: tuple[int, ...]
    """Which option of each `{a|b}` of that line, from 0; of equal options the first."""


def draw(
    caption: str,
    seed: int,
    epoch: int,
    key: str,
    *,
    dataset: int = 0,
    repeat: int = 0,
    weights: Sequence[int] | None = None,
    pick: Pick = "random",
) -> str:
    r"""The line of `caption` that is trained, as `draw_line` draws it.

    >>> [draw("1girl\na {red|blue} hat", 7, epoch, "a.png", pick="cycle") for epoch in range(4)]
    ['a blue hat', '1girl', 'a red hat', '1girl']
    """
    return draw_line(caption, seed, epoch, key, dataset=dataset, repeat=repeat, weights=weights, pick=pick).text


def draw_line(
    caption: str,
    seed: int,
    epoch: int,
    key: str,
    *,
    dataset: int = 0,
    repeat: int = 0,
    weights: Sequence[int] | None = None,
    pick: Pick = "random",
) -> Drawn:
    """One alternative of `caption`, a pure function of the arguments: the same on every machine, now and later.

    `weights` are those of the lines (a record's `capmerge_weights`), each line once when None. `pick` says how:
    `random`: a line by its weight, then an option of each of its groups, all independent (see `chance`).
    `cycle`: the alternatives in turn, one step further with each epoch and with each repeat, from a place given by
    seed, data set and key. A line of weight w comes w times in a full turn, evenly spread, equal lines counting as one;
    its groups go through all their combinations as it comes again.

    Raises `ValueError` when `weights` are not one number of 0 or more a line, or all 0.
    """
    lines = caption.split("\n")
    if weights is not None and (len(weights) != len(lines) or min(weights) < 0 or not any(weights)):
        raise ValueError(f"found the weights {list(weights)} for {len(lines)} lines, expected one of 0 or more a line, not all 0")
    if pick == "cycle":
        return _draw_in_turn(lines, weights, epoch + repeat, Chance(seed, 0, key, dataset))
    if pick != "random":
        raise ValueError(f"found the pick {pick!r}, expected random or cycle")
    chance = Chance(seed, epoch, key, dataset, repeat)
    number = _weighted(lines, weights, chance)
    line = lines[number]
    if not has_brace(line):
        return Drawn(line, lines.index(line), len(lines), ())
    parsed = parse_line(line)
    options = tuple(options.index(options[chance.below(len(options), f"option {group}")]) for group, options in enumerate(parsed.groups))
    return Drawn(parsed.text(options), lines.index(line), len(lines), options)


def _weighted(lines: list[str], weights: Sequence[int] | None, chance: Chance) -> int:
    if weights is None:
        return chance.below(len(lines), "line")
    ends = list(accumulate(weights))
    return bisect_right(ends, chance.below(ends[-1], "line"))


def _draw_in_turn(lines: list[str], weights: Sequence[int] | None, step: int, chance: Chance) -> Drawn:
    """The alternative at `step` of an endless walk through all of them."""
    distinct = _counted(lines, weights)
    total = sum(distinct.values())
    turns, place = divmod(step + chance.below(total, "first line"), total)
    number, earlier = nth_of_turn(tuple(distinct.values()), place)
    line = list(distinct)[number]
    parsed = parse_line(line)
    options: list[int] = []
    if parsed.groups:
        groups = [_counted(options, None) for options in parsed.groups]
        radix = prod(sum(group.values()) for group in groups)
        come = turns * distinct[line] + earlier + chance.below(radix, f"first option {number}")
        for group, given in zip(groups, parsed.groups, strict=True):
            come, place = divmod(come, sum(group.values()))
            option, _ = nth_of_turn(tuple(group.values()), place)
            options.append(given.index(list(group)[option]))
    return Drawn(parsed.text(options), lines.index(line), len(lines), tuple(options))


def _counted(texts: list[str], weights: Sequence[int] | None) -> dict[str, int]:
    """The distinct texts with their weights."""
    counted: dict[str, int] = {}
    for text, weight in zip(texts, weights or [1] * len(texts), strict=True):
        if weight:
            counted[text] = counted.get(text, 0) + weight
    return counted


@lru_cache(maxsize=4096)
def nth_of_turn(weights: tuple[int, ...], place: int) -> tuple[int, int]:
    """Who comes at `place` of a turn in which number i comes `weights[i]` times, evenly spread; and how often it came before.

    >>> [nth_of_turn((4, 1, 1), place)[0] for place in range(6)]
    [0, 0, 1, 2, 0, 0]

    Coming j of number i stands at (2 j + 1) / (2 w_i) of the turn; ties go to the lower number. Up to any place the
    numbers have come their fair share to within half a time each, so few comings around `place` need to be looked at,
    however large the weights.
    """
    total, scale, slack = sum(weights), lcm(*weights), len(weights)
    before = 0
    comings: list[tuple[int, int, int]] = []
    for number, weight in enumerate(weights):
        # Comings at or after (place - slack) / total and before (place + slack + 1) / total.
        start = max(0, ((place - slack) * weight * 2 + total - 1) // (2 * total))
        end = min(weight, ((place + slack + 1) * weight * 2 + total - 1) // (2 * total))
        before += start
        comings += [((2 * j + 1) * (scale // weight), number, j) for j in range(start, end)]
    comings.sort()
    _, number, earlier = comings[place - before]
    return number, earlier
