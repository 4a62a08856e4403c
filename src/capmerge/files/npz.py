"""Reading the arrays of an `.npz` file, which is a zip of npy files.

Files of `numpy.savez`, which are uncompressed with one member per array, are read directly: in
85 us against `numpy.load`'s 235 us for the three arrays of a 1024 px picture (256 KiB; one core,
from the page cache), checksums included. Every other layout, and every damaged file, goes through
`numpy.load(allow_pickle=False)`, which also raises every error.
"""

import math
import struct
import tokenize
import zipfile
import zlib
from contextlib import ExitStack
from functools import lru_cache
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, NamedTuple, Self, cast

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

from capmerge.files.openable import BinaryFile, Openable, open_file

if TYPE_CHECKING:
    from collections.abc import Collection

READ_ERRORS = (
    OSError,
    EOFError,
    ValueError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)
"""The errors of numpy and zipfile for a file that is unreadable, damaged or holds objects."""

# The errors of numpy for an npy header that is no Python literal of the right kind.
_HEADER_ERRORS = (SyntaxError, tokenize.TokenError, TypeError, RecursionError)

# The records of a zip file: the end of the central directory without a comment, one entry of the
# directory, and the local header of a member.
_END = struct.Struct("<4s4H2LH")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_NPY_1 = b"\x93NUMPY\x01\x00"
_HEADER_READERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}
# The local header, the name and the npy header of a member of numpy take some 200 bytes.
_HEADER_BYTES = 1024
_TAIL_BYTES = 4096
_ZIP64 = 0xFFFFFFFF


class _Member(NamedTuple):
    start: int
    """The offset of its local header."""
    end: int
    """The offset where the next member may begin."""
    size: int
    crc: int


class Npz:
    """An open `.npz` file: the names of its arrays, and by name each array.

    Raises one of `READ_ERRORS` when the file cannot be read, as `numpy.load` does.
    """

    def __init__(self, place: Path | Openable) -> None:
        self._slow: np.lib.npyio.NpzFile | None = None
        with ExitStack() as closing:
            self._file = open_file(place)
            closing.callback(self._file.close)
            self._members = _members(self._file)
            self.names: Collection[str] = (
                self._through_numpy().files if self._members is None else self._members.keys()
            )
            self._closing = closing.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.close()

    @property
    def read_by_numpy(self) -> bool:
        """True if numpy.load has read anything of the file, since it has an unusual layout."""
        return self._slow is not None

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        """Return a fresh copy of the array of this name.

        Raises `KeyError` when there is none, and one of `READ_ERRORS` when it cannot be read.
        """
        try:
            array = None if self._members is None else _read(self._file, name, self._members[name])
            return self._through_numpy()[name] if array is None else array
        except _HEADER_ERRORS as error:
            raise ValueError(f'the header of "{name}" is damaged') from error
        except MemoryError as error:
            raise ValueError(f'"{name}" claims more bytes than there is memory') from error

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
        """Return the shape and the type of the array of this name; its values are not read.

        Raises what reading the array raises, except for damage behind its header.
        """
        try:
            return self._header(name)
        except _HEADER_ERRORS as error:
            raise ValueError(f'the header of "{name}" is damaged') from error

    def _header(self, name: str) -> tuple[tuple[int, ...], np.dtype[np.generic]]:
        found = (
            None if self._members is None else _read_header(self._file, name, self._members[name])
        )
        if found is not None:
            return found
        zipped = self._through_numpy().zip
        assert zipped is not None  # numpy sets it to None when the file is closed
        with zipped.open(name if name in zipped.namelist() else f"{name}.npy") as member:
            version = npy.read_magic(member)
            if version not in _HEADER_READERS:
                raise ValueError(f"an npy header of version {version}")
            shape, _, dtype = _HEADER_READERS[version](member)
        return shape, dtype

    def _through_numpy(self) -> np.lib.npyio.NpzFile:
        if self._slow is None:
            self._file.seek(0)
            if self._file.read(2) != b"PK":
                raise zipfile.BadZipFile("not a zip of arrays")  # numpy would try to unpickle it
            self._file.seek(0)
            self._slow = np.load(cast("IO[bytes]", self._file), allow_pickle=False)
        return self._slow


