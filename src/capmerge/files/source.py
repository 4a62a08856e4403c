"""Reading a source - a file or a pipe, plain or compressed - as bytes at any offset.

A plain file is read at the offset that is asked for. A pipe or a compressed file is read once,
front to back; its bytes are kept until they are released. `chained` reads several plain files as
one.
"""

import hashlib
import os
import sys
from contextlib import closing
from functools import partial
from io import FileIO
from pathlib import Path
from typing import IO, TYPE_CHECKING, Protocol, Self, cast

if TYPE_CHECKING:
    import io
    from collections.abc import Callable

from capmerge.errors import DataError, UsageError, printable
from capmerge.files.compression import BrokenStreamError, Reader, decompressing
from capmerge.files.positioned import read_at

_FINGERPRINT_BLOCKS, _FINGERPRINT_BLOCK_BYTES = 64, 4096


Identity = tuple[int, int, int, int]
"""The device, inode, size in bytes and time of change in ns of a file."""


class Window(Protocol):
    """The part of a source that a parser needs."""

    name: str

    def window(self, start: int, size: int) -> bytes:
        """Return the bytes [start, start + size), fewer only at the end."""


class Source(Window, Protocol):
    """Metadata that are opened for reading; a context in which a change of the file is an error."""

    path: Path | None
    """The path by which other processes can read it; None if it can be read only once."""
    total_bytes: int | None
    """The size of the file, compressed if it is; None for a pipe."""

    def release(self, before: int) -> None:
        """Say that the bytes before this offset are no longer needed."""

    def read_bytes(self, offset: int) -> int:
        """Return how much of `total_bytes` was read when the source is done up to `offset`."""

    def is_file(self, path: Path) -> bool:
        """Return whether `path` is a file that the source reads, under any name."""

    def check_unchanged(self) -> None:
        """Raise `DataError` when a file was written to while it was read."""

    def reopener(self) -> "Callable[[], Window] | None":
        """Return a function for other processes that opens the source once more, if that can be.

        It can be pickled, and raises `DataError` when another file has the path by then.
        """

    def close(self) -> None:
        """Close all files."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object, /
    ) -> None: ...


class FileSource:
    """A plain file, read at any offset, also by several threads.

    If `descriptor` is given, the file is read through it, and `close` leaves it open.
    """

    def __init__(self, path: Path, descriptor: int | None = None) -> None:
        self.name = str(path)
        self.path: Path | None = path
        self._file = (
            path.open("rb", buffering=0)
            if descriptor is None
            else FileIO(descriptor, "rb", closefd=False)
        )
        self.total_bytes: int | None = os.fstat(self._file.fileno()).st_size
        self.identity = _identity(self._file.fileno())
        """The device, inode, size and time of change that the file had when it was opened."""

    def window(self, start: int, size: int) -> bytes:
        """Return the bytes [start, start + size), fewer only at the end of the file."""
        try:
            return read_at(self._file.fileno(), size, start)
        except OSError as error:
            raise cannot_read(self.name, error) from error

    def place_of(self, offset: int) -> tuple[str, int]:
        """Return the name of the file and the offset itself."""
        return self.name, offset

    def release(self, before: int) -> None:
        """Do nothing, since a file can be read again."""

    def read_bytes(self, offset: int) -> int:
        """Return how many bytes of the file lie before `offset`: the offset itself."""
        return offset

    def is_file(self, path: Path) -> bool:
        """Return whether `path` is this very file, under any name."""
        return _is_file(self._file.fileno(), path)

    def check_unchanged(self) -> None:
        """Raise `DataError` when the file was written to while it was read."""
        if _identity(self._file.fileno()) != self.identity:
            raise changed(self.name)

    def reopener(self) -> "Callable[[], FileSource]":
        """Return a function that opens the file once more, in another process."""
        assert self.path is not None
        return partial(reopen, self.path, self.identity)

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        with closing(self):
            _blame_change(self, error)


class StreamSource:
    """A pipe or a compressed file, read once; `release` tells which bytes are no longer needed."""

    def __init__(
        self, name: str, stream: IO[bytes] | Reader, compressed: IO[bytes] | None = None
    ) -> None:
        self.name = name
        self.path: Path | None = None  # workers cannot read it themselves
        self._stream, self._compressed = stream, compressed
        self.total_bytes: int | None = os.fstat(compressed.fileno()).st_size if compressed else None
        self._opened_as = _identity(compressed.fileno()) if compressed else None
        self._kept = bytearray()
        self._kept_from = 0
        self._ended = False

    def window(self, start: int, size: int) -> bytes:
        """Return the bytes [start, start + size), fewer only at the end of the stream.

        The bytes from `start` on must not have been released.
        """
        while not self._ended and self._kept_from + len(self._kept) < start + size:
            try:
                more = self._stream.read(1 << 18)
            except OSError as error:
                raise cannot_read(self.name, error) from error
            except BrokenStreamError as error:
                at = (
                    self._compressed.tell()
                    if self._compressed and self._compressed.seekable()
                    else None
                )
                raise DataError(self.name, at, None, error.problem, error.next_step) from error
            self._ended = not more
            self._kept += more
        with memoryview(self._kept) as kept:
            return bytes(kept[start - self._kept_from : start - self._kept_from + size])

    def release(self, before: int) -> None:
        """Forget the bytes before offset `before`."""
        del self._kept[: before - self._kept_from]
        self._kept_from = before

    def read_bytes(self, offset: int) -> int:
        """Return how many bytes of the compressed file were read; `offset` for a pipe."""
        return (
            self._compressed.tell() if self._compressed and self._compressed.seekable() else offset
        )

    def is_file(self, path: Path) -> bool:
        """Return whether `path` is the very file that this source reads."""
        return _is_file((self._compressed or self._stream).fileno(), path)

    def check_unchanged(self) -> None:
        """Raise `DataError` when a file was written to while it was read; a pipe never is."""
        if self._compressed and _identity(self._compressed.fileno()) != self._opened_as:
            raise changed(self.name)

    def reopener(self) -> None:
        """Return None, since it can be read only once."""
        return

    def close(self) -> None:
        """Close the stream and the file under it."""
        self._stream.close()
        if self._compressed:
            self._compressed.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        with closing(self):
            _blame_change(self, error)


class BytesSource:
    """Bytes in memory that begin at `offset` of a source, read with the source's own offsets."""

    def __init__(self, name: str, data: bytes, offset: int) -> None:
        self.name = name
        self._data, self._offset = data, offset
        self.total_bytes = offset + len(data)

    def window(self, start: int, size: int) -> bytes:
        """Return the bytes [start, start + size), fewer only at the end of the bytes in memory."""
        return self._data[start - self._offset : start - self._offset + size]


