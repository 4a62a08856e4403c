"""Output that appears whole or not at all: a hidden temporary file beside the target, fsync, rename, fsync of the folder."""

import errno
import os
import sys
from collections.abc import Iterator
from io import FileIO
from pathlib import Path
from tempfile import TemporaryFile
from typing import Self

from capmerge.errors import BusyError, OutputError, UsageError, printable
from capmerge.files.source import FileSource, Source

Buffer = bytes | memoryview


class AtomicFile:
    """A file that takes its name only when it is complete and on disk.

    It is written as `.NAME.capmerge-tmp` in the folder of its target. A run that was killed leaves
    at most that; the next run to the same target takes it over. A lock on it keeps two runs to one
    target apart. Raises `OutputError` when it cannot be written: no room, no permission;
    `BusyError` while another run writes it.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        self.written_bytes = 0
        self._temporary = _temporary_of(target)
        self._published = False
        try:
            self._file = _open_locked(self._temporary)
        except BlockingIOError as error:
            raise BusyError(
                f"{printable(str(target))}: another run is writing this file. Wait for it, or choose another output."
            ) from error
        except OSError as error:
            raise _cannot_write(target, error) from error

    def write(self, data: Buffer) -> None:
        """Append `data`."""
        try:
            _write_all(self._file, data)
        except OSError as error:
            raise _cannot_write(self.target, error) from error
        self.written_bytes += len(data)

    def read_back(self) -> FileSource:
        """All that was written, as a source to be closed before anything more is written.

        It shares the writer's handle: Windows lets no other one read what is locked.
        """
        return FileSource(self._temporary, os.dup(self._file.fileno()))

    def sync(self) -> None:
        """Put all bytes on disk, under the hidden name."""
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise _cannot_write(self.target, error) from error

    def publish(self) -> None:
        """Give the synced file its name, replacing an older one, and make that durable."""
        if (
            sys.platform == "win32"
        ):  # it cannot rename an open file; elsewhere the lock is held until the name is taken
            self._file.close()
        try:
            self._temporary.replace(self.target)
            self._published = True
            sync_folder(self.target.parent)
        except OSError as error:
            raise _cannot_write(self.target, error) from error
        self._file.close()

    def discard(self) -> None:
        """Remove the temporary file; after `publish` there is none."""
        if not self._published:
            if sys.platform == "win32":  # it cannot remove an open file
                self._file.close()
            self._temporary.unlink(missing_ok=True)
            self._file.close()


class ScratchFile:
    """Bytes that only this process sees, beside the output they are for; they are gone when it is closed or killed.

    Raises `OutputError` when they cannot be written.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        try:
            self._file = TemporaryFile(buffering=0, prefix=".capmerge-", dir=target.parent)  # noqa: SIM115  # close() is ours
        except OSError as error:
            raise _cannot_write(target, error) from error

    def write(self, data: Buffer) -> None:
        """Append `data`."""
        try:
            _write_all(self._file, data)
        except OSError as error:
            raise _cannot_write(self._target, error) from error

    def parts(self, part_bytes: int) -> Iterator[bytes]:
        """All bytes from the start, in parts of `part_bytes`, the last one shorter."""
        self._file.seek(0)
        while part := _read_all(self._file, part_bytes):
            yield part

    def close(self) -> None:
        """Remove it."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StandardOutput:
    """Standard output as a place to write to; a closed pipe raises `BrokenPipeError`."""

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
            if (
                sys.platform == "win32" and error.errno == errno.EINVAL
            ):  # how Windows says that the reader is gone
                raise BrokenPipeError from error
            raise OutputError(f"standard output: cannot write ({error.strerror}).") from error
        self.written_bytes += len(data)


class OutputFiles:
    """The output and its side files, which appear together: side files first, the output last.

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
        """The output itself, open for writing; what a killed run left of the side files is removed."""
        if self._target is None:
            return StandardOutput()
        main = self._add(self._target)
        for path in self._absent.values():  # the lock on the main file is ours by now
            _remove(_temporary_of(path))
        return main

    def side(self, suffix: str) -> AtomicFile:
        """The side file OUT + `suffix`, opened at its first use."""
        return self._add(self._absent.pop(suffix))

    def publish(self) -> None:
        """Sync every file, then name them; side files of an earlier run that this one did not write are removed."""
        for file in self._files:
            file.sync()
        for path in self._absent.values():
            _remove(path)
        for file in reversed(self._files):
            file.publish()

    def discard(self) -> None:
        """Remove whatever is not published."""
        for file in self._files:
            file.discard()

    def _add(self, path: Path) -> AtomicFile:
        self._files.append(AtomicFile(path))
        return self._files[-1]


