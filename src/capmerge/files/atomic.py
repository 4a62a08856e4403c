"""Output files that appear whole or not at all.

A file is written under a hidden name beside its target, synced and renamed; then the folder is
synced.
"""

import errno
import os
import sys
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Self

from capmerge.errors import BusyError, OutputError, UsageError, printable
from capmerge.files.lock import open_locked
from capmerge.files.source import FileSource

Buffer = bytes | memoryview


class AtomicFile:
    """A file that takes its name only when it is complete and on disk.

    It is a context manager: leaving the block without `publish` removes the file, so the target is
    written whole or left as it was.

    The file is written as `.NAME.capmerge-tmp` in the folder of its target. A killed run leaves at
    most that, and the next run with the same target takes it over. A lock keeps two runs with one
    target apart. Raises `OutputError` when there is no room or no permission to write, and
    `BusyError` while another run writes the same target.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.written_bytes = 0
        self.temporary = _temporary_of(target)
        """The hidden path under which the file is written."""
        self._published = False
        try:
            self._file = open_locked(self.temporary)
            self._file.truncate(0)
        except BlockingIOError as error:
            raise BusyError(
                f"{printable(str(target))}: another run is writing this file. "
                "Wait for it, or choose another output."
            ) from error
        except OSError as error:
            raise cannot_write(target, error) from error

    def write(self, data: Buffer) -> None:
        """Append `data`."""
        try:
            _write_all(self._file, data)
        except OSError as error:
            raise cannot_write(self.target, error) from error
        self.written_bytes += len(data)

    def overwrite(self, offset: int, data: Buffer) -> None:
        """Replace bytes that are written already, from `offset` on."""
        assert offset + len(data) <= self.written_bytes
        try:
            self._file.seek(offset)
            _write_all(self._file, data)
            self._file.seek(self.written_bytes)
        except OSError as error:
            raise cannot_write(self.target, error) from error

    def read_back(self) -> FileSource:
        """Return everything written so far as a source, to be closed before writing goes on.

        It reads through the writer's descriptor: on POSIX closing another one would give up the
        lock, and on Windows no other one can read a locked file.
        """
        return FileSource(self.temporary, self._file.fileno())

    def sync(self) -> None:
        """Put all bytes on disk, under the hidden name."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise cannot_write(self.target, error) from error

    def publish(self) -> None:
        """Put all bytes on disk and give the file its name, durably, replacing an older one."""
        self.sync()
        # Windows cannot rename an open file; elsewhere the lock is held until the name is taken.
        if sys.platform == "win32":
            self._file.close()
        try:
            self.temporary.replace(self.target)
            self._published = True
            sync_folder(self.target.parent)
        except OSError as error:
            raise cannot_write(self.target, error) from error
        self._file.close()

    def discard(self) -> None:
        """Remove the temporary file; after `publish` there is none."""
        if not self._published:
            if sys.platform == "win32":  # which cannot remove an open file
                self._file.close()
            self.temporary.unlink(missing_ok=True)
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


class ScratchFile:
    """A temporary file for this process alone, in the folder of the output it serves.

    It is gone when it is closed, or when the process is killed. Raises `OutputError` when it
    cannot be written.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self.written_bytes = 0
        try:
            self._file = TemporaryFile(buffering=0, prefix=".capmerge-", dir=target.parent)  # noqa: SIM115  # close() is ours
        except OSError as error:
            raise cannot_write(target, error) from error

    def write(self, data: Buffer) -> None:
        """Append `data`."""
        try:
            _write_all(self._file, data)
        except OSError as error:
            raise cannot_write(self._target, error) from error
        self.written_bytes += len(data)

    def parts(self, part_bytes: int) -> Iterator[bytes]:
        """Yield all bytes from the start in parts of `part_bytes`; the last one may be shorter."""
        self._file.seek(0)
        while part := _read_all(self._file, part_bytes):
            yield part

    def close(self) -> None:
        """Close and remove the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StandardOutput:
    """Standard output as a file to write to; a closed pipe raises `BrokenPipeError`."""

    def __init__(self) -> None:
        self.written_bytes = 0
        if sys.stdout is None:
            raise UsageError("standard output is closed. Redirect or pipe it, or give -o OUT.")
        sys.stdout.flush()
        self._file = FileIO(sys.stdout.fileno(), "wb", closefd=False)

    def write(self, data: Buffer) -> None:
        """Write `data`."""
        try:
            _write_all(self._file, data)
        except BrokenPipeError:
            raise
        except OSError as error:
            # On Windows EINVAL is the error of a pipe whose reader is gone.
            if sys.platform == "win32" and error.errno == errno.EINVAL:
                raise BrokenPipeError from error
            raise OutputError(f"standard output: cannot write ({error.strerror}).") from error
        self.written_bytes += len(data)


