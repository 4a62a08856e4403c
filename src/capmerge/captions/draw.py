"""The seeded draw of one alternative from a caption, by the grammar of `wildcard`."""

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from math import lcm, prod
from typing import Literal, NamedTuple

from capmerge.captions.wildcard import has_brace, parse_line
from capmerge.rng import Chance, SampleId

Pick = Literal["random", "cycle"]


class Drawn(NamedTuple):
    """The alternative that was drawn from a caption."""

    text: str
    """The text that is trained: in-line wildcards expanded, braces unescaped."""
    line: int
    """The number of the drawn line in the caption, from 0; the first among equal lines."""
    lines: int
    """The number of lines in the caption."""
    options: tuple[int, ...]
    """The number of the drawn option of each `{a|b}`, from 0; the first among equal options."""


def draw_line(
    caption: str,
    sample: SampleId,
    *,
    weights: Sequence[int] | None = None,
    pick: Pick = "random",
) -> Drawn:
    r"""Return the alternative of `caption` that `sample` trains: a line, its wildcards expanded.

    The result depends on the arguments alone: every machine and every release of this package
    draws the same. `weights` are the weights of the lines (`capmerge_weights` of a record), or None
    for 1 each. `pick` is how the alternative is chosen:

    - `random` draws a line by its weight, then one option for each `{a|b}` of that line, all
      independently of each other (see `capmerge.rng`).
    - `cycle` takes the alternatives in turn and moves one step on with each epoch and each repeat,
      from a start that seed, data set and key determine. A line of weight w comes w times in a full
      cycle, evenly spread, and equal lines count as one. Each time the line comes up again, its
      wildcards move on to their next combination of options.

    >>> caption = "1girl\na {red|blue} hat"
    >>> samples = [SampleId(seed=7, epoch=epoch, key="a.png") for epoch in range(4)]
    >>> [draw_line(caption, sample, pick="cycle").text for sample in samples]
    ['a blue hat', '1girl', 'a red hat', '1girl']

    Raises `ValueError` for another `pick`, and for `weights` that are not one number of 0 or more
    per line or are all 0.
    """
    lines = caption.split("\n")
    if weights is not None and (len(weights) != len(lines) or min(weights) < 0 or not any(weights)):
        raise ValueError(
            f"found the weights {list(weights)} for {len(lines)} lines, "
            "expected one of 0 or more per line, not all 0"
        )
    if pick == "cycle":
        step = sample.epoch + sample.repeat
        return _draw_in_turn(lines, weights, step, Chance(sample._replace(epoch=0, repeat=0)))
    if pick != "random":
        raise ValueError(f"found the pick {pick!r}, expected random or cycle")
    chance = Chance(sample)
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
    """Return the alternative at `step` of an endless cycle through all of them."""
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
    """Return the distinct texts with the sums of their weights, without those of weight 0."""
    counted: dict[str, int] = {}
    for text, weight in zip(texts, weights or [1] * len(texts), strict=True):
        if weight:
            counted[text] = counted.get(text, 0) + weight
    return counted


@lru_cache(maxsize=4096)
def nth_of_turn(weights: tuple[int, ...], place: int) -> tuple[int, int]:
    """Return the line at `place` of a cycle, and how often it occurred before in that cycle.

    The cycle holds line i `weights[i]` times, evenly spread:

    >>> [nth_of_turn((4, 1, 1), place)[0] for place in range(6)]
    [0, 0, 1, 2, 0, 0]

    The j-th occurrence of line i sits at (2j + 1) / (2 w_i) of the cycle; ties go to the lower
    line. At every place each line has had its fair share to within half an occurrence, so only
    occurrences near `place` are candidates, however large the weights.
    """
    total, scale, slack = sum(weights), lcm(*weights), len(weights)
    before = 0
    candidates: list[tuple[int, int, int]] = []
    for number, weight in enumerate(weights):
        # The occurrences j in [start, end) lie at or after (place - slack) / total and before
        # (place + slack + 1) / total.
        start = max(0, ((place - slack) * weight * 2 + total - 1) // (2 * total))
        end = min(weight, ((place + slack + 1) * weight * 2 + total - 1) // (2 * total))
        before += start
        candidates += [((2 * j + 1) * (scale // weight), number, j) for j in range(start, end)]
    candidates.sort()
    _, number, earlier = candidates[place - before]
    return number, earlier
