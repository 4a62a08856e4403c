"""What a rank's steps spend their time on: their own work, the loader, and the other ranks.

Nothing here waits for the device. Ranks leave a step together, because each step ends with a value
that all of them exchange. So a rank that reaches the last backward pass of the next step, in which
the gradients are exchanged, earlier than the slowest one waits for it that long. Ranks have batches
of one shape, so the backward pass itself takes them the same time.
"""

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch


class RankTimes(NamedTuple):
    """The times of one step on one rank, in seconds."""

    whole: float
    """Duration of the step."""
    data: float
    """The part of it that was spent waiting for the loader."""
    arrival: float
    """The time from the start of the step to its last backward pass, on the device."""


class StepClock:
    """The times of the present step and of the one before it."""

    def __init__(self, device: torch.device, rank: int, ranks: int) -> None:
        self._device, self._rank, self._ranks = device, rank, ranks
        self._last: RankTimes | None = None
        # What has been given to a GPU is done later, so its own clock is read.
        event: Any = torch.cuda.Event
        is_timed = device.type == "cuda" and ranks > 1
        self._events = [event(enable_timing=True) for _ in range(2)] if is_timed else []
        self._start = self._data = self._arrival = 0.0

    def start(self) -> None:
        """Note that a step begins."""
        self._start, self._data, self._arrival = time.perf_counter(), 0.0, 0.0
        if self._events:
            self._events[0].record()

    def add_data_wait(self, seconds: float) -> None:
        """Note a wait for the loader."""
        self._data += seconds

    def arrive(self) -> None:
        """Note that the last backward pass of the step begins."""
        self._arrival = time.perf_counter() - self._start
        if self._events:
            self._events[1].record()

    def end(self) -> tuple[float, float]:
        """Note that the step has ended; its duration and its wait for the loader, in seconds.

        The device has been waited for, so its events are over.
        """
        whole = time.perf_counter() - self._start
        arrival = self._arrival
        if self._events:
            arrival = self._events[0].elapsed_time(self._events[1]) / 1000
        self._last = RankTimes(whole, self._data, arrival)
        return whole, self._data

    def to_be_summed(self) -> list[float]:
        """The times of the step before, in this rank's place among those of all; zeros elsewhere.

        So one sum over the ranks tells all times to all of them. Empty on a single rank.
        """
        values = [0.0] * (len(RankTimes._fields) * self._ranks if self._ranks > 1 else 0)
        if values and self._last:
            begin = len(RankTimes._fields) * self._rank
            values[begin : begin + len(RankTimes._fields)] = self._last
        return values

    def of_all_ranks(self, sums: Sequence[float]) -> tuple[RankTimes, ...]:
        """The times of all ranks, from the sums of `to_be_summed`; none for the first step."""
        width = len(RankTimes._fields)
        times = [RankTimes(*sums[i : i + width]) for i in range(0, len(sums), width)]
        return tuple(times) if any(each.whole for each in times) else ()
