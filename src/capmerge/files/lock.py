"""File locks that exclude the other processes and threads that ask for the same file.

On POSIX a lock is a record lock (`fcntl.lockf`): it belongs to the process that took it, so a
forked child that outlives its killed parent does not hold it. This module deals with two properties
of record locks:

- The locks of one process do not exclude each other. A set of the files that this process holds
  makes up for that.
- Closing any descriptor of a locked file gives up its lock, duplicates and memory maps included.
  So a file that this process holds is not opened again here, and no other code may open it,
  `os.dup` its descriptor or map it while the lock matters.
"""

import errno
import os
import sys
import threading
import time
from io import FileIO
from pathlib import Path

_WAIT_SECONDS = 0.05
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)

Identity = tuple[int, int]
"""The device and inode of a file."""

_held: set[Identity] = set()
_guard = threading.RLock()  # reentrant: garbage collection may close a file while it is held


class LockedFile(FileIO):
    """A file that is open for reading and writing, and locked until it is closed."""

    _identity: Identity | None = None

    def hold(self, identity: Identity) -> None:
        """Count the file as held by this process until it is closed."""
        self._identity = identity
        _held.add(identity)

    def close(self) -> None:
        """Close the file and give up its lock."""
        with _guard:
            if self._identity is not None:
                _held.discard(self._identity)
                self._identity = None
            super().close()


def open_locked(path: Path, *, wait: bool = False) -> LockedFile:
    """Return the file at `path`, open and locked; it is created if missing and never truncated.

    With `wait` the call returns when the other holder is done; a holder that dies gives up its
    lock. On file systems without locks every process that asks gets the file. Raises
    `BlockingIOError` when another process or thread holds it, and `OSError` when it cannot be
    opened for writing.
    """
    while True:
        try:
            if file := _open_once(path):
                return file
        except BlockingIOError:
            if not wait:
                raise
            # A blocking lockf would raise EDEADLK where threads of two processes wait crosswise.
            time.sleep(_WAIT_SECONDS)


def _open_once(path: Path) -> LockedFile | None:
    """Return the locked file; None if its holder renamed or removed it before we had the lock."""
    with _guard:
        if _identity_of(path) in _held:
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN), str(path))
        flags = os.O_RDWR | os.O_CREAT
        flags |= getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0)
        file = LockedFile(os.open(path, flags, 0o666), "r+b")
        try:
            _lock(file.fileno())
            status = os.fstat(file.fileno())
            if _identity_of(path) == (status.st_dev, status.st_ino):
                file.hold((status.st_dev, status.st_ino))
                return file
        except BaseException:
            file.close()
            raise
        file.close()
        return None


def _identity_of(path: Path) -> Identity | None:
    """Return the identity of the file that has this name now; None if there is none."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino


if sys.platform == "win32":
    import msvcrt

    def _lock(descriptor: int) -> None:
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except PermissionError as error:
            raise BlockingIOError(*error.args) from error
else:
    import fcntl

    def _lock(descriptor: int) -> None:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise BlockingIOError(*error.args) from error
            if error.errno not in _NO_LOCKS:
                raise

    def _forget_the_parents_files() -> None:
        """Start a forked child with no file held, as the kernel does."""
        global _guard  # noqa: PLW0603  # a thread of the parent may have held it at the fork
        _guard = threading.RLock()
        _held.clear()

    os.register_at_fork(after_in_child=_forget_the_parents_files)
