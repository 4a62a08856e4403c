"""Several plain files read as one, each behind the one before it.

Byte order marks are left out, and a file whose last line has no end gets one where another file
follows. Else the bytes are those of the files, so a chain of JSON lines reads as `cat` would write
it.
"""

from bisect import bisect_right
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

from capmerge.errors import DataError
from capmerge.files.positioned import OpenFile, OpenFiles, read_at
from capmerge.files.source import Identity, cannot_read, changed, identity_of

_MARK = b"\xef\xbb\xbf"
HEAD_BYTES = 4
"""How many of the first bytes of a file its `Link` keeps."""


class Link(NamedTuple):
    """A file of a chain, as it was when the chain was opened."""

    path: Path
    identity: Identity
    head: bytes
    """Its first bytes."""
    skipped: int
    """The bytes of its byte order mark, which the chain leaves out."""
    ends_line: bool
    """True if it is empty or ends with a line break."""


def read_link(path: Path) -> Link:
    """Look at a file. Raises `DataError` where it cannot be read."""
    try:
        file = OpenFile(path)
        identity = identity_of(path.stat())
        head = read_at(file.descriptor, HEAD_BYTES, 0)
        last = read_at(file.descriptor, 1, max(0, identity[2] - 1))
    except OSError as error:
        raise cannot_read(str(path), error) from error
    skipped = len(_MARK) if head.startswith(_MARK) else 0
    return Link(path, identity, head, skipped, last in {b"", b"\n"} or identity[2] == skipped)


class ChainedSource:
    """The files `links` of a folder as one source, read at any offset, also by several threads.

    A chain pickles as its links, so another process reads the same bytes at the same offsets even
    if the folder has more files by then.
    """

    def __init__(self, folder: Path, links: Sequence[Link]) -> None:
        self.name = str(folder)
        self._folder = folder
        self.path: Path | None = folder
        self.links = links
        self._starts, self._breaks = [0], list[bool]()
        for number, link in enumerate(links, 1):
            is_broken = not link.ends_line and number < len(links)
            self._breaks.append(is_broken)
            self._starts.append(self._starts[-1] + link.identity[2] - link.skipped + int(is_broken))
        self.total_bytes: int | None = self._starts[-1]
        self._open = OpenFiles()

    def __reduce__(self) -> tuple[type["ChainedSource"], tuple[Path, Sequence[Link]]]:
        return ChainedSource, (self._folder, self.links)

    def window(self, start: int, size: int) -> bytes:
        """Return the bytes [start, start + size), fewer only at the end of the last file."""
        found = []
        number = bisect_right(self._starts, start) - 1
        while size > 0 and number < len(self.links):
            part = self._read(number, start, min(size, self._starts[number + 1] - start))
            found.append(part)
            start, size, number = self._starts[number + 1], size - len(part), number + 1
        return b"".join(found)

    def _read(self, number: int, start: int, size: int) -> bytes:
        """Return bytes of one file, by their offset in the chain, and the end of its last line."""
        link = self.links[number]
        with_break = self._breaks[number] and start + size == self._starts[number + 1]
        wanted = size - int(with_break)
        try:
            file = self._open[link.path]
            data = read_at(file.descriptor, wanted, start - self._starts[number] + link.skipped)
        except OSError as error:
            raise cannot_read(str(link.path), error) from error
        if len(data) < wanted:
            raise changed(str(link.path))
        return data + b"\n" if with_break else data

    def place_of(self, offset: int) -> tuple[str, int]:
        """Return the file with this offset of the chain, and the offset in it."""
        number = max(0, min(bisect_right(self._starts, offset), len(self.links)) - 1)
        if not self.links:
            return self.name, offset
        link = self.links[number]
        return str(link.path), offset - self._starts[number] + link.skipped

    def release(self, before: int) -> None:
        """Do nothing, since files can be read again."""

    def read_bytes(self, offset: int) -> int:
        """Return how many bytes of the chain lie before `offset`: the offset itself."""
        return offset

    def is_file(self, path: Path) -> bool:
        """Return whether `path` is one of the files, under any name."""
        if not path.exists():
            return False
        found = identity_of(path.stat())[:2]
        return any(found == link.identity[:2] for link in self.links)

    def check_unchanged(self) -> None:
        """Raise `DataError` when one of the files was written to, replaced or removed."""
        for link in self.links:
            try:
                found = identity_of(link.path.stat())
            except OSError as error:
                raise changed(str(link.path)) from error
            if found != link.identity:
                raise changed(str(link.path))

    def reopener(self) -> "partial[ChainedSource]":
        """Return a function that opens the chain once more, in another process."""
        return partial(ChainedSource, self._folder, self.links)

    def close(self) -> None:
        """Close all files."""
        self._open = OpenFiles()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.close()
        if isinstance(error, DataError):
            self.check_unchanged()
            if error.name == self.name and error.offset is not None:
                error.name, error.offset = self.place_of(error.offset)
