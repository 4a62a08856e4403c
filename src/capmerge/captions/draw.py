"""The seeded draw of one alternative from a caption, by the grammar of `wildcard`. Knows nothing of records, tags or files."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import lcm, prod
from typing import Literal, NamedTuple

from capmerge.captions.wildcard import has_brace, parse_line
from capmerge.rng import Chance

Pick = Literal["random", "cycle"]


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
    return draw_line(
        caption, seed, epoch, key, dataset=dataset, repeat=repeat, weights=weights, pick=pick
    ).text


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

    `weights` are those of the lines (a record's `capmerge_weights`), each line once when None.
    `pick` says how: `random`: a line by its weight, then an option of each of its groups, all
    independent (see `chance`). `cycle`: the alternatives in turn, one step further with each epoch
    and with each repeat, from a place given by seed, data set and key. A line of weight w comes w
    times in a full turn, evenly spread, equal lines counting as one; its groups go through all
    their combinations as it comes again.

    Raises `ValueError` when `weights` are not one number of 0 or more a line, or all 0.
    """
    lines = caption.split("\n")
    if weights is not None and (len(weights) != len(lines) or min(weights) < 0 or not any(weights)):
        raise ValueError(
            f"found the weights {list(weights)} for {len(lines)} lines, expected one of 0 or more a line, not all 0"
        )
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
    options = tuple(
        options.index(options[chance.below(len(options), f"option {group}")])
        for group, options in enumerate(parsed.groups)
    )
    return Drawn(parsed.text(options), lines.index(line), len(lines), options)


def _weighted(lines: list[str], weights: Sequence[int] | None, chance: Chance) -> int:
    if weights is None:
        return chance.below(len(lines), "line")
    ends = list(accumulate(weights))
    return bisect_right(ends, chance.below(ends[-1], "line"))


def _draw_in_turn(
    lines: list[str], weights: Sequence[int] | None, step: int, chance: Chance
) -> Drawn:
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

    Coming j of number i stands at (2 j + 1) / (2 w_i) of the turn; ties go to the lower number. Up
    to any place the numbers have come their fair share to within half a time each, so few comings
    around `place` need to be looked at, however large the weights.
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
