"""Files of numpy columns behind a JSON head, written once and memory-mapped by many processes.

This module owns the bytes of such a file: 8 bytes of magic, the length of the head, the head, each
column at a multiple of 64 bytes, and the CRC-32 of the columns. The meaning of the columns belongs
to the readers, who describe what they need as a `Schema`.
"""

import json
import mmap
import os
import reprlib
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from capmerge.errors import BusyError, StaleError, printable
from capmerge.files.atomic import AtomicFile, Buffer

Opened = TypeVar("Opened")

_MAGIC = b"CMCOLS\r\n"
_HEAD_START = len(_MAGIC) + 8
_ALIGNMENT = 64
_LONGEST_HEAD = 1 << 20
_PART_BYTES = 1 << 20
_WAIT_SECONDS = 0.2
_TYPE_NAMES = {str: "a string", int: "a whole number of 0 or more", bool: "true or false"}


class Column(NamedTuple):
    """A column to be written."""

    dtype: np.dtype[Any]
    parts: Iterable[Buffer]
    """Its bytes, in order."""


class Schema(NamedTuple):
    """The head entries and columns that every file of one kind and version has."""

    kind: str
    version: int
    entries: dict[str, type | tuple[str, ...]]
    """The type of each head entry, or the words it may be; an integer must not be negative."""
    columns: dict[str, np.dtype[Any]]
    """The dtype of each column, in the order of the file."""
    optional: tuple[str, ...] = ()
    """Columns that a file has either all of or none of."""


def write_columns(
    file: AtomicFile, about: dict[str, Any], rows: int, columns: dict[str, Column]
) -> None:
    """Write `rows` rows of `columns` into the empty `file`.

    `about` comes back as `Columns.about`; its entries `kind` and `version` tell files apart.
    """
    sizes = [column.dtype.itemsize * rows for column in columns.values()]

    def head_of(start: int) -> bytes:
        places, place = {}, start
        for (name, column), size in zip(columns.items(), sizes, strict=True):
            places[name] = [column.dtype.str, place]
            place = _aligned(place + size)
        layout = {"rows": rows, "file_bytes": place + _ALIGNMENT, "columns": places}
        text = json.dumps({**about, **layout}).encode()
        return _MAGIC + len(text).to_bytes(8, "little") + text

    start = _aligned(len(head_of(1 << 62)))  # longer than with any real offset
    head = head_of(start)
    file.write(head.ljust(start, b"\0"))
    checksum = 0
    for column, size in zip(columns.values(), sizes, strict=True):
        written = file.written_bytes
        for part in column.parts:
            file.write(part)
            checksum = crc32(part, checksum)
        if file.written_bytes - written != size:
            raise AssertionError(f"a column of {size} bytes got {file.written_bytes - written}")
        padding = bytes(_aligned(size) - size)
        file.write(padding)
        checksum = crc32(padding, checksum)
    file.write(_end(checksum))


class Columns:
    """An opened file of columns: its head as `about`, and by name one read-only mapped array each.

    Raises `StaleError` when the file is missing, is of another kind or version than `schema`, or
    has a damaged head: an entry or column that is missing or of another type, or columns that do
    not fill the file as `write_columns` lays them out. With `read_all`, the whole file is read, and
    columns that are not as they were written raise it too. `remedy` ends the message.
    """

    def __init__(self, path: Path, schema: Schema, remedy: str, *, read_all: bool = True) -> None:
        self.path = path
        shown = printable(str(path))
        try:
            with path.open("rb") as file:
                size = os.fstat(file.fileno()).st_size
                self.about, head_end = _parse_head(file.read(_LONGEST_HEAD))
                found = (self.about.get("kind"), self.about.get("version"))
                if found != (schema.kind, schema.version):
                    text = printable(f"{found[0]!r} of version {found[1]!r}")
                    raise StaleError(
                        f"{shown}: found {text}, "
                        f"expected {schema.kind!r} of version {schema.version}. {remedy}"
                    )
                _check_entries(self.about, schema)
                if size != self.about["file_bytes"]:
                    raise StaleError(
                        f"{shown}: found {size:,} bytes, expected {self.about['file_bytes']:,}: "
                        f"the file was cut off or extended. {remedy}"
                    )
                self.rows: int = self.about["rows"]
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
                places = _checked_places(self.about.get("columns"), schema)
                end = size - _ALIGNMENT
                _check_layout(mapped, head_end, end, self.rows, places, schema)
                if read_all:
                    _check_sum(file, min(places.values()), end)
        except FileNotFoundError as error:
            raise StaleError(f"{shown}: no such file. {remedy}") from error
        except OSError as error:
            raise StaleError(
                f"{shown}: the file cannot be read ({error.strerror}). {remedy}"
            ) from error
        # A head that is no JSON raises the first, one that nests too deeply the second.
        except (ValueError, RecursionError) as error:
            raise StaleError(
                f"{shown}: the file is broken: {printable(str(error))}. {remedy}"
            ) from error
        self._columns: dict[str, NDArray[Any]] = {
            # An array of no rows needs no bytes, and there may be none behind the head.
            name: np.frombuffer(mapped, schema.columns[name], self.rows, place)
            if self.rows
            else np.zeros(0, schema.columns[name])
            for name, place in places.items()
        }

    def __contains__(self, name: str) -> bool:
        return name in self._columns

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self._columns[name]


