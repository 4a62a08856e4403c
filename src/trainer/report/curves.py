"""The curves of a run: the numbers of metrics.jsonl, gathered in one pass into a bounded page.

A file of a million steps becomes at most `MOST_BINS` bins of steps per curve, which hold the count,
the sum, the lowest and the highest of their values: means stay exact, and no spike is lost. A short
run has one bin for each step, so its values are drawn as they are.
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from trainer.config.settings import MOST
from trainer.training.metrics import iter_lines

MOST_BINS = 1500
"""Largest number of bins of a curve, about twice the width of its picture in pixels."""
_SMOOTHED_SHARE = 20
"""The moving mean of a curve is taken over this part of its bins."""
_FEWEST_SMOOTHED = 20
"""Curves of fewer bins have no moving mean."""
_MOST_RATES = 16
_MOST_EVENTS = 64
_LONGEST_NAME = 64
"""Fields of longer names are not those of a run."""
_LARGEST = 1e30
"""Values beyond it are counted as not finite; their sums stay finite."""
_SMALLEST = 1e-30
"""Values nearer to 0 are drawn as 0."""
_MOST_RANKS = 4096
_FIELDS = ("loss", "grad_norm", "samples_per_second", "data_wait")


class Bin(NamedTuple):
    """The values of a curve over some steps in a row."""

    step: float
    """The mean of the steps."""
    n_values: int
    total: float
    low: float
    high: float

    @property
    def mean(self) -> float:
        """The mean of the values."""
        return self.total / self.n_values

    def joined(self, other: "Bin") -> "Bin":
        """Both bins as one."""
        n_values = self.n_values + other.n_values
        return Bin(
            (self.step * self.n_values + other.step * other.n_values) / n_values,
            n_values,
            self.total + other.total,
            min(self.low, other.low),
            max(self.high, other.high),
        )


class Curve:
    """The values of one field over the steps, in at most `MOST_BINS` bins of equal width."""

    def __init__(self) -> None:
        self.width = 1
        """Steps per bin, a power of two."""
        self._bins: dict[int, Bin] = {}

    def add(self, step: int, value: float) -> None:
        """Add the value of a step, counted from 1; 0 is before the first."""
        value = value if abs(value) > _SMALLEST else 0.0
        self._add((step - 1) // self.width, Bin(step, 1, value, value, value))
        while len(self._bins) > MOST_BINS:
            self.width *= 2
            narrow, self._bins = self._bins, {}
            for number, one in narrow.items():
                self._add(number // 2, one)

    def _add(self, number: int, added: Bin) -> None:
        found = self._bins.get(number)
        self._bins[number] = found.joined(added) if found else added

    def bins(self) -> list[Bin]:
        """The bins in the order of their steps."""
        return [one for _, one in sorted(self._bins.items())]

    def smoothed(self) -> list[tuple[float, float]]:
        """The moving mean at each bin as (step, mean), or nothing for a curve of few bins."""
        bins = self.bins()
        if len(bins) < _FEWEST_SMOOTHED:
            return []
        reach = self.reach(len(bins))
        counts, totals = [0], [0.0]
        for one in bins:
            counts.append(counts[-1] + one.n_values)
            totals.append(totals[-1] + one.total)
        means = []
        for number, one in enumerate(bins):
            first, end = max(0, number - reach), min(len(bins), number + reach + 1)
            mean = (totals[end] - totals[first]) / (counts[end] - counts[first])
            means.append((one.step, mean))
        return means

    @staticmethod
    def reach(n_bins: int) -> int:
        """How many bins before and after one the moving mean at it takes in."""
        return max(1, n_bins // (2 * _SMOOTHED_SHARE))

    def mean(self) -> float:
        """The mean of all values."""
        return _mean(self.bins())

    def mean_of_ends(self) -> tuple[float, float] | None:
        """The means over the first and the last tenth of the bins; None for a curve of few."""
        bins = self.bins()
        if len(bins) < _FEWEST_SMOOTHED:
            return None
        tenth = len(bins) // 10
        return _mean(bins[:tenth]), _mean(bins[-tenth:])


def _mean(bins: list[Bin]) -> float:
    return math.fsum(one.total for one in bins) / sum(one.n_values for one in bins)


@dataclass
class RunCurves:
    """Everything that the page needs of metrics.jsonl."""

    curves: dict[str, Curve] = field(default_factory=dict)
    """By the names of the fields: loss, grad_norm, lr_unet, ...; only those with a finite value."""
    lines: int = 0
    first_step: int = 1
    last_step: int = 0
    epoch: int = 0
    """That of the last step, counted from 0."""
    peak_memory_bytes: int = 0
    not_finite: int = 0
    """Lines whose loss or gradient is not finite."""
    rank_waits: tuple[float, ...] = ()
    """The share that each rank waited for the others, in the last line; empty for one rank."""
    skipped: int = 0
    """Lines of steps that did not change the weights."""
    counts: Counter[str] = field(default_factory=Counter)
    """`Batch.counts` of all lines, added up."""
    unreadable_bytes: int = 0
    """Bytes of the file that are no whole line with a step."""

    def rates(self) -> dict[str, Curve]:
        """The curves of the learning rates, by the names of the parts."""
        return {
            name.removeprefix("lr_"): curve
            for name, curve in self.curves.items()
            if name.startswith("lr_")
        }


def read_curves(path: Path) -> RunCurves:
    """The curves of a metrics.jsonl, in one pass and in memory that does not grow with it.

    A file that a run is still writing is read as far as it goes. Raises `OSError` when it cannot
    be read.
    """
    found = RunCurves()
    read_bytes = 0
    for line, values in iter_lines(path, MOST):
        if values["step"] > 0 and values["step"] is not True:
            read_bytes += len(line)
            _add_line(found, values)
    found.unreadable_bytes = max(0, path.stat().st_size - read_bytes)
    return found


def _add_line(found: RunCurves, values: dict[str, Any]) -> None:
    step = values["step"]
    found.first_step = min(found.first_step, step) if found.lines else step
    found.lines += 1
    if step >= found.last_step:
        found.last_step, found.epoch = step, _count(values.get("epoch"))
        found.rank_waits = _rank_waits(values.get("ranks"))
    found.peak_memory_bytes = max(found.peak_memory_bytes, _count(values.get("memory_bytes")))
    found.skipped += values.get("skipped") is True
    broken = False
    for name, value in values.items():
        if len(name) > _LONGEST_NAME or name in _OTHERS:
            continue
        if name in _FIELDS or name.startswith("lr_"):
            if not is_number(value):
                broken |= name in ("loss", "grad_norm")
            elif name in found.curves or name in _FIELDS or len(found.rates()) < _MOST_RATES:
                found.curves.setdefault(name, Curve()).add(step, float(value))
        elif name in found.counts or len(found.counts) < _MOST_EVENTS:
            found.counts[name] += _count(value)
    found.not_finite += broken


_OTHERS = {"step", "epoch", "memory_bytes", "skipped", "loss_scale", "keys", "captions", "ranks"}
"""Fields of a line that are neither a curve nor a count of samples or events."""


def _rank_waits(ranks: Any) -> tuple[float, ...]:
    """The waits in the field `ranks` of a line; empty for anything else."""
    waits = ranks.get("rank_wait") if isinstance(ranks, dict) else None
    if not isinstance(waits, list) or len(waits) > _MOST_RANKS or not all(map(is_number, waits)):
        return ()
    return tuple(float(wait) for wait in waits)


def is_number(value: Any) -> bool:
    """True for a number that can be drawn."""
    return isinstance(value, float | int) and value is not True and abs(value) < _LARGEST


def _count(value: Any) -> int:
    """A whole number from 0 on, or 0 for anything else."""
    whole = isinstance(value, int) and not isinstance(value, bool)
    return value if whole and 0 <= value < _LARGEST else 0
