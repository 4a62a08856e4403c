"""How often each alternative of a record is written, so that repeated lines carry the weights.

sd-scripts draws one line of a caption, each of them equally often. Up to `MOST_LINES` lines the
weights are exact. Over that, the templates keep their shares, and the lines of each template are
repeated or left out evenly: tags beside a caption of 40 lines are 32 of 64 lines, and the other 32
are lines of the caption.
"""

from collections.abc import Hashable, Sequence
from fractions import Fraction
from itertools import accumulate, pairwise
from math import gcd, lcm
from typing import NamedTuple, TypeVar

MOST_LINES = 64
"""The most lines that one record may have through repeats before its weights are rounded."""

_Group = TypeVar("_Group", bound=Hashable)


def whole_weights(shares: Sequence[Fraction]) -> list[int]:
    """Return the smallest whole numbers with the ratio of `shares`.

    >>> whole_weights([Fraction(1, 2), Fraction(1, 4), Fraction(1, 4)])
    [2, 1, 1]
    """
    scale = lcm(*(share.denominator for share in shares))
    weights = [int(share * scale) for share in shares]
    divisor = gcd(*weights)
    return [weight // divisor for weight in weights]


def line_counts(shares: Sequence[Fraction]) -> list[int]:
    """Return how often each of some alternatives is written, at most `MOST_LINES` lines in all.

    Up to that limit these are the `whole_weights`, and over it the counts come near their ratio:
    alternatives whose share of the lines is under one line get one each, until none of the others
    is under one; the remaining lines go to those others by largest remainder, ties to the earlier.
    With `MOST_LINES` alternatives or more, each gets one line.

    >>> line_counts([Fraction(999, 1000), Fraction(1, 1000)])
    [63, 1]
    """
    weights = whole_weights(shares)
    if sum(weights) <= MOST_LINES:
        return weights
    if len(weights) >= MOST_LINES:
        return [1] * len(weights)
    counts = [1] * len(weights)
    others = list(range(len(weights)))
    while True:
        free = MOST_LINES - (len(weights) - len(others))
        total = sum(weights[i] for i in others)
        large_enough = [i for i in others if weights[i] * free >= total]
        if len(large_enough) == len(others):
            break
        others = large_enough
    for i in others:
        counts[i] = weights[i] * free // total
    left_over = free - sum(counts[i] for i in others)
    # sorted() is stable, so ties go to the earlier.
    by_remainder = sorted(others, key=lambda i: -(weights[i] * free % total))
    for i in by_remainder[:left_over]:
        counts[i] += 1
    return counts


def lines_of_templates(shares: Sequence[Fraction]) -> list[int]:
    """Return how many lines each template has in a record whose weights are rounded.

    They are as many as fit into `MOST_LINES` in the exact ratio of the shares. A ratio that does
    not fit at all is rounded by `line_counts`.

    >>> lines_of_templates([Fraction(2, 3), Fraction(1, 3)])
    [42, 21]
    """
    counts = line_counts(shares)
    return [count * max(1, MOST_LINES // sum(counts)) for count in counts]


def spread(shares: Sequence[Fraction], lines: int) -> list[int]:
    """Return how many of a template's `lines` each of its alternatives has, evenly spread.

    The first alternative always has one. With fewer lines than alternatives, those that have none
    lie at even distances.

    >>> spread([Fraction(1, 5)] * 5, 3), spread([Fraction(1, 3)] * 3, 4)
    ([1, 1, 0, 1, 0], [2, 1, 1])
    """
    weights = whole_weights(shares)
    total = sum(weights)
    ends = [-(-lines * end // total) for end in accumulate(weights, initial=0)]  # rounded up
    return [end - start for start, end in pairwise(ends)]


def weights_fit(weights: Sequence[int], draws: int) -> bool:
    """Return whether lines can be written with these exact weights.

    Over `MOST_LINES` they can where that takes no more lines than there are `draws`, the lines
    that the templates ask for: a caption of 100 lines is written whole.
    """
    return sum(weights) <= max(MOST_LINES, draws)


class Rounded(NamedTuple):
    """The lines of a record whose weights do not fit."""

    counts: list[int]
    """How often each draw is written; 0 for never."""
    template_ppm: int
    """How far the share of the worst template is off, in millionths of the probability."""


def rounded_counts(draws: Sequence[tuple[_Group, Fraction]]) -> Rounded:
    """Return how often each draw is written in a record whose weights do not fit.

    A draw is given by its template and its share.
    """
    templates: dict[_Group, list[int]] = {}
    for number, (template, _) in enumerate(draws):
        templates.setdefault(template, []).append(number)
    shares_of_each = [[draws[number][1] for number in numbers] for numbers in templates.values()]
    shares = [sum(some, Fraction(0)) for some in shares_of_each]
    lines = lines_of_templates(shares)
    counts = [0] * len(draws)
    for numbers, some, count in zip(templates.values(), shares_of_each, lines, strict=True):
        for number, times in zip(numbers, spread(some, count), strict=True):
            counts[number] = times
    offs = (
        off_ppm(share.numerator, share.denominator, count, sum(lines))
        for share, count in zip(shares, lines, strict=True)
    )
    return Rounded(counts, max(offs))


def off_ppm(weight: int, of_weights: int, lines: int, of_lines: int) -> int:
    """Return how far the share of some lines is from that of a weight, in millionths.

    The result is rounded up, so that it is 0 only where the share is exact.
    """
    off = abs(weight * of_lines - lines * of_weights)
    return -(-off * 1_000_000 // (of_weights * of_lines))


class Repeats(NamedTuple):
    """How often each alternative of a record is written."""

    counts: list[int]
    """The number of lines of each alternative; 0 for one that is left out."""
    weights: list[int]
    """The exact weight of each alternative, as smallest whole numbers."""
    template_ppm: int = 0
    """How far the share of the worst template is off where weights were rounded, in millionths."""
    line_ppm: int = 0
    """How far the share of the worst alternative is off, in millionths; 0 if none was rounded."""


class DrawWeights:
    """The weights of a record's draws, each of which is given by its template and its share."""

    def __init__(self, draws: Sequence[tuple[Hashable, Fraction]], *, by_field: bool) -> None:
        self._draws, self._by_field = draws, by_field
        self._weights = whole_weights([share for _, share in draws]) if draws else []
        self._rounded: Rounded | None = None

    def repeats(self, places: Sequence[int]) -> Repeats:
        """Return how often each alternative of the record is written.

        `places` holds the number of the alternative that each draw gives, since equal lines are one
        alternative. With `by_field` each is written once, because a field holds the weights.
        """
        weights = _sums(places, self._weights)
        divisor = gcd(*weights)
        weights = [weight // divisor for weight in weights]
        if self._by_field:
            return Repeats([1] * len(weights), weights)
        if weights_fit(weights, len(places)):
            return Repeats(weights, weights)
        rounded = self._rounded = self._rounded or rounded_counts(self._draws)
        counts, total = _sums(places, rounded.counts), sum(weights)
        lines = sum(counts)
        offs = (
            off_ppm(weight, total, count, lines)
            for weight, count in zip(weights, counts, strict=True)
        )
        return Repeats(counts, weights, rounded.template_ppm, max(offs))


def _sums(places: Sequence[int], numbers: Sequence[int]) -> list[int]:
    """Return the sum of the numbers at each place; the places are in order of their first."""
    sums: list[int] = []
    for place, number in zip(places, numbers, strict=True):
        if place == len(sums):
            sums.append(number)
        else:
            sums[place] += number
    return sums