def has_columns(path: Path) -> bool:
    """Return whether a file begins like a file of columns, of any kind and version."""
    try:
        with path.open("rb") as file:
            return file.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def opened_or_made(
    target: Path, look: Callable[[], Opened | None], make: Callable[[AtomicFile], Opened]
) -> Opened:
    """Return what `look` finds or, when it finds None, what `make` makes in the file it is given.

    One process makes it, while others that ask for it wait; when that process dies, the next one
    takes over. Raises `OutputError`, and what `look` and `make` raise.
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


def _parse_head(start: bytes) -> tuple[dict[str, Any], int]:
    """Return the head of a file that begins with these bytes, and the offset behind the head."""
    end = _HEAD_START + int.from_bytes(start[len(_MAGIC) : _HEAD_START], "little")
    if not start.startswith(_MAGIC) or end > len(start):
        raise ValueError("it does not begin like a file that capmerge wrote")
    head = json.loads(start[_HEAD_START:end])
    if type(head) is not dict:
        raise ValueError("its head is no JSON object")
    return head, end


def _check_entries(head: dict[str, Any], schema: Schema) -> None:
    """Raise `ValueError` unless every entry is there with its type, or is one of its words."""
    own = {"version": int, "rows": int, "file_bytes": int}
    for name, expected in {**schema.entries, **own}.items():
        value: Any = head.get(name)
        if isinstance(expected, tuple):
            right, wanted = value in expected, " or ".join(map(repr, expected))
        else:
            # bool is a subclass of int, so isinstance would take true for a number.
            right = type(value) is expected
            if right and expected is int:
                right = value >= 0
            wanted = _TYPE_NAMES[expected]
        if not right:
            raise ValueError(f"found {reprlib.repr(value)} as its {name!r}, expected {wanted}")


def _checked_places(found: Any, schema: Schema) -> dict[str, int]:
    """Return the offset of each column in the file.

    Raises `ValueError` unless the head names the columns of the schema, in their order and with
    their dtypes.
    """
    names = [*found] if isinstance(found, dict) else []
    without = {*schema.optional} if {*schema.optional}.isdisjoint(names) else set()
    expected = [name for name in schema.columns if name not in without]
    if names != expected:
        raise ValueError(f"found the columns {names!r}, expected {expected!r}")
    places = {}
    for name, entry in found.items():
        dtype = schema.columns[name].str
        match entry:
            case [str(written), int(place)] if written == dtype and type(place) is int:
                places[name] = place
            case _:
                raise ValueError(
                    f"found {reprlib.repr(entry)} as its column {name!r}, "
                    f"expected [{dtype!r}, offset]"
                )
    return places


def _end(checksum: int) -> bytes:
    """The last bytes of a file, behind its columns."""
    return checksum.to_bytes(8, "little").ljust(_ALIGNMENT, b"\0")


def _check_sum(file: BinaryIO, start: int, end: int) -> None:
    """Raise `ValueError` unless the columns [start, end) have the checksum that follows them."""
    file.seek(start)
    checksum, left = 0, end - start
    while left and (part := file.read(min(left, _PART_BYTES))):
        checksum, left = crc32(part, checksum), left - len(part)
    if file.read() != _end(checksum):
        raise ValueError("its columns are not as they were written")


def _check_layout(
    mapped: mmap.mmap, head_end: int, last: int, rows: int, places: dict[str, int], schema: Schema
) -> None:
    """Raise `ValueError` unless the columns fill the file as `write_columns` lays them out.

    `last` is the byte at which the last of them must end.

    The padding between them must be zero: where the head says too few rows, or shifts all columns
    alike, padding would begin inside of a column.
    """
    end = head_end
    first = next(iter(places.values()))
    expected = first if first >= head_end else _aligned(head_end)
    for name, place in places.items():
        if place != expected or place % _ALIGNMENT:
            raise ValueError(f"column {name!r} begins at byte {place:,}, expected {expected:,}")
        if mapped[end:place].strip(b"\0"):
            raise ValueError(f"found bytes before column {name!r} that belong to no column")
        end = place + schema.columns[name].itemsize * rows
        expected = _aligned(end)
    if expected != last:
        raise ValueError(
            f"its columns of {rows:,} rows end at byte {expected:,}, expected {last:,}"
        )
    if mapped[end:last].strip(b"\0"):
        raise ValueError("found bytes behind the last column")


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGNMENT) * _ALIGNMENT
