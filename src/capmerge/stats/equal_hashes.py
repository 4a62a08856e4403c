"""Equal ones among many 64-bit hashes, found on disk in bounded memory.

The hashes are divided by their leading bits into scratch files, and each of these is sorted a part
at a time.
"""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from capmerge.files.atomic import ScratchFile

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SHOWN = 5
EXACT = 1 << 14
"""The most different repeated hashes that are handed on for an exact comparison."""
_COMPARED_AT_ONCE = 1 << 17
"""About how many different hashes are compared at once. They take some 70 bytes each."""
_MOST_BITS = 7
_READ_BYTES = 1 << 20


class Compared(NamedTuple):
    """The outcome of comparing hashes."""

    records: int
    """How many hashes occur again further on."""
    firsts: list[int]
    """The places where the first `SHOWN` of those that do occur first."""
    hashes: set[int] | None
    """All different ones of those that do; None for more than `EXACT`."""


class Once(NamedTuple):
    """The different ones of the hashes with the same leading bits, in ascending order."""

    hashes: "NDArray[np.int64]"
    places: "NDArray[np.int64]"
    """The place of the first of equal hashes."""
    lasts: "NDArray[np.int64]"
    """The place of the last of them."""
    counts: "NDArray[np.int64]"
    """How many are equal."""


def each_once(
    parts: Iterable["NDArray[np.int64]"], count: int, beside: Path, most_bits: int = _MOST_BITS
) -> Iterator[Once]:
    """Each different one of `count` hashes, a part of them at a time.

    The place of a hash is its number in `parts`, from 0. Scratch files with 16 bytes per hash are
    in the folder of `beside`, at most 2 to the power of `most_bits` of them. Raises `OutputError`
    when they cannot be written.
    """
    import numpy as np

    bits = min(most_bits, (count // _COMPARED_AT_ONCE).bit_length())
    with ExitStack() as stack:
        files = [stack.enter_context(ScratchFile(beside)) for _ in range(1 << bits)]
        place = 0
        for hashes in parts:
            rows = np.empty((len(hashes), 2), np.int64)
            rows[:, 0] = hashes
            rows[:, 1] = np.arange(place, place + len(hashes))
            place += len(hashes)
            if not bits:
                files[0].write(rows.tobytes())
                continue
            leading = ((hashes >> (64 - bits)) + len(files) // 2).astype(np.uint16)
            rows = rows[np.argsort(leading, kind="stable")]
            starts = np.cumsum(np.bincount(leading, minlength=len(files))).tolist()
            for file, start, end in zip(files, [0, *starts], starts, strict=False):
                file.write(rows[start:end].tobytes())
        for file in files:
            seen = _Seen()
            for data in file.parts(_READ_BYTES):
                read = np.frombuffer(data, np.int64).reshape(-1, 2)
                seen.add(read[:, 0], read[:, 1])
            yield seen.all()


def compare(parts: Iterable[Once]) -> Compared:
    """Count the hashes that occur more than once."""
    import numpy as np

    records, firsts = 0, np.zeros(0, np.int64)
    repeated: set[int] | None = set()
    for once in parts:
        again = np.flatnonzero(once.counts > 1)
        records += int((once.counts[again] - 1).sum())
        firsts = np.sort(np.concatenate((firsts, once.places[again])))[:SHOWN]
        if repeated is not None and len(repeated) + len(again) <= EXACT:
            repeated.update(once.hashes[again].tolist())
        else:
            repeated = None
    return Compared(records, firsts.tolist(), repeated)


class _Seen:
    """The different ones of some hashes, sorted, with the place of the first and their number."""

    def __init__(self) -> None:
        import numpy as np

        self._once = Once(*(np.zeros(0, np.int64) for _ in Once._fields))
        self._new: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
        self._new_count = 0

    def add(self, hashes: "NDArray[np.int64]", places: "NDArray[np.int64]") -> None:
        """Add hashes with their places, which are behind those of all earlier ones."""
        self._new.append((hashes, places))
        self._new_count += len(hashes)
        if self._new_count > max(_COMPARED_AT_ONCE // 2, len(self._once.hashes)):
            self._fold()

    def all(self) -> Once:
        """The different hashes of all that were added."""
        self._fold()
        return self._once

    def _fold(self) -> None:
        """Keep one of equal hashes, the first, and count them."""
        import numpy as np

        hashes = np.concatenate((self._once.hashes, *(hashes for hashes, _ in self._new)))
        new = [places for _, places in self._new]
        places = np.concatenate((self._once.places, *new))
        lasts = np.concatenate((self._once.lasts, *new))
        ones = np.ones(len(hashes) - len(self._once.counts), np.int64)
        counts = np.concatenate((self._once.counts, ones))
        self._new, self._new_count = [], 0
        # The kept ones come first, and a stable sort leaves the earliest of equal hashes in front.
        order = np.argsort(hashes, kind="stable")
        hashes = hashes[order]
        starts = np.flatnonzero(np.concatenate(([True], hashes[1:] != hashes[:-1])))
        starts = starts[: len(hashes)]
        ends = np.concatenate((starts[1:], [len(hashes)]))[: len(starts)]
        self._once = Once(
            hashes[starts],
            places[order[starts]],
            lasts[order[ends - 1]],
            np.add.reduceat(counts[order], starts) if len(starts) else counts,
        )
