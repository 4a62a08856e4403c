"""A file of numpy columns behind a head of JSON: written once, then memory-mapped by any number of processes.

Owns the bytes of such a file: 8 bytes of magic, the length of the head, the head, and each column
at a multiple of 64 bytes. Knows nothing of what the columns mean.
"""

import json
import mmap
import os
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from capmerge.errors import BusyError, StaleError, printable
from capmerge.files.atomic import AtomicFile, Buffer

Opened = TypeVar("Opened")

_MAGIC = b"CMCOLS\r\n"
_ALIGNMENT = 64
_LONGEST_HEAD = 1 << 20
_WAIT_SECONDS = 0.2


class Column(NamedTuple):
    """A column to be written."""

    dtype: np.dtype[Any]
    parts: Iterable[Buffer]
    """Its bytes, in order."""


def write_columns(
    file: AtomicFile, about: dict[str, Any], rows: int, columns: dict[str, Column]
) -> None:
    """Write `rows` rows of `columns` into the empty `file`; `about` is what `Columns.about` gives back, and tells files apart."""
    sizes = [column.dtype.itemsize * rows for column in columns.values()]

    def head_of(start: int) -> bytes:
        places, place = {}, start
        for (name, column), size in zip(columns.items(), sizes, strict=True):
            places[name] = [column.dtype.str, place]
            place = _aligned(place + size)
        text = json.dumps({**about, "rows": rows, "file_bytes": place, "columns": places}).encode()
        return _MAGIC + len(text).to_bytes(8, "little") + text

    start = _aligned(len(head_of(1 << 62)))  # longer than with any real place
    head = head_of(start)
    file.write(head.ljust(start, b"\0"))
    for column, size in zip(columns.values(), sizes, strict=True):
        written = file.written_bytes
        for part in column.parts:
            file.write(part)
        if file.written_bytes - written != size:
            raise AssertionError(f"a column of {size} bytes got {file.written_bytes - written}")
        file.write(bytes(_aligned(size) - size))


class Columns:
    """An opened file of columns: `about`, and by name one read-only array a column, mapped from the file.

    Raises `StaleError` when the file is missing, broken, or not of this `kind` and `version`;
    `remedy` ends its message.
    """

    def __init__(self, path: Path, kind: str, version: int, remedy: str) -> None:
        self.path = path
        shown = printable(str(path))
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.about = self._head(file.read(_LONGEST_HEAD))
                if self.about.get("kind") != kind or self.about.get("version") != version:
                    found = f"{self.about.get('kind')!r} of version {self.about.get('version')!r}"
                    raise StaleError(
                        f"{shown}: found {printable(found)}, expected {kind!r} of version {version}. {remedy}"
                    )
                if size != self.about["file_bytes"]:
                    raise StaleError(
                        f"{shown}: found {size:,} bytes, expected {self.about['file_bytes']:,}: it is cut off. {remedy}"
                    )
                self.rows: int = self.about["rows"]
                self._columns = self._mapped(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        except FileNotFoundError as error:
            raise StaleError(f"{shown}: no such file. {remedy}") from error
        except OSError as error:
            raise StaleError(
                f"{shown}: the file cannot be read ({error.strerror}). {remedy}"
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise StaleError(
                f"{shown}: the file is broken ({printable(str(error))}). {remedy}"
            ) from error

    @staticmethod
    def _head(start: bytes) -> dict[str, Any]:
        length = int.from_bytes(start[8:16], "little")
        if start[:8] != _MAGIC or 16 + length > len(start):
            raise ValueError("it does not begin as one that capmerge wrote")
        head: dict[str, Any] = json.loads(start[16 : 16 + length])
        return head

    def _mapped(self, mapped: mmap.mmap) -> dict[str, NDArray[Any]]:
        columns = self.about["columns"].items()
        # An array of no rows needs no bytes, which may not be there.
        return {
            name: np.frombuffer(mapped, dtype, self.rows, place)
            if self.rows
            else np.zeros(0, dtype)
            for name, (dtype, place) in columns
        }

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._columns[name]


def parts_of(column: NDArray[Any], rows: int = 1 << 18) -> Iterator[bytes]:
    """The bytes of an array, piece by piece."""
    for start in range(0, len(column), rows):
        yield column[start : start + rows].tobytes()


def opened_or_made(
    target: Path, look: Callable[[], Opened | None], make: Callable[[AtomicFile], Opened]
) -> Opened:
    """What `look` finds, or else what `make` makes in the file it is given; by one process, while others that ask for it wait.

    A process that dies at it leaves its place to the next. Raises `OutputError`, and what `look`
    and `make` raise.
    """
    while True:
        if (found := look()) is not None:
            return found
        try:
            file = AtomicFile(target)
        except BusyError:
            time.sleep(_WAIT_SECONDS)
            continue
        with file:
            found = look()  # another process may have made it between the look and the lock
            return make(file) if found is None else found


def _aligned(place: int) -> int:
    return -(-place // _ALIGNMENT) * _ALIGNMENT
