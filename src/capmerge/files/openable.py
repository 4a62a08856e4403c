"""Files to read that may be regular files, bytes in memory, or members of shards."""

import os
import stat
from io import BytesIO, FileIO
from pathlib import Path
from typing import NamedTuple, Protocol


class BinaryFile(Protocol):
    """What is needed of an open file, which may lie in memory or inside of another one."""

    def seek(self, offset: int, whence: int = 0, /) -> int:
        """Move to an offset from the start (0) or the end (2), and return the new offset."""
        ...

    def read(self, size: int = -1, /) -> bytes | None:
        """Return the next `size` bytes, fewer only at the end."""
        ...

    def readinto(self, buffer: memoryview, /) -> int | None:
        """Fill `buffer` with the next bytes, and return their number."""
        ...

    def close(self) -> None:
        """Close the file."""


class Openable(Protocol):
    """A file that is no file of its own, such as a member of a shard. Its text is its name."""

    def open(self) -> BinaryFile:
        """Open it for reading."""
        ...


class InMemory(NamedTuple):
    """The bytes of a file that was read already."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name

    def open(self) -> BinaryFile:
        """Open the bytes."""
        return BytesIO(self.data)


def open_file(place: Path | Openable) -> BinaryFile:
    """Open a regular file or a member of a shard; raises one of `READ_ERRORS`."""
    if not isinstance(place, Path):
        return place.open()
    file = FileIO(place, opener=_open_at_once)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
        file.close()
        raise ValueError("not a regular file")
    return file


def _open_at_once(path: str, flags: int) -> int:
    """A descriptor of the file; a named pipe without a writer would be waited for otherwise."""
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))
