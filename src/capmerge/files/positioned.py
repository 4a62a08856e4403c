"""Reading files at any offset, without a position that processes or threads would share."""

import os
import sys
import threading
import weakref
from pathlib import Path

_MOST_OPEN = 128
"""The files of one set that a process keeps open; the usual limit of open files is 1024."""

if sys.platform == "win32":
    _LOCK = threading.Lock()

    def read_at(descriptor: int, size: int, offset: int) -> bytes:
        """Return the bytes [offset, offset + size), fewer only at the end of the file."""
        data = bytearray(size)
        return bytes(data[: read_into(descriptor, memoryview(data), offset)])

    def read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset` on; return the bytes read, fewer only at the file's end."""
        with _LOCK:
            os.lseek(descriptor, offset, os.SEEK_SET)
            done = 0
            while done < len(buffer) and (more := os.read(descriptor, len(buffer) - done)):
                buffer[done : done + len(more)] = more
                done += len(more)
        return done
else:

    def read_at(descriptor: int, size: int, offset: int) -> bytes:
        """Return the bytes [offset, offset + size), fewer only at the end of the file."""
        data = os.pread(descriptor, size, offset)
        while len(data) < size and (
            more := os.pread(descriptor, size - len(data), offset + len(data))
        ):
            data += more
        return data

    def read_into(descriptor: int, buffer: memoryview, offset: int) -> int:
        """Fill `buffer` from `offset` on; return the bytes read, fewer only at the file's end."""
        done = os.preadv(descriptor, [buffer], offset)
        while 0 < done < len(buffer) and (
            more := os.preadv(descriptor, [buffer[done:]], offset + done)
        ):
            done += more
        return done


class OpenFile:
    """A file that is open for reading, and closed when nothing refers to it any more.

    Raises `OSError` when it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self.descriptor)
        self.changed_ns = os.fstat(self.descriptor).st_mtime_ns
        """The time of its last change in ns since 1970."""


class OpenFiles:
    """Many files, of which those that were opened last stay open; threads may share them."""

    def __init__(self) -> None:
        self._open: dict[str, OpenFile] = {}

    def __getitem__(self, path: Path) -> OpenFile:
        """Return an open file. Raises `OSError` when it cannot be opened."""
        name = str(path)
        file = self._open.get(name)
        if file is None:
            file = OpenFile(path)
            # Another thread may do the same at this moment, so nothing is expected to be there.
            for oldest in [*self._open][: max(0, len(self._open) - _MOST_OPEN + 1)]:
                self._open.pop(oldest, None)
            self._open[name] = file
        return file
