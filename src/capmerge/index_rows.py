"""Records -> rows of the index: what a worker notes of each record, and the sink that the rows stream into.

Knows nothing of blocks, of repeated keys, or of the file that the rows end in.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capmerge.index import ROW
from capmerge.marks import MARK
from capmerge.output import ScratchFile
from capmerge.stems import hash_of, stem_of

_MOST_PX = (1 << 32) - 1
_ROWS_AT_ONCE = 1 << 16


class RowMaker:
    """Notes rewritten records and makes their rows, those of a block together."""

    def __init__(self) -> None:
        self._places: list[tuple[int, int]] = []
        self._hashes: list[bytes] = []
        self._leads: list[int] = []
        self._sizes: list[tuple[int, int]] = []

    def note(self, start: int, end: int, key: str, record: dict[str, Any]) -> None:
        """Note a record whose bytes are [start, end)."""
        self._places.append((start, end))
        stem, leads = stem_of(key)
        self._hashes.append(hash_of(stem))
        self._leads.append(leads)
        self._sizes.append(size_of(record))

    def rows(self) -> bytes:
        """The rows of all that was noted since the last call."""
        rows = np.zeros(len(self._places), ROW)
        if self._places:
            places, sizes = np.array(self._places, np.uint64), np.array(self._sizes, np.uint32)
            rows["offset"] = places[:, 0]
            rows["length"] = places[:, 1] - places[:, 0]
            rows["stem_hash"] = np.frombuffer(b"".join(self._hashes), "<u8")
            rows["width"], rows["height"] = sizes[:, 0], sizes[:, 1]
            rows["leads"] = self._leads
            for noted in (self._places, self._hashes, self._leads, self._sizes):
                noted.clear()
        return rows.tobytes()


def is_rewritten(record: Any) -> bool:
    """Whether a rewrite wrote this record."""
    return record.__class__ is dict and MARK in record


def size_of(record: dict[str, Any]) -> tuple[int, int]:
    """Width and height in px of `train_resolution`, else of `image_size`; (0, 0) where neither is two whole numbers above 0."""
    for name in ("train_resolution", "image_size"):
        size = record.get(name)
        if size.__class__ is list and len(size) == 2:
            width, height = size
            if width.__class__ is int and height.__class__ is int and 0 < width <= _MOST_PX and 0 < height <= _MOST_PX:
                return width, height
    return 0, 0


class RowSink:
    """The sink of the rows of all blocks: `file`. `block_start` tells what is added to the offsets of a block's rows."""

    def __init__(self, file: ScratchFile, block_start: Callable[[], int]) -> None:
        self._file, self._block_start = file, block_start
        self._rest = b""
        self._start = 0
        self.count = 0
        """Of all rows."""

    def write(self, data: bytes | memoryview, *, new_block: bool) -> None:
        """Append rows, of which the last may be cut."""
        if new_block:
            self._start = self._block_start()
        data = self._rest + bytes(data)
        whole = len(data) // ROW.itemsize
        rows = np.frombuffer(data, ROW, whole).copy()
        rows["offset"] += np.uint64(self._start)
        self._file.write(rows.tobytes())
        self.count += whole
        self._rest = data[whole * ROW.itemsize :]

    def parts(self) -> Iterator[NDArray[Any]]:
        """All rows, some at a time."""
        return (np.frombuffer(part, ROW) for part in self._file.parts(_ROWS_AT_ONCE * ROW.itemsize))

    def column(self, name: str) -> NDArray[Any]:
        """One column of all rows, in memory."""
        column = np.empty(self.count, ROW[name])
        done = 0
        for rows in self.parts():
            column[done : done + len(rows)] = rows[name]
            done += len(rows)
        return column
