"""Shards behind a URL, in any store that fsspec opens.

A file appears there whole. An object store shows it when its upload is complete; elsewhere it is
uploaded under a temporary name and renamed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from capmerge.errors import CapmergeError, UsageError, in_words, printable
from capmerge.shards.places import Fingerprint

_COMPLETE_AT_ONCE = {"s3", "s3a", "gs", "gcs", "hf", "abfs", "abfss", "az", "adl"}
"""The stores in which a file can be seen only when all of it is there."""
_VERSIONS = ("ETag", "etag", "md5Hash", "crc32c", "blob_id", "LastModified", "mtime", "created")
"""What stores call the version of a file, the best first."""
_AT_ONCE = 256
"""How many small files are asked for at a time."""
_TEMPORARY = ".capmerge-tmp"


class UrlFolder:
    """The files whose URLs begin with that of a folder."""

    is_local = False

    def __init__(self, url: str) -> None:
        self.name = self.absolute = url.rstrip("/")
        self._protocol = url.partition("://")[0].lower()
        self._fs, self._root = self._open()

    def _open(self) -> tuple[Any, str]:
        try:
            import fsspec  # it comes with the extra "scale"
        except ImportError as error:
            raise UsageError(
                f"{printable(self.name)}: URLs need the package fsspec. Run: pip install "
                "'capmerge[scale]'"
            ) from error
        try:
            fs, root = fsspec.core.url_to_fs(self.name)
        except ImportError as error:
            raise UsageError(
                f"{printable(self.name)}: {self._protocol}:// needs another package ({error})."
            ) from error
        except ValueError as error:
            raise UsageError(
                f"{printable(self.name)}: this kind of URL cannot be opened ({error}). Give one "
                "that fsspec knows, such as s3://bucket/folder, or a local folder."
            ) from error
        return fs, root.rstrip("/")

    def full_name(self, name: str) -> str:
        """The URL of a file."""
        return f"{self.name}/{name}"

    def files(self) -> dict[str, int]:
        """The bytes of all files whose URLs begin with that of the folder, by their names."""
        with self._told("listed"):
            self._fs.invalidate_cache()
            try:
                found = self._fs.find(self._root, detail=True)
            except FileNotFoundError:
                return {}
        start = len(self._root) + 1
        return {
            path[start:]: int(about["size"] or 0)
            for path, about in sorted(found.items())
            if len(path) > start
        }

    def fingerprint(self, name: str, *, listed: bool = False) -> Fingerprint:
        """The size of a file in bytes, and its version as the store tells it."""
        with self._told("read", name):
            if not listed:
                self._fs.invalidate_cache()
            about = self._fs.info(self._path(name))
        version = next((about[key] for key in _VERSIONS if about.get(key)), None)
        return {"bytes": about["size"], "version": version and str(version)}

    @contextmanager
    def fetched(self, name: str) -> Iterator[Path]:
        """A copy of the file in a scratch folder."""
        with TemporaryDirectory(prefix="capmerge-") as folder:
            copy = Path(folder, Path(name).name)
            with self._told("read", name):
                self._fs.get_file(self._path(name), str(copy))
            yield copy

    @contextmanager
    def written(self, name: str) -> Iterator[Path]:
        """A path in a scratch folder, from where the file is uploaded at the end."""
        with TemporaryDirectory(prefix="capmerge-") as folder:
            path = Path(folder, Path(name).name)
            yield path
            beside = [other for other in sorted(Path(folder).iterdir()) if other != path]
            for file in (*beside, path):
                self._upload(file, f"{name}{file.name.removeprefix(path.name)}")

    def read(self, names: Sequence[str]) -> Iterator[bytes | None]:
        """The contents of small files, in order; None for one that is not there."""
        for start in range(0, len(names), _AT_ONCE):
            paths = [self._path(name) for name in names[start : start + _AT_ONCE]]
            found = self._fs.cat(paths, on_error="return")
            # A store that has one file gives it alone.
            contents = [found[path] for path in paths] if isinstance(found, dict) else [found]
            for name, content in zip(names[start:], contents, strict=False):
                if isinstance(content, FileNotFoundError):
                    yield None
                    continue
                if isinstance(content, BaseException):
                    with self._told("read", name):
                        raise content
                yield bytes(content)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file whole or not at all."""
        with self.written(name) as path:
            path.write_bytes(content)

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        with self._told("removed", name):
            try:
                self._fs.rm_file(self._path(name))
            except FileNotFoundError:
                return

    def _upload(self, file: Path, name: str) -> None:
        path = self._path(name)
        with self._told("written", name):
            if self._protocol in _COMPLETE_AT_ONCE:
                self._fs.put_file(str(file), path)
                return
            folder, _, last = path.rpartition("/")
            temporary = f"{folder}/.{last}{_TEMPORARY}"
            self._fs.makedirs(folder, exist_ok=True)
            self._fs.put_file(str(file), temporary)
            self._fs.mv(temporary, path)

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    @contextmanager
    def _told(self, what: str, name: str = "") -> Iterator[None]:
        """Turn the errors of a store into messages. Those of Python itself, bugs, stay as they are.

        Stores raise exceptions of their own kinds, which no library declares.
        """
        where = printable(self.full_name(name) if name else self.name)
        try:
            yield
        except CapmergeError:
            raise
        except FileNotFoundError as error:
            bucket = f"{self._protocol}://{self._root.partition('/')[0]}"
            raise CapmergeError(
                f"{where}: it cannot be {what}, because it is not there. Check the URL, and that "
                f"{printable(bucket)} exists."
            ) from error
        except PermissionError as error:
            raise CapmergeError(
                f"{where}: it cannot be {what}, access is denied ({in_words(error)}). Check the "
                "credentials, and what they allow."
            ) from error
        except Exception as error:
            kind = type(error)
            if kind.__module__ == "builtins" and not isinstance(error, OSError):
                raise
            if "credential" in kind.__name__.lower() or "credential" in str(error).lower():
                raise CapmergeError(
                    f"{where}: it cannot be {what}, because there are no credentials for "
                    f"{self._protocol}:// ({error}). Give them as its own programs take them, in "
                    "the environment or a file."
                ) from error
            raise CapmergeError(
                f"{where}: it cannot be {what} ({kind.__name__}: {in_words(error)}). Check the "
                "network and the address of the store, and run the same command again."
            ) from error