def open_source(path: str) -> FileSource | StreamSource:
    """Open a source; `-` is standard input.

    gzip and zstd are recognized by the first bytes, not by the name of the file. Raises
    `UsageError` when the file is missing, a folder or not readable.
    """
    if path == "-":
        if sys.stdin is None:
            raise UsageError(
                "standard input is closed. "
                "Redirect or pipe the metadata file into it, or name the file."
            )
        stdin = cast("io.BufferedReader", sys.stdin.buffer)
        return StreamSource("standard input", decompressing(stdin) or stdin)
    try:
        file = Path(path)
        opened = file.open("rb")
        if (reader := decompressing(opened)) is not None:
            return StreamSource(path, reader, compressed=opened)
        if not file.is_file():  # a named pipe: it can be opened only once
            return StreamSource(path, opened)
        opened.close()
        return FileSource(file)
    except FileNotFoundError as error:
        raise UsageError(f"{printable(path)}: no such file. Check the path.") from error
    except IsADirectoryError as error:
        raise UsageError(
            f"{printable(path)}: found a folder, expected a metadata file. "
            "Name the .json or .jsonl file in it."
        ) from error
    except OSError as error:
        raise UsageError(
            f"{printable(path)}: the file cannot be read ({error.strerror})."
        ) from error
    except ValueError as error:  # the name holds NUL
        raise UsageError(f"{printable(path)}: the file cannot be read ({error}).") from error


def reopen(path: Path, identity: Identity) -> FileSource:
    """Open the file of a `FileSource` with this `identity` once more, in another process.

    Raises `DataError` when another file has the path now, or the file was written to.
    """
    try:
        source = FileSource(path)
    except FileNotFoundError:
        raise changed(str(path)) from None
    except OSError as error:
        raise cannot_read(str(path), error) from error
    if source.identity != identity:
        source.close()
        raise changed(str(path))
    return source


def fingerprint(source: Source | BytesSource) -> dict[str, int | str | None]:
    """Return the size and a hash of a source, by which a later run knows it again.

    The size is in bytes, and the hash is BLAKE2b of 64 evenly spaced blocks of 4 KiB. Both are None
    for a pipe or a compressed file, which are read only once, front to back.
    """
    if isinstance(source, StreamSource) or source.total_bytes is None:
        return {"bytes": None, "blake2b": None}
    hashed = hashlib.blake2b(digest_size=16)
    last_start = max(0, source.total_bytes - _FINGERPRINT_BLOCK_BYTES)
    for i in range(_FINGERPRINT_BLOCKS):
        hashed.update(
            source.window(last_start * i // (_FINGERPRINT_BLOCKS - 1), _FINGERPRINT_BLOCK_BYTES)
        )
    return {"bytes": source.total_bytes, "blake2b": hashed.hexdigest()}


def fingerprint_text(source: Source | BytesSource) -> str:
    """Return the `fingerprint` of a file as one string of hexadecimal digits."""
    found = fingerprint(source)
    return f"{found['bytes']:012x}{found['blake2b']}"


def _blame_change(source: Source, error: BaseException | None) -> None:
    """Raise `DataError` when `error` says that the data are wrong and the source has changed."""
    if isinstance(error, DataError):
        source.check_unchanged()


def changed(name: str) -> DataError:
    """Return the error for a file that was written to while it was read."""
    return DataError(
        name,
        None,
        None,
        "the file changed while it was read.",
        "Run again when nothing writes to it.",
    )


def cannot_read(name: str, error: OSError) -> DataError:
    """Return the error for a file whose bytes the system does not give."""
    return DataError(
        name,
        None,
        None,
        f"the source cannot be read ({error.strerror}).",
        "Check the disk or the connection to it.",
    )


def _is_file(descriptor: int, path: Path) -> bool:
    return path.exists() and os.path.samestat(os.fstat(descriptor), path.stat())


def _identity(descriptor: int) -> Identity:
    return identity_of(os.fstat(descriptor))


def identity_of(status: os.stat_result) -> Identity:
    """Return what tells a file from another one, and from itself after a change."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
