"""Records -> rows of the index: what a worker notes of each record, and the sink that the rows stream into.

Knows nothing of blocks, of repeated keys, or of the file that the rows end in.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capmerge.captions.alternatives import trained_alternatives
from capmerge.captions.fields import MARK, WEIGHTS
from capmerge.files.atomic import ScratchFile
from capmerge.index.latent_names import hash_of, stem_of
from capmerge.index.reader import ROW, TOKEN_COLUMNS
from capmerge.tokens.caption_lengths import TextLengths

_MOST_PX = (1 << 32) - 1
_ROWS_AT_ONCE = 1 << 16


class RowMaker:
    """Notes rewritten records and makes their rows, those of a block together; with token lengths if `tokens`."""

    def __init__(self, *, tokens: bool) -> None:
        self._lengths = TextLengths() if tokens else None
        self._places: list[tuple[int, int]] = []
        self._hashes: list[bytes] = []
        self._leads: list[int] = []
        self._sizes: list[tuple[int, int]] = []
        self._texts: list[str] = []
        self._first_texts: list[int] = []

    def note(self, start: int, end: int, key: str, record: dict[str, Any]) -> None:
        """Note a record whose bytes are [start, end).

        Raises `BrokenRecordError` when its fields do not belong together; then it is not noted.
        """
        texts = _texts_of(record)
        stem, leads = stem_of(key)
        self._places.append((start, end))
        self._hashes.append(hash_of(stem))
        self._leads.append(leads)
        self._sizes.append(size_of(record))
        if self._lengths:
            self._first_texts.append(len(self._texts))
            self._texts += texts

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
            if self._lengths:
                longest = np.maximum.reduceat(self._lengths.count(self._texts), self._first_texts)
                for column, name in enumerate(TOKEN_COLUMNS):
                    rows[name] = longest[:, column]
            for noted in (
                self._places,
                self._hashes,
                self._leads,
                self._sizes,
                self._texts,
                self._first_texts,
            ):
                noted.clear()
        return rows.tobytes()


def _texts_of(record: dict[str, Any]) -> Collection[str]:
    """Every text that can be trained for a rewritten record, in-line wildcards expanded; "" for an empty caption."""
    caption, letters = record.get("caption"), record[MARK]
    if (
        caption.__class__ is str
        and letters.__class__ is str
        and WEIGHTS not in record
        and "{" not in caption
        and "}" not in caption
    ):
        lines = caption.split("\n")
        if len(lines) == len(letters) and not letters.strip("tcb"):
            return lines if len(lines) < 3 else set(lines)
    texts: dict[str, Any] = {}
    for alternative in trained_alternatives(record):
        texts |= alternative.texts
    return texts or ("",)


def is_rewritten(record: Any) -> bool:
    """Whether a rewrite wrote this record."""
    return record.__class__ is dict and MARK in record


def size_of(record: dict[str, Any]) -> tuple[int, int]:
    """Width and height in px of `train_resolution`, else of `image_size`; (0, 0) where neither is two whole numbers above 0."""
    for name in ("train_resolution", "image_size"):
        size = record.get(name)
        if size.__class__ is list and len(size) == 2:
            width, height = size
            if (
                width.__class__ is int
                and height.__class__ is int
                and 0 < width <= _MOST_PX
                and 0 < height <= _MOST_PX
            ):
                return width, height
    return 0, 0


class RowSink:
    """The sink of the rows of all blocks, which writes them to `file`.

    `block_start` tells at the beginning of a block what is to be added to the offsets of its rows;
    without it, they are offsets in the whole file already.
    """

    def __init__(self, file: ScratchFile, block_start: Callable[[], int] | None = None) -> None:
        self._file, self._block_start = file, block_start
        self._rest = b""
        self._start = 0
        self.count = 0
        """Of all rows."""

    def write(self, data: bytes | memoryview, *, new_block: bool) -> None:
        """Append rows, of which the last may be cut."""
        if new_block and self._block_start:
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