class OutputFiles:
    """The output and its side files, which appear together: side files first, the output last.

    It is a context manager: leaving the block removes every file that `publish` did not name.
    `target` is None for standard output, which has no side files.
    """

    def __init__(self, target: Path | None, side_suffixes: tuple[str, ...]) -> None:
        self._target = target
        self._files: list[AtomicFile] = []
        self._absent = (
            {}
            if target is None
            else {suffix: side_path(target, suffix) for suffix in side_suffixes}
        )

    def open(self) -> AtomicFile | StandardOutput:
        """Open the output itself for writing.

        The temporary files that a killed run left of the side files are removed.
        """
        if self._target is None:
            return StandardOutput()
        main = self._add(self._target)
        # No other run writes these now, since the lock on the main file is ours.
        for path in self._absent.values():
            _remove(_temporary_of(path))
        return main

    def side(self, suffix: str) -> AtomicFile:
        """Open the side file OUT + `suffix`; each one can be opened once."""
        return self._add(self._absent.pop(suffix))

    def another(self, path: Path) -> AtomicFile:
        """Open a file of any name, to appear with the others."""
        return self._add(path)

    def publish(self, before_naming: Callable[[], None] | None = None) -> None:
        """Sync every file, then name them all.

        `before_naming` is called in between. Side files of an earlier run that this one did not
        write are removed.
        """
        for file in self._files:
            file.sync()  # all of them first, so a full disk is noticed before any has its name
        if before_naming:
            before_naming()
        for path in self._absent.values():
            _remove(path)
        for file in reversed(self._files):
            file.publish()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files:
            file.discard()

    def _add(self, path: Path) -> AtomicFile:
        self._files.append(AtomicFile(path))
        return self._files[-1]


def write_whole(path: Path, text: str | bytes) -> None:
    """Write a small file whole or not at all, replacing an older one."""
    with AtomicFile(path.resolve()) as file:
        file.write(text.encode() if isinstance(text, str) else text)
        file.publish()


def side_path(target: Path, suffix: str) -> Path:
    """Return the path of a side file of `target`: its whole name with `suffix` behind it."""
    return target.with_name(target.name + suffix)


def _temporary_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.capmerge-tmp")


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{printable(str(path))}: the old side file cannot be replaced, {error.strerror}. "
            "Remove it, or choose another name for the output."
        ) from error


def cannot_write(target: Path, error: OSError) -> OutputError:
    """The error for a failed write that serves the output `target`."""
    shown = printable(str(target))
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            f"{shown}: cannot write, {error.strerror}. "
            "Nothing was kept; free some space, or choose another disk."
        )
    return OutputError(
        f"{shown}: cannot write, {error.strerror}. "
        "Check the folder and its permissions, or choose another folder."
    )


def _write_all(file: FileIO, data: Buffer) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _read_all(file: FileIO, size: int) -> bytes:
    """Return the next `size` bytes, fewer only at the end of the file."""
    data = file.read(size)
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable.

    Windows cannot open folders, and makes renames durable by itself.
    """
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
