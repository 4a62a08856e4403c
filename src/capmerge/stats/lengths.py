"""Token lengths as exact counts: their figures, their sums and their form in JSON.

Every text has a share: how likely it is to be drawn for its record. Lengths are whole numbers
counted by share, so parts merge in any order to the same figures.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import ceil, lcm
from typing import Any, NamedTuple

from capmerge.captions.alternatives import Share

WHOLE: Share = (1, 1)
LONGEST = 20
_QUANTILES = {
    "median": Fraction(1, 2),
    "p90": Fraction(9, 10),
    "p99": Fraction(99, 100),
    "p99.9": Fraction(999, 1000),
}


class LimitEffect(NamedTuple):
    """The effect of a limit on texts that are all encoded at that length."""

    limit: int
    texts: int
    """The number of texts longer than the limit, each counted once."""
    share: float
    """The share of the probability that belongs to texts longer than the limit."""
    dropped_tokens: int
    """The tokens of those texts past the limit, each text counted once."""
    dropped_share: float
    """The share of all tokens that is dropped, weighted by probability."""
    padding_share: float
    """The share of all token positions that stays empty, weighted by probability."""


class LengthStats:
    """Token lengths of many texts.

    `longest` are the longest of them as (tokens, key), longest first and equal ones by key.
    """

    def __init__(self) -> None:
        self._by_share: dict[Share, Counter[int]] = {}
        self.longest: list[tuple[int, str]] = []

    def add(self, lengths: Sequence[int], keys: Sequence[str], share: Share = WHOLE) -> None:
        """Count texts of these lengths, each with this share; `keys` are their records' keys."""
        if not lengths:
            return
        self._by_share.setdefault(share, Counter()).update(lengths)
        least = (
            self.longest[-1][0] if len(self.longest) == LONGEST else sorted(lengths)[-LONGEST:][0]
        )
        if max(lengths) >= least:
            self._offer(
                (length, key) for length, key in zip(lengths, keys, strict=True) if length >= least
            )

    def merge(self, other: "LengthStats") -> None:
        """Add the counts of `other`."""
        for share, counts in other._by_share.items():  # noqa: SLF001  # of the same class
            self._by_share.setdefault(share, Counter()).update(counts)
        self._offer(other.longest)

    def _offer(self, found: Iterable[tuple[int, str]]) -> None:
        self.longest = sorted([*self.longest, *found], key=lambda pair: (-pair[0], pair[1]))[
            :LONGEST
        ]

    def distribution(self) -> "Distribution":
        """Return the distribution of the lengths counted so far."""
        unit = lcm(*(denominator for _, denominator in self._by_share))
        weights: Counter[int] = Counter()
        texts: Counter[int] = Counter()
        for (numerator, denominator), counts in self._by_share.items():
            scale = numerator * (unit // denominator)
            weights.update({length: count * scale for length, count in counts.items()})
            texts.update(counts)
        lengths = sorted(texts)
        return Distribution(
            lengths,
            [texts[length] for length in lengths],
            [weights[length] for length in lengths],
            unit,
        )

    def as_json(self) -> dict[str, Any]:
        """Return figures for a reader, and the exact counts that `from_json` reads back."""
        return {
            **self.distribution().summary(),
            "max_key": self.longest[0][1] if self.longest else None,
            "longest": [{"tokens": length, "key": key} for length, key in self.longest],
            "histogram": [
                {
                    "share": f"{share[0]}/{share[1]}",
                    "tokens": sorted(counts),
                    "texts": [counts[length] for length in sorted(counts)],
                }
                for share, counts in sorted(
                    self._by_share.items(), key=lambda item: Fraction(*item[0])
                )
            ],
        }

    @classmethod
    def from_json(cls, written: dict[str, Any]) -> "LengthStats":
        """Return the lengths that `as_json` wrote."""
        stats = cls()
        for part in written["histogram"]:
            numerator, denominator = map(int, part["share"].split("/"))
            stats._by_share[numerator, denominator] = Counter(
                dict(zip(part["tokens"], part["texts"], strict=True))
            )
        stats.longest = [(entry["tokens"], entry["key"]) for entry in written["longest"]]
        return stats


@dataclass(frozen=True, slots=True)
class Distribution:
    """Texts by length.

    All sums are of whole numbers; only a final quotient becomes a float.
    """

    lengths: list[int]
    """The lengths that occur, shortest first."""
    texts: list[int]
    """The number of texts of each length."""
    weights: list[int]
    """The sum of the shares of the texts of each length, in units of 1 / `unit`."""
    unit: int

    @property
    def weight(self) -> int:
        """The sum of all shares, in units of 1 / `unit`."""
        return sum(self.weights)

    @property
    def maximum(self) -> int | None:
        """The greatest length, or None without texts."""
        return self.lengths[-1] if self.lengths else None

    def mean(self) -> float | None:
        """Return the mean length, or None without texts."""
        return _quotient(self._sum(self.weights), self.weight) if self.lengths else None

    def quantile(self, part: Fraction) -> int | None:
        """Return the smallest length that at least `part` of the texts do not exceed.

        It is None without texts.

        >>> Distribution([10, 20], [3, 1], [3, 1], 1).quantile(Fraction(3, 4))
        10
        """
        if not self.lengths:
            return None
        return self.lengths[
            bisect_left(list(accumulate(self.weights)), max(1, ceil(part * self.weight)))
        ]

    def limit_effect(self, limit: int) -> LimitEffect:
        """Return the effect of a limit of this many tokens on the texts."""
        over = [max(0, length - limit) for length in self.lengths]
        tokens, dropped = self._sum(self.weights), _dot(over, self.weights)
        return LimitEffect(
            limit,
            texts=sum(texts for texts, more in zip(self.texts, over, strict=True) if more),
            share=_quotient(
                sum(weight for weight, more in zip(self.weights, over, strict=True) if more),
                self.weight,
            ),
            dropped_tokens=_dot(over, self.texts),
            dropped_share=_quotient(dropped, tokens),
            padding_share=_quotient(limit * self.weight - (tokens - dropped), limit * self.weight),
        )

    def grouped(self, size: int) -> dict[int, tuple[int, float]]:
        """Return the number and share of texts, by how many groups of `size` tokens they need.

        The share is of the probability. A text of 0 tokens needs one group.
        """
        found: dict[int, tuple[int, int]] = {}
        for length, texts, weight in zip(self.lengths, self.texts, self.weights, strict=True):
            groups = max(1, -(-length // size))
            before = found.get(groups, (0, 0))
            found[groups] = before[0] + texts, before[1] + weight
        return {
            groups: (texts, _quotient(weight, self.weight))
            for groups, (texts, weight) in found.items()
        }

    def summary(self) -> dict[str, Any]:
        """Return the figures by name; those that need a text are None without texts."""
        return {
            "texts": sum(self.texts),
            "weight": _quotient(self.weight, self.unit),
            "tokens": self._sum(self.texts),
            "mean": self.mean(),
            **{name: self.quantile(part) for name, part in _QUANTILES.items()},
            "max": self.maximum,
        }

    def _sum(self, counts: list[int]) -> int:
        return _dot(self.lengths, counts)


def _dot(left: Iterable[int], right: Iterable[int]) -> int:
    return sum(a * b for a, b in zip(left, right, strict=True))


def _quotient(part: int, whole: int) -> float:
    """Return the nearest float, even for integers too large for one; 0 when `whole` is 0."""
    return float(Fraction(part, whole)) if whole else 0.0
