"""The arrays of an `.npz` file. Knows the zip and npy formats, nothing of latents.

Files of `numpy.savez` - stored, one member an array - are read directly: 85 us against
`numpy.load`'s 235 for the three arrays of a 1024 px picture (256 KiB; one core, from the page
cache), checksums included. Whatever is not laid out exactly so, damaged files too, goes through
`numpy.load(allow_pickle=False)`, which is also where every error comes from.
"""

import math
import os
import stat
import struct
import zipfile
import zlib
from contextlib import ExitStack
from functools import lru_cache
from io import BytesIO, FileIO
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Self

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray

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
"""What numpy and zipfile raise for a file that cannot be read, is damaged or holds objects."""

_END = struct.Struct("<4s4H2LH")  # of the central directory; no comment behind it
_ENTRY = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_NPY_1 = b"\x93NUMPY\x01\x00"
_TAIL_BYTES = 4096
_ZIP64 = 0xFFFFFFFF


class _Member(NamedTuple):
    start: int
    """Of its local header."""
    end: int
    """Where the next one may begin."""
    size: int
    crc: int


class Npz:
    """An open `.npz` file: its names, and the array of each.

    Raises one of `READ_ERRORS` for what cannot be read, as `numpy.load` does.
    """

    def __init__(self, path: Path) -> None:
        self._slow: np.lib.npyio.NpzFile | None = None
        with ExitStack() as closing:
            self._file = closing.enter_context(FileIO(path, opener=_open_at_once))
            if not stat.S_ISREG(os.fstat(self._file.fileno()).st_mode):
                raise ValueError("not a regular file")
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

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        """The array of a name, a fresh one each time. Raises as the class does, `KeyError` when there is none."""
        array = None if self._members is None else _read(self._file, name, self._members[name])
        return self._through_numpy()[name] if array is None else array

    def _through_numpy(self) -> np.lib.npyio.NpzFile:
        if self._slow is None:
            self._file.seek(0)
            if self._file.read(2) != b"PK":
                raise zipfile.BadZipFile("not a zip of arrays")  # numpy would take it for a pickle
            self._file.seek(0)
            self._slow = np.load(self._file, allow_pickle=False)
        return self._slow


def _open_at_once(path: str, flags: int) -> int:
    """A descriptor of the file; a named pipe without a writer would be waited for otherwise."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _members(file: FileIO) -> dict[str, _Member] | None:
    """The members by array name, in their order; None when the zip is not as `numpy.savez` writes it."""
    size = file.seek(0, 2)
    tail_start = file.seek(max(0, size - _TAIL_BYTES))
    tail = file.read(_TAIL_BYTES)
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
        name = tail[place + _ENTRY.size : place + _ENTRY.size + name_bytes]
        place += _ENTRY.size + name_bytes + extra_bytes + comment_bytes
        plain = (
            signature == b"PK\1\2"
            and not flags
            and not method
            and packed == unpacked < _ZIP64
            and start < _ZIP64
        )
        if not plain or not name.endswith(b".npy") or not name.isascii():
            return None
        starts.append(start)
        found.append((name[:-4].decode("ascii"), unpacked, crc))
    ends = [*starts, directory][1:]
    for (name, unpacked, crc), start, end in zip(found, starts, ends, strict=True):
        if name in members or end - start < _LOCAL.size + unpacked:
            return None
        members[name] = _Member(start, end, unpacked, crc)
    return members


def _read(file: FileIO, name: str, member: _Member) -> NDArray[np.generic] | None:
    """The array of one member; None when it is not whole, or no plain array in C order."""
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
    """Shape, whether in C order, and type from an npy header of version 1.0 behind its magic: few of them stand in a set's files."""
    shape, in_fortran_order, dtype = npy.read_array_header_1_0(BytesIO(header))
    return shape, not in_fortran_order, dtype