def write_whole(path: Path, text: str | bytes) -> None:
    """Write a small file, replacing an older one: whole or not at all."""
    file = AtomicFile(path.resolve())
    try:
        file.write(text.encode() if isinstance(text, str) else text)
        file.sync()
        file.publish()
    finally:
        file.discard()


def side_path(target: Path, suffix: str) -> Path:
    """The side file of `target`: its whole name and `suffix`."""
    return target.with_name(target.name + suffix)


def check_target(
    target: Path, source: Source, *, force: bool, side_suffixes: tuple[str, ...] = ()
) -> Path:
    """The real path to write to, links followed.

    Raises `UsageError` when it is the source, no regular file, in no folder, or there already
    without `force`; and when a side file would be the source.
    """
    shown = printable(str(target))
    try:
        target = target.resolve()
        if source.is_file(target):
            raise UsageError(
                f"{shown}: the output is the source itself. Choose another -o; the source is never written to."
            )
        for suffix in side_suffixes:
            if source.is_file(side_path(target, suffix)):
                raise UsageError(
                    f"{shown}: its side file *{suffix} would be the source itself. Choose another -o."
                )
        return _checked(target, shown, force=force)
    except (OSError, RuntimeError) as error:  # a name that is too long; a loop of links
        raise UsageError(
            f"{shown}: this cannot be a file name here ({error}). Choose another -o."
        ) from error


def _checked(target: Path, shown: str, *, force: bool) -> Path:
    if target.exists() and not target.is_file():
        kind = "a folder" if target.is_dir() else "no regular file"
        raise UsageError(
            f"{shown}: found {kind}, expected a file name. For a pipe or device use -o - and redirect it."
        )
    if target.exists() and not force:
        raise UsageError(
            f"{shown}: the file exists. Use --force to replace it, or choose another -o."
        )
    if not target.parent.is_dir():
        raise UsageError(
            f"{shown}: there is no folder {printable(str(target.parent))}. Create it first."
        )
    return target


def _temporary_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.capmerge-tmp")


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(
            f"{printable(str(path))}: cannot replace this, {error.strerror}. Remove it, or choose another -o."
        ) from error


def _cannot_write(target: Path, error: OSError) -> OutputError:
    shown = printable(str(target))
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return OutputError(
            f"{shown}: cannot write, {error.strerror}. Nothing was kept; free some room, or choose another -o."
        )
    return OutputError(
        f"{shown}: cannot write, {error.strerror}. Check the folder and its permissions, or choose another -o."
    )


def _write_all(file: FileIO, data: Buffer) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def _read_all(file: FileIO, size: int) -> bytes:
    """`size` bytes, fewer only at the end of the file."""
    data = file.read(size)
    while len(data) < size and (more := file.read(size - len(data))):
        data += more
    return data


def sync_folder(folder: Path) -> None:
    """Make a rename in `folder` durable. Windows cannot open folders, and makes renames durable by itself."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_locked(path: Path) -> FileIO:
    """`path` emptied and open for writing, locked against another run; raises `BlockingIOError` when one holds it."""
    while True:
        descriptor = os.open(
            path,
            os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0),
            0o666,
        )
        file = FileIO(descriptor, "wb")
        try:
            _lock(descriptor)
            # The holder of the lock may have published the file between our open and our lock: then
            # it is not ours.
            if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
                os.ftruncate(descriptor, 0)
                return file
        except BaseException:
            file.close()
            raise
        file.close()


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
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError as error:  # some network file systems have no locks; the run goes on without
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
