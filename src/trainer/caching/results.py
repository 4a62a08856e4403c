"""What became of each picture: written by each rank for itself, and read in the order of records.

A rank appends to its own file in a hidden folder beside the latents, so that neither memory nor a
message between ranks grows with the data. A line is `[number, width, height, bucket width, bucket
height, is new, is turned]` for a picture with latents, and `[number, key, reason]` for one without.
"""

import json
import shutil
from collections.abc import Iterable, Iterator
from heapq import merge
from pathlib import Path
from typing import NamedTuple

from trainer.caching.buckets import SidesWH

_FOLDER = ".trainer-cache"


class Cached(NamedTuple):
    """A picture that has latents."""

    number: int
    """The number of its item."""
    original: SidesWH
    bucket: SidesWH
    is_new: bool
    """True if this run made them."""
    is_turned: bool
    """True if EXIF data say that the picture is shown in another orientation."""


class Skipped(NamedTuple):
    """A picture that has none."""

    number: int
    """The number of its item."""
    key: str
    reason: str


Result = Cached | Skipped


class Results:
    """The results of all ranks of a run, for one folder of latents."""

    def __init__(self, output: Path) -> None:
        self._folder = output / _FOLDER

    def begin(self) -> None:
        """Make the folder, without what a killed run left in it; on one rank alone."""
        self.remove()
        self._folder.mkdir()

    def remove(self) -> None:
        """Remove the folder; on one rank alone."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def add(self, rank: int, results: Iterable[Result]) -> None:
        """Append results of a rank, which are in ascending order over all calls."""
        lines = []
        for one in results:
            line = (
                [one.number, *one.original, *one.bucket, one.is_new, one.is_turned]
                if isinstance(one, Cached)
                else list(one)
            )
            lines.append(json.dumps(line) + "\n")
        with (self._folder / f"rank-{rank}").open("a", encoding="ascii") as file:
            file.writelines(lines)

    def read(self) -> Iterator[Result]:
        """The results of all ranks, in ascending order; a few kilobytes of them are in memory."""
        files = sorted(self._folder.iterdir())
        yield from merge(*map(_read, files), key=lambda result: result.number)


def _read(path: Path) -> Iterator[Result]:
    with path.open(encoding="ascii") as file:
        for line in file:
            number, *rest = json.loads(line)
            if len(rest) == 2:
                yield Skipped(number, *rest)
            else:
                width, height, bucket_width, bucket_height, is_new, is_turned = rest
                yield Cached(
                    number, (width, height), (bucket_width, bucket_height), is_new, is_turned
                )
