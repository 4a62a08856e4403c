"""Many small files in a few tar files, read at random without unpacking.

A folder of shards holds `latents-00000.tar` and so on, an index of the members and their names.
Any tar program unpacks the shards. This module owns the layout and its reading: where each member
lies, and that the shards are those that the index was made of. `index/latent_pack` writes them.
"""

import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from capmerge.errors import StaleError, printable
from capmerge.files.atomic import AtomicFile, ScratchFile
from capmerge.files.columns import Column, Columns, Schema, write_columns
from capmerge.files.positioned import OpenFile, OpenFiles, read_at, read_into

INDEX, NAMES = "latents.index", "latents.names"
BLOCK = 512
"""The unit of a tar file in bytes."""
END = bytes(2 * BLOCK)
"""The end of a tar file."""

_PLACES: dict[str, np.dtype[Any]] = {
    "shard": np.dtype("<u4"),
    "start": np.dtype("<u8"),
    "size": np.dtype("<u8"),
    "name_end": np.dtype("<u8"),
}
_SCHEMA = Schema("capmerge.shards", 1, {"identity": str, "dtype": str}, _PLACES)
_NAMES_SCHEMA = Schema("capmerge.shard-names", 1, {"identity": str}, {"text": np.dtype("u1")})
ROW = np.dtype([*_PLACES.items()])
"""A row of the index, in the order of the shards."""

_NAME_BYTES = 100
"""The length of the name in a tar header; longer names have a block of their own before it."""


class DamagedShardError(OSError):
    """A shard does not hold what the index says; its text is a whole sentence."""


class Place(NamedTuple):
    """Where a member lies."""

    shard: int
    start: int
    """The offset of its bytes, behind the block of its tar header."""
    size: int


def shard_name(number: int) -> str:
    """Return the file name of a shard.

    >>> shard_name(7)
    'latents-00007.tar'
    """
    return f"latents-{number:05d}.tar"


def is_packed(folder: Path) -> bool:
    """Return whether a folder holds shards, even damaged ones, and not loose files."""
    return any((folder / name).is_file() for name in (INDEX, NAMES, shard_name(0)))


class Shards:
    """The opened shards of a folder. It pickles as the folder and opens files when they are read.

    Raises `StaleError` when the index is missing or damaged, or when a shard is missing or has
    another size than the index says; without `check`, only what the head of the index shows.
    """

    def __init__(self, folder: Path, *, check: bool = True) -> None:
        self.folder = folder
        remedy = "Copy the folder again from where it is whole, or run capmerge pack-latents again."
        columns = Columns(folder / INDEX, _SCHEMA, remedy, read_all=check)
        names = Columns(folder / NAMES, _NAMES_SCHEMA, remedy, read_all=check)
        self.identity: str = columns.about["identity"]
        """A hash of the names, places and checksums of all members."""
        self.dtype: str = columns.about["dtype"]
        """What became of the type of the latents: "keep" or "fp16"."""
        self.roots: list[str] = columns.about.get("roots", [])
        """The folders, with a slash behind, under which absolute keys find the members."""
        self._columns = {name: columns[name] for name in _PLACES}
        self._rows = columns.rows
        self._text = names["text"]
        self._open = OpenFiles()
        ends = self._columns["name_end"]
        if names.about["identity"] != self.identity or (
            self._rows and int(ends[-1]) != len(self._text)
        ):
            raise StaleError(
                f"{printable(str(folder / NAMES))}: it does not belong to {INDEX} beside it. "
                f"{remedy}"
            )
        if check:
            self._check_shards(remedy)

    def __len__(self) -> int:
        return self._rows

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.folder, self.identity)

    def __getitem__(self, number: int) -> "Member":
        """Return the member of this number, in the order of the shards."""
        return Member(self, number)

    def names(self) -> Iterator[str]:
        """Yield the names of all members in their order, written with slashes."""
        start = 0
        for first in range(0, self._rows, 1 << 16):
            ends = self._columns["name_end"][first : first + (1 << 16)].tolist()
            text = self._text[start : ends[-1]].tobytes()
            for end in ends:
                yield os.fsdecode(text[start - ends[-1] + len(text) : end - ends[-1] + len(text)])
                start = end

    def name(self, number: int) -> str:
        """Return the name of a member."""
        ends = self._columns["name_end"]
        return os.fsdecode(
            self._text[int(ends[number - 1]) if number else 0 : int(ends[number])].tobytes()
        )

    def place(self, number: int) -> Place:
        """Return where a member lies."""
        columns = self._columns
        return Place(
            int(columns["shard"][number]),
            int(columns["start"][number]),
            int(columns["size"][number]),
        )

    def shard(self, number: int) -> OpenFile:
        """Return an open shard. Raises `OSError` when it cannot be opened."""
        return self._open[self.folder / shard_name(number)]

    def _check_shards(self, remedy: str) -> None:
        """Compare the sizes of all shards with the end of the last member of each."""
        numbers = self._columns["shard"]
        if not self._rows:
            return
        for row in np.flatnonzero(np.append(numbers[1:] != numbers[:-1], True)).tolist():
            number, start, size = self.place(row)
            path = self.folder / shard_name(number)
            expected = start + padded(size) + len(END)
            try:
                found = path.stat().st_size
            except OSError as error:
                raise StaleError(
                    f"{printable(str(path))}: {error.strerror}, expected a shard of "
                    f"{expected:,} bytes. {remedy}"
                ) from error
            if found != expected:
                raise StaleError(
                    f"{printable(str(path))}: found {found:,} bytes, expected {expected:,}: the "
                    f"shard was cut off, extended or replaced. {remedy}"
                )


