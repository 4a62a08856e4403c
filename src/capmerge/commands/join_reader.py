"""Reads records of a joined file by their numbers, near ones together."""

from functools import partial
from pathlib import Path
from typing import NamedTuple

from capmerge.files.scratch import SharedFile
from capmerge.files.source import Identity, reopen
from capmerge.metadata.raw_records import Origin
from capmerge.metadata.survey import Spans

_BYTES_BETWEEN = 1 << 14
"""What is read along between two records, because reading on is faster than reading twice."""


class JoinedFile(NamedTuple):
    """One of the files that are joined, as each process opens it."""

    origin: Origin
    path: Path
    identity: Identity
    spans: Spans


class RecordReader:
    """Reads records of one file by their numbers."""

    def __init__(self, file: JoinedFile) -> None:
        self._spans_of = file.spans
        self._file = SharedFile(partial(reopen, file.path, file.identity))

    def read(
        self, numbers: list[int], most_bytes: int | None
    ) -> tuple[list[int], list[bytes]] | None:
        """The offsets and the bytes of the records of these numbers, which ascend.

        Returns None if they take more than `most_bytes`.
        """
        starts, ends = self._spans(numbers)
        if most_bytes is not None and sum(ends) - sum(starts) > most_bytes:
            return None
        texts: list[bytes] = []
        first = 0
        for number, end in enumerate(ends, 1):
            # Records that are near each other are read at once.
            if number < len(starts) and starts[number] - end <= _BYTES_BETWEEN:
                continue
            place = starts[first]
            data = self._file.window(place, end - place)
            texts += [
                data[one - place : other - place]
                for one, other in zip(starts[first:number], ends[first:number], strict=True)
            ]
            first = number
        return starts, texts

    def _spans(self, numbers: list[int]) -> tuple[list[int], list[int]]:
        spans, first = self._spans_of, numbers[0]
        if numbers[-1] - first < 2 * len(numbers):  # nearly all of them in a row
            run = spans.run(first, numbers[-1] + 1)
            return (
                [run.starts[number - first] for number in numbers],
                [run.ends[number - first] for number in numbers],
            )
        runs = [spans.run(number, number + 1) for number in numbers]
        return [run.starts[0] for run in runs], [run.ends[0] for run in runs]
