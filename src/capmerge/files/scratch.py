"""Temporary files that worker processes read too, in a folder beside the output they serve."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Self

from capmerge.errors import OutputError, printable
from capmerge.files.atomic import Buffer, cannot_write
from capmerge.files.source import FileSource, Source

_COPY_BYTES = 1 << 20
_BUFFER_BYTES = 1 << 16


class ScratchFolder:
    """A hidden folder for the temporary files of one run, which is removed when it is left.

    It is named after `target`, whose lock the caller holds, so what a killed run left there is
    removed first. Raises `OutputError` when it cannot be made.
    """

    def __init__(self, target: Path) -> None:
        self._target = target
        self.path = target.with_name(f".{target.name}.capmerge-scratch")

    def __enter__(self) -> Self:
        try:
            if self.path.is_dir():
                shutil.rmtree(self.path)
            self.path.mkdir()
        except OSError as error:
            raise OutputError(
                f"{printable(str(self.path))}: this folder for temporary files cannot be made "
                f"({error.strerror}). Remove what is there, or choose another folder."
            ) from error
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self.path, ignore_errors=True)

    def file(self, name: str) -> "ScratchWriter":
        """Open a new file of the folder for writing."""
        return ScratchWriter(self.path / name, self._target)


class ScratchWriter:
    """A file of a `ScratchFolder` that is being written; `OutputError` says when that fails."""

    def __init__(self, path: Path, target: Path) -> None:
        self.path = path
        self.written_bytes = 0
        self._target = target
        try:
            self._file = path.open("wb", buffering=_BUFFER_BYTES)
        except OSError as error:
            raise cannot_write(target, error) from error

    def write(self, data: Buffer) -> None:
        """Append `data`."""
        try:
            self._file.write(data)
        except OSError as error:
            raise cannot_write(self._target, error) from error
        self.written_bytes += len(data)

    def close(self) -> None:
        """Write what is still in memory, and close the file."""
        try:
            self._file.close()
        except OSError as error:
            raise cannot_write(self._target, error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class SharedFile:
    """A file that several processes read, opened at first use.

    It is closed when nothing refers to this object any more.
    """

    def __init__(self, open_file: Callable[[], FileSource]) -> None:
        self._open_file = open_file
        self._file: FileSource | None = None

    def window(self, start: int, size: int) -> bytes:
        """Return the bytes [start, start + size), fewer only at the end of the file."""
        if self._file is None:
            self._file = self._open_file()
        return self._file.window(start, size)

    def __reduce__(self) -> tuple[type["SharedFile"], tuple[Callable[[], FileSource]]]:
        return SharedFile, (self._open_file,)

    def __del__(self) -> None:
        if self._file is not None:
            self._file.close()


def spooled(
    source: Source,
    folder: ScratchFolder,
    name: str,
    progress: Callable[[int], None] | None = None,
) -> FileSource:
    """Read a pipe or a compressed file to its end into a scratch file, and return that opened.

    It bears the name of the source in messages. `progress` is told the offset that is done.
    """
    place = 0
    with folder.file(name) as file:
        while data := source.window(place, _COPY_BYTES):
            file.write(data)
            place += len(data)
            source.release(place)
            if progress:
                progress(place)
    source.check_unchanged()
    copy = FileSource(file.path)
    copy.name = source.name
    return copy