class Member:
    """A file in a shard, which can be read like a file of its own."""

    def __init__(self, shards: Shards, number: int) -> None:
        self.shards, self.number = shards, number

    @property
    def name(self) -> str:
        """The last part of its name, as that of a `Path`."""
        return self.shards.name(self.number).rpartition("/")[2]

    def __str__(self) -> str:
        shard = shard_name(self.shards.place(self.number).shard)
        return f"{self.shards.folder / shard}, member {self.shards.name(self.number)}"

    def open(self) -> "Window":
        """Open it. Raises `OSError`, and `DamagedShardError` when another member is found there."""
        place = self.shards.place(self.number)
        shard = self.shards.shard(place.shard)
        head = read_at(shard.descriptor, BLOCK, place.start - BLOCK)
        name = os.fsencode(self.shards.name(self.number))[:_NAME_BYTES]
        if head[:_NAME_BYTES] != name.ljust(_NAME_BYTES, b"\0"):
            found = printable(os.fsdecode(head[:_NAME_BYTES].rstrip(b"\0")))
            raise DamagedShardError(
                f"found {found!r} at byte {place.start:,} of the shard, expected this member"
            )
        return Window(shard, place.start, place.size)

    def read(self) -> bytes:
        """Return all its bytes. Raises what `open` raises."""
        with self.open() as window:
            return window.read()


class Window(io.RawIOBase):
    """The bytes of a member as a file."""

    def __init__(self, shard: OpenFile, start: int, size: int) -> None:
        super().__init__()
        self._shard, self._start, self._size, self._at = shard, start, size, 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def seekable(self) -> bool:
        """Return True."""
        return True

    def tell(self) -> int:
        """Return the offset of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move to an offset from the start, from here or from the end."""
        at = offset + (0, self._at, self._size)[whence]
        if at < 0:
            raise ValueError(f"a seek to byte {at}")
        self._at = at
        return at

    def readinto(self, buffer: Any, /) -> int:
        """Fill `buffer`; raises `DamagedShardError` where the shard ends before the member does."""
        view = memoryview(buffer).cast("B")[: max(0, self._size - self._at)]
        done = read_into(self._shard.descriptor, view, self._start + self._at) if len(view) else 0
        if done != len(view):
            raise DamagedShardError(
                f"the shard ends at byte {self._start + self._at + done:,}, inside of this member"
            )
        self._at += done
        return done


def padded(size: int) -> int:
    """Return the bytes that a member of this size takes in a tar file."""
    return -(-size // BLOCK) * BLOCK


def write_index(folder: Path, about: dict[str, Any], rows: ScratchFile, names: ScratchFile) -> None:
    """Write the index of the shards in `folder` from its rows and names.

    `about` has the `identity`, the `dtype`, and `roots` where keys are absolute.
    """
    count = rows.written_bytes // ROW.itemsize
    with AtomicFile(folder / INDEX) as file:
        columns = {name: Column(_PLACES[name], _column(rows, name)) for name in _PLACES}
        head = {"kind": _SCHEMA.kind, "version": _SCHEMA.version, **about}
        write_columns(file, head, count, columns)
        file.publish()
    with AtomicFile(folder / NAMES) as file:
        head = {"kind": _NAMES_SCHEMA.kind, "version": _NAMES_SCHEMA.version}
        text = {"text": Column(np.dtype("u1"), names.parts(1 << 20))}
        write_columns(file, {**head, "identity": about["identity"]}, names.written_bytes, text)
        file.publish()


def _column(rows: ScratchFile, name: str) -> Iterator[bytes]:
    for part in rows.parts((1 << 16) * ROW.itemsize):
        yield np.frombuffer(part, ROW)[name].tobytes()


def _open_again(folder: Path, identity: str) -> Shards:
    """Open pickled shards, which another process opened first."""
    shards = Shards(folder, check=False)
    if shards.identity != identity:
        raise StaleError(
            f"{printable(str(folder))}: the shards were replaced while they were in use. Run again."
        )
    return shards
