"""Captions that a file holds more than once, found by their 64-bit hashes in bounded memory.

The hashes come in the order of the records, eight bytes each: 96 MB for 12 million. They are sorted
a sixteenth at a time, so memory peaks at 17 bytes per record. The number of a record says where it
lies in the source; the first caption of a group is read again only for the groups that are shown.
"""

import struct
from bisect import bisect_right
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterable

    from capmerge.stats.equal_hashes import Once

LARGEST_GROUPS = 20
_PARTS = 16
_PIECE = struct.Struct("<QQQ")


class RecordPlace(NamedTuple):
    """The position of a counted record in the source: a piece and the record's number in it."""

    start: int
    """The first byte of the piece."""
    end: int
    """The byte after the piece."""
    last: bool
    """True when the piece ends the source."""
    number: int
    """The number of the record in the piece, from 0."""


class Groups(NamedTuple):
    """The exact duplicates among whole captions."""

    captions: int
    distinct: int
    in_groups: int
    """The number of captions that have at least one duplicate."""
    largest: list[tuple[int, int]]
    """Each group's size and the number of its first record; largest first, ties to the earlier."""


def groups_of(parts: "Iterable[Once]") -> Groups:
    """Return the duplicates among hashes that are compared on disk, as `RecordHashes` does it."""
    import numpy as np

    captions = distinct = in_groups = 0
    largest: list[tuple[int, int, int]] = []  # (-size, hash, first number) of the groups so far
    for once in parts:
        hashes = once.hashes.view(np.uint64)
        held = hashes != 0
        again = np.flatnonzero(held & (once.counts > 1))
        captions += int(once.counts[held].sum())
        distinct += int(np.count_nonzero(held))
        in_groups += int(once.counts[again].sum())
        order = np.lexsort((hashes[again], -once.counts[again]))
        chosen = again[order[:LARGEST_GROUPS]]
        columns = (-once.counts[chosen], hashes[chosen], once.places[chosen])
        found = zip(*(column.tolist() for column in columns), strict=True)
        largest = sorted([*largest, *found])[:LARGEST_GROUPS]
    shown = sorted((negative, number) for negative, _, number in largest)
    sized = [(-negative, number) for negative, number in shown]
    return Groups(captions, distinct, in_groups, sized)


class RecordHashes:
    """The sink for the caption hashes of the records."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def write(self, data: bytes | memoryview, *, new_block: bool) -> None:  # noqa: ARG002  # a sink
        """Append hashes."""
        self._bytes += data

    def taken(self) -> bytes:
        """All hashes so far."""
        return bytes(self._bytes)

    def groups(self) -> Groups:
        """Return the duplicates among all hashes so far.

        Hashes are sorted one part at a time, where a part holds those with the same leading bits;
        in a sorted part equal hashes are neighbours. A hash of 0 means no caption and is left out.
        """
        import numpy as np

        every = np.frombuffer(self._bytes, "<u8")
        last_bytes = np.frombuffer(self._bytes, np.uint8)[7::8]  # the most significant ones
        captions = distinct = in_groups = 0
        largest: list[tuple[int, int]] = []  # (-size, hash) of the groups so far
        for part in range(_PARTS):
            ordered = every[last_bytes // (256 // _PARTS) == part]
            ordered.sort()
            ordered = ordered[np.searchsorted(ordered, np.uint64(1)) :]
            if not len(ordered):
                continue
            starts = np.concatenate(([0], np.flatnonzero(ordered[1:] != ordered[:-1]) + 1))
            sizes = np.diff(starts, append=len(ordered))
            again = np.flatnonzero(sizes > 1)
            captions += len(ordered)
            distinct += len(starts)
            in_groups += int(sizes[again].sum())
            # Among groups of equal size those of the lowest hashes are kept.
            chosen = again[np.argsort(-sizes[again], kind="stable")[:LARGEST_GROUPS]]
            negative, hashes = -sizes[chosen], ordered[starts[chosen]]
            largest = sorted([*largest, *zip(negative.tolist(), hashes.tolist(), strict=True)])[
                :LARGEST_GROUPS
            ]
        found = [(-negative, int(np.argmax(every == number))) for negative, number in largest]
        return Groups(
            captions, distinct, in_groups, sorted(found, key=lambda group: (-group[0], group[1]))
        )


class RecordPlaces:
    """The sink for the positions of pieces; with them a record is found again by its number."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    @staticmethod
    def entry(start: int, size: int, records: int, *, last: bool) -> bytes:
        """Return the entry of a piece of `size` bytes with this many counted records."""
        return _PIECE.pack(start, size, records << 1 | last)

    def write(self, data: bytes | memoryview, *, new_block: bool) -> None:  # noqa: ARG002  # a sink
        """Append entries."""
        self._bytes += data

    def places(self, numbers: list[int]) -> list[RecordPlace]:
        """Return the positions of the records with these numbers."""
        pieces = list(_PIECE.iter_unpack(self._bytes))
        firsts, before = [], 0
        for _, _, packed in pieces:
            firsts.append(before)
            before += packed >> 1
        found = []
        for number in numbers:
            i = bisect_right(firsts, number) - 1
            start, size, packed = pieces[i]
            found.append(RecordPlace(start, start + size, bool(packed & 1), number - firsts[i]))
        return found


def as_json(groups: Groups, firsts: list[tuple[str, str] | None]) -> dict[str, Any]:
    """Return the figures of duplicates for the document.

    `firsts` are the key and the caption of the first record in each of the largest groups, or None
    where it cannot be read.
    """
    return {
        "captions": groups.captions,
        "distinct": groups.distinct,
        "duplicated": groups.in_groups,
        "share": groups.in_groups / groups.captions if groups.captions else 0.0,
        "largest": [
            {
                "captions": size,
                "record": number,
                "key": first and first[0],
                "caption": first and first[1],
            }
            for (size, number), first in zip(groups.largest, firsts, strict=True)
        ],
    }
