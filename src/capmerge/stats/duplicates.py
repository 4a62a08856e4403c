"""Captions that stand in a file more than once, found by their 64-bit hashes in bounded memory.

The hashes come in the order of the records, eight bytes each: 96 MB for 12 million. They are sorted
a sixteenth at a time, so the whole peaks at 17 bytes a record. Where a group's first caption stands
is told by its number, and read again from the source only for the groups that are shown.
"""

import struct
from bisect import bisect_right
from typing import Any, NamedTuple

LARGEST_GROUPS = 20
_PARTS = 16
_PIECE = struct.Struct("<QQQ")


class RecordPlace(NamedTuple):
    """Where a counted record lies: the bytes [start, end) of a piece, whether those end the source, its number there."""

    start: int
    end: int
    last: bool
    number: int


class Groups(NamedTuple):
    """Exact duplicates among whole captions."""

    captions: int
    distinct: int
    in_groups: int
    """Captions that have at least one duplicate."""
    largest: list[tuple[int, int]]
    """How many captions, and the number of the first record with it; largest first, then first first."""


class RecordHashes:
    """The sink of the records' caption hashes."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def write(self, data: bytes | memoryview, *, new_block: bool) -> None:  # noqa: ARG002  # a sink
        """Append hashes."""
        self._bytes += data

    def groups(self) -> Groups:
        """The duplicates among all hashes so far."""
        import numpy as np

        every = np.frombuffer(self._bytes, "<u8")
        last_bytes = np.frombuffer(self._bytes, np.uint8)[7::8]  # the most significant ones
        captions = distinct = in_groups = 0
        largest: list[tuple[int, int]] = []  # of those seen so far: - size, hash
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
            chosen = again[
                np.argsort(-sizes[again], kind="stable")[:LARGEST_GROUPS]
            ]  # of equal ones those of the lowest hashes
            negative, hashes = -sizes[chosen], ordered[starts[chosen]]
            largest = sorted([*largest, *zip(negative.tolist(), hashes.tolist(), strict=True)])[
                :LARGEST_GROUPS
            ]
        found = [(-negative, int(np.argmax(every == number))) for negative, number in largest]
        return Groups(
            captions, distinct, in_groups, sorted(found, key=lambda group: (-group[0], group[1]))
        )


class RecordPlaces:
    """The sink of the pieces' places, by which a record is found again by its number."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    @staticmethod
    def entry(start: int, size: int, records: int, *, last: bool) -> bytes:
        """What a piece of `size` bytes with this many counted records writes to the sink."""
        return _PIECE.pack(start, size, records << 1 | last)

    def write(self, data: bytes | memoryview, *, new_block: bool) -> None:  # noqa: ARG002  # a sink
        """Append entries."""
        self._bytes += data

    def places(self, numbers: list[int]) -> list[RecordPlace]:
        """Where the records with these numbers lie."""
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
    """The figures of duplicates; `firsts` are key and caption of each largest group's first record, None if unreadable."""
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
