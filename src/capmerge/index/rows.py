"""The rows of an index: the worker's side makes them from records, the parent's side collects them.

Repeated keys and the file that the rows end in belong to `build`.
"""

from collections.abc import Callable, Collection, Iterator
from typing import Any
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from capmerge.captions.alternatives import trained_alternatives
from capmerge.captions.fields import MARK, WEIGHTS
from capmerge.captions.size import size_of
from capmerge.captions.written import read_spans
from capmerge.files.atomic import Buffer, ScratchFile
from capmerge.index.latent_names import hash_of, stem_of
from capmerge.index.reader import ROW, TOKEN_COLUMNS
from capmerge.tokens.caption_lengths import TextLengths

_NO_SIZE = (0, 0)
_ROWS_AT_ONCE = 1 << 16


class RowMaker:
    """The maker of rows, which notes the records of a block and then makes their rows together.

    With `tokens` the rows have token lengths. Records that are not `rewritten` have no texts.
    """

    def __init__(self, *, tokens: bool, rewritten: bool = True) -> None:
        self._rewritten = rewritten
        self._lengths = TextLengths() if tokens else None
        self._places: list[tuple[int, int, int]] = []
        self._hashes: list[bytes] = []
        self._leads: list[int] = []
        self._sizes: list[tuple[int, int]] = []
        self._texts: list[str] = []
        self._first_texts: list[int] = []

    def note(self, start: int, data: Buffer, key: str, record: dict[str, Any]) -> None:
        """Note a record whose bytes `data` begin at `start`.

        Raises `BrokenRecordError` when its fields do not agree; the record is then not noted.
        """
        texts = texts_of(record) if self._rewritten else ("",)
        stem, leads = stem_of(key)
        self._places.append((start, len(data), crc32(data)))
        self._hashes.append(hash_of(stem))
        self._leads.append(leads)
        size = size_of(record)
        self._sizes.append(size[:2] if size and size[2] == "train_resolution" else _NO_SIZE)
        if self._lengths:
            self._first_texts.append(len(self._texts))
            self._texts += texts

    def rows(self) -> bytes:
        """Return the rows of all records that were noted since the last call."""
        rows = np.zeros(len(self._places), ROW)
        if self._places:
            places, sizes = np.array(self._places, np.uint64), np.array(self._sizes, np.uint32)
            rows["offset"] = places[:, 0]
            rows["length"] = places[:, 1]
            rows["checksum"] = places[:, 2]
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


def texts_of(record: dict[str, Any]) -> Collection[str]:
    """Return every text that a rewritten record can train, in-line wildcards expanded.

    A record without text gives "" alone. Lines without weights and braces, which nearly all records
    have, are their own texts and take a fast path. Every other record is read by the general rule;
    a test keeps the two equal. Raises `BrokenRecordError` as `read_written` does.
    """
    caption, letters = record.get("caption"), record.get(MARK)
    if (
        caption.__class__ is str
        and letters.__class__ is str
        and WEIGHTS not in record
        and "{" not in caption
        and "}" not in caption
    ):
        if not caption and not letters:
            return ("",)
        lines = caption.split("\n")
        if len(lines) == len(letters) and not letters.strip("tcb"):
            if "b" in letters:
                read_spans(record, letters.count("b"))
            return lines if len(lines) < 3 else set(lines)
    return texts_by_rule(record)


def texts_by_rule(record: dict[str, Any]) -> Collection[str]:
    """Return the texts of a record of any kind by the general rule of `texts_of`."""
    texts: dict[str, Any] = {}
    for alternative in trained_alternatives(record):
        texts |= alternative.texts
    return texts or ("",)


class RowSink:
    """The sink of the rows of all blocks, which writes them to `file`.

    `block_start` is called at the beginning of each block and returns what to add to the offsets of
    its rows; without it they are offsets in the whole file already.
    """

    def __init__(self, file: ScratchFile, block_start: Callable[[], int] | None = None) -> None:
        self._file, self._block_start = file, block_start
        self._rest = b""
        self._start = 0
        self.count = 0
        """The number of all rows so far."""

    def write(self, data: bytes | memoryview, *, new_block: bool) -> None:
        """Append rows; the last one may be cut, and the next call brings the rest of it."""
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
        """Return an iterator over all rows in arrays of at most `_ROWS_AT_ONCE` rows."""
        return (np.frombuffer(part, ROW) for part in self._file.parts(_ROWS_AT_ONCE * ROW.itemsize))

    def column(self, name: str) -> NDArray[Any]:
        """Return one column of all rows, in memory."""
        column = np.empty(self.count, ROW[name])
        done = 0
        for rows in self.parts():
            column[done : done + len(rows)] = rows[name]
            done += len(rows)
        return column
