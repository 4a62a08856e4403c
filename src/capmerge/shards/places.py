"""Where shards lie: in a local folder. `urls` has the same for the files behind a URL.

A task reads a shard from a local path, and writes its output to one. Of a local folder these are
the files themselves, of a URL copies in a scratch folder.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Protocol

from capmerge.errors import CapmergeError, DataError, OutputError, in_words, printable
from capmerge.files.atomic import cannot_write, write_whole
from capmerge.files.source import FileSource, fingerprint
from capmerge.metadata.shard_files import files_below

Fingerprint = dict[str, Any]
"""By which a shard is known again: its size in bytes, and a hash or the version in its store."""

_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.\-]+://")


class Place(Protocol):
    """A folder of files. Their names have slashes where they lie in folders below it."""

    name: str
    absolute: str
    """The same place for a process in any folder."""
    is_local: bool
    """True if the files have paths that every process on this machine can use."""

    def files(self) -> dict[str, int]:
        """The bytes of all files by their names, sorted; none if there is no such folder."""

    def full_name(self, name: str) -> str:
        """The path or the URL of a file, for messages."""

    def fingerprint(self, name: str, *, listed: bool = False) -> Fingerprint:
        """By which a file is known again. Raises `DataError` if it cannot be read.

        With `listed` it may be that of the last `files`.
        """

    def fetched(self, name: str) -> AbstractContextManager[Path]:
        """A context in which the file has a local path. Raises `DataError` where it has none."""

    def written(self, name: str) -> AbstractContextManager[Path]:
        """A context with a local path to write to, from where the file is put into its place.

        Files beside it whose names begin with its name are put there before it.
        """

    def read(self, names: Sequence[str]) -> Iterator[bytes | None]:
        """The contents of small files, in order; None for one that is not there."""

    def write(self, name: str, content: bytes) -> None:
        """Write a small file whole or not at all. Raises `OutputError`."""

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""


def is_url(text: str) -> bool:
    """True for text that begins like a URL, such as `s3://bucket/folder`."""
    return _URL.match(text) is not None


def is_place(text: str) -> bool:
    """True if `text` names a folder of shards, and not a file or a pipe."""
    try:
        return is_url(text) or (text != "" and Path(text).is_dir())
    except (OSError, ValueError):
        return False


class LocalFolder:
    """A folder of this machine, or of a file system that all machines share."""

    is_local = True

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path
        self.absolute = str(path.absolute())

    def full_name(self, name: str) -> str:
        """The path of a file."""
        return str(self.path / name)

    def files(self) -> dict[str, int]:
        """The bytes of all files in the folder and below it, by their names, sorted."""
        return files_below(self.path)

    def fingerprint(self, name: str, *, listed: bool = False) -> Fingerprint:  # noqa: ARG002  # it is read anew
        """The size of a file in bytes, and a hash of 64 blocks of it."""
        try:
            with FileSource(self.path / name) as source:
                return fingerprint(source)
        except OSError as error:
            raise DataError(
                self.full_name(name),
                None,
                None,
                f"the shard cannot be read ({in_words(error)}).",
                "Check the path, the disk and the permissions.",
            ) from error

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """The path of the file itself."""
        yield self.path / name

    @contextmanager
    def written(self, name: str) -> Iterator[Path]:
        """The path of the file itself, whose folder is made. Its writer makes it appear whole."""
        yield self._prepared(name)

    def read(self, names: Sequence[str]) -> Iterator[bytes | None]:
        """The contents of small files, in order; None for one that is not there."""
        for name in names:
            try:
                yield (self.path / name).read_bytes()
            except FileNotFoundError:
                yield None
            except OSError as error:
                raise CapmergeError(
                    f"{printable(self.full_name(name))}: the file cannot be read "
                    f"({in_words(error)}). Check the disk and the permissions."
                ) from error

    def write(self, name: str, content: bytes) -> None:
        """Write a small file whole or not at all."""
        write_whole(self._prepared(name), content)

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        try:
            (self.path / name).unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"{printable(self.full_name(name))}: the file of an earlier run cannot be removed "
                f"({in_words(error)}). Remove it, or choose another -o."
            ) from error

    def _prepared(self, name: str) -> Path:
        path = self.path / name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from error
        return path