def _members(file: BinaryFile) -> dict[str, _Member] | None:
    """Return the members by array name, in order.

    Returns None if the zip is not laid out as `numpy.savez` writes it.
    """
    # Read the end of the file, which holds the central directory and its end record.
    size = file.seek(0, 2)
    tail_start = file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES) or b""
    if len(tail) < _END.size:
        return None
    signature, disk, _, _, count, directory_bytes, directory, comment = _END.unpack_from(
        tail, len(tail) - _END.size
    )
    place = directory - tail_start
    if (
        signature != b"PK\5\6"
        or disk
        or comment
        or place < 0
        or directory + directory_bytes + _END.size != size
    ):
        return None

    # Walk the directory's entries.
    members: dict[str, _Member] = {}
    starts: list[int] = []
    found: list[tuple[str, int, int]] = []
    for _ in range(count):
        if place + _ENTRY.size > len(tail):
            return None
        entry = _ENTRY.unpack_from(tail, place)
        signature, flags, method, crc, packed, unpacked = (
            entry[0],
            entry[3],
            entry[4],
            entry[7],
            entry[8],
            entry[9],
        )
        name_bytes, extra_bytes, comment_bytes, start = entry[10], entry[11], entry[12], entry[16]
        encoded = tail[place + _ENTRY.size : place + _ENTRY.size + name_bytes]
        place += _ENTRY.size + name_bytes + extra_bytes + comment_bytes
        plain = (
            signature == b"PK\1\2"
            and not flags
            and not method
            and packed == unpacked < _ZIP64
            and start < _ZIP64
        )
        if not plain or not encoded.endswith(b".npy") or not encoded.isascii():
            return None
        starts.append(start)
        found.append((encoded[:-4].decode("ascii"), unpacked, crc))

    # A member must have room for its array before the next one begins.
    ends = [*starts, directory][1:]
    for (name, unpacked, crc), start, end in zip(found, starts, ends, strict=True):
        if name in members or end - start < _LOCAL.size + unpacked:
            return None
        members[name] = _Member(start, end, unpacked, crc)
    return members


def _read_header(
    file: BinaryFile, name: str, member: _Member
) -> tuple[tuple[int, ...], np.dtype[np.generic]] | None:
    """Return shape and type of a member; None if its head is not a plain one."""
    file.seek(member.start)
    head = file.read(min(member.end - member.start, _HEADER_BYTES)) or b""
    if len(head) < _LOCAL.size:
        return None
    local = _LOCAL.unpack_from(head)
    start = _LOCAL.size + local[9] + local[10]
    if (
        local[0] != b"PK\3\4"
        or head[_LOCAL.size : _LOCAL.size + local[9]] != f"{name}.npy".encode()
    ):
        return None
    if head[start : start + 8] != _NPY_1 or len(head) < start + 10:
        return None
    end = start + 10 + int.from_bytes(head[start + 8 : start + 10], "little")
    if len(head) < end:
        return None
    shape, _, dtype = _parse_header(head[start + 8 : end])
    return shape, dtype


def _read(file: BinaryFile, name: str, member: _Member) -> NDArray[np.generic] | None:
    """Return the array of one member; None if it is damaged, or no plain array in C order."""
    buffer = np.empty(member.end - member.start, np.uint8)
    file.seek(member.start)
    if file.readinto(buffer.data) != len(buffer):
        return None
    local = _LOCAL.unpack_from(buffer.data)
    start = _LOCAL.size + local[9] + local[10]
    stored = buffer[start : start + member.size]
    if local[0] != b"PK\3\4" or buffer[
        _LOCAL.size : _LOCAL.size + local[9]
    ].tobytes() != f"{name}.npy".encode("ascii"):
        return None
    if (
        len(stored) != member.size
        or zlib.crc32(stored.data) != member.crc
        or stored[:8].tobytes() != _NPY_1
    ):
        return None
    header_end = 10 + int(stored[8]) + (int(stored[9]) << 8)
    shape, in_c_order, dtype = _parse_header(stored[8:header_end].tobytes())
    values = stored[header_end:]
    if not in_c_order or dtype.hasobject or len(values) != dtype.itemsize * math.prod(shape):
        return None
    return values.view(dtype).reshape(shape)


@lru_cache(256)
def _parse_header(header: bytes) -> tuple[tuple[int, ...], bool, np.dtype[np.generic]]:
    """Return shape, C order and dtype from an npy header of version 1.0 without its magic.

    The files of a data set have few different headers, so they are cached.
    """
    shape, in_fortran_order, dtype = npy.read_array_header_1_0(BytesIO(header))
    return shape, not in_fortran_order, dtype
