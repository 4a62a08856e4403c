"""The listing of a folder of latents: which files each record of an index has there.

`latent_build` walks the folder once, and the result is kept in a file beside the index. No name is
ever probed. A name is built from the record's key and what the listing knows, so two stems with one
hash can give a name that does not exist, but never the name of another record's file. Of a file
that is opened the listing has the sizes of its latents, which decide the bucket of its record.
"""

import errno
import os
from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capmerge.errors import CapmergeError, StaleError, printable, quoted
from capmerge.files.atomic import side_path
from capmerge.files.columns import Columns, Schema
from capmerge.files.shards import Member, Shards, is_packed
from capmerge.index.latent_choice import Buckets, Wanted, buckets_of, scored
from capmerge.index.latent_match import CHOICE, PACKED_CHOICE
from capmerge.index.latent_names import (
    ABOVE,
    ABSOLUTE,
    BROKEN,
    SIZED,
    legacy_name,
    sized_name,
    stem_of,
)
from capmerge.index.latent_roots import absolute, is_below, roots_of
from capmerge.index.reader import Index
from capmerge.metadata.format import INDEX

KIND, PACKED_KIND, VERSION = "capmerge.listing", "capmerge.packed-listing", 2
_SCHEMA = Schema(
    KIND,
    VERSION,
    {
        "fingerprint": str,
        "folder": str,
        "records": int,
        "found": int,
        "outside": bool,
        "unlisted": int,
        "opened": int,
        "differing": int,
    },
    {name: CHOICE[name] for name in CHOICE.names or ()},
)
_PACKED_SCHEMA = Schema(
    PACKED_KIND,
    VERSION,
    {**_SCHEMA.entries, "shards": str},
    {name: PACKED_CHOICE[name] for name in PACKED_CHOICE.names or ()},
)

REMEDY = "List the folder again: capmerge index FILE --latents DIR --relist"
"""The last sentence of every message about a listing that has to be made anew."""
ROWS_AT_ONCE = 1 << 18
"""The rows of a listing that are handled together."""
_MOST_FOLDERS_REMEMBERED = 1 << 16


class Listing:
    """The opened listing of `folder`: one row per latents file, or per size in such a file.

    The files of a folder with `shards` are their members.

    Each column is a read-only array mapped from disk. A pickled listing is opened again by its
    path.
    """

    def __init__(self, folder: Path, columns: Columns, shards: Shards | None = None) -> None:
        self.folder, self.shards = folder, shards
        self.path = columns.path
        self.fingerprint: str = columns.about["fingerprint"]
        """The fingerprint of the index that the listing belongs to."""
        self.records: int = columns.about["records"]
        """The number of records in that index."""
        self.found: int = columns.about["found"]
        """The number of records that have at least one file."""
        self.outside: bool = columns.about["outside"]
        """True if the folders outside that keys lead to were listed too."""
        self.unlisted: int = columns.about["unlisted"]
        """The number of records without a file whose key leads out of the folder."""
        self.opened: int = columns.about["opened"]
        """The number of files that were opened to see their sizes."""
        self.differing: int = columns.about["differing"]
        """The number of records whose opened files hold no latents of their `train_resolution`."""
        dtype = CHOICE if shards is None else PACKED_CHOICE
        self._rows = {name: columns[name] for name in dtype.names or ()}
        self._roots = roots_of(folder) if shards is None else (*shards.roots, *roots_of(folder))
        self._real_folders: set[str] = set()

    def __len__(self) -> int:
        return len(self._rows["record"])

    def __reduce__(self) -> tuple[Any, ...]:
        if self.shards is None:
            return open_listing, (self.folder, self.path, self.fingerprint, self.records)
        return _open_packed, (self.shards, self.folder, self.path, self.fingerprint, self.records)

    @property
    def broken(self) -> int:
        """The number of files in which no latents were found when they were opened."""
        form = self._rows["form"]
        return sum(
            int(np.count_nonzero(form[start : start + ROWS_AT_ONCE] & BROKEN))
            for start in range(0, len(form), ROWS_AT_ONCE)
        )

    def file_of(
        self, number: int, key: str, wanted: Wanted, index: Index, *, allow_outside: bool = False
    ) -> Path | Member | None:
        """Return the latents file of record `number` with this `key`; None if there was none.

        Raises `CapmergeError` when the key leads out of the folder, by itself or through a link,
        unless `allow_outside`.
        """
        stem, leads = stem_of(key)
        if not allow_outside and (
            leads == ABOVE
            or (leads == ABSOLUTE and not any(is_below(stem, root) for root in self._roots))
        ):
            raise self._leads_out(key, stem)
        row = self._best_row(number, wanted, index)
        if row is None:
            return None
        if self.shards is not None:
            return self.shards[int(self._rows["member"][row])]
        names = ("form", "name_width", "name_height")
        path = self.folder / _file_name(stem, *(int(self._rows[name][row]) for name in names))
        if not allow_outside and not self._stays(path):
            raise self._leads_out(key, os.path.realpath(path))
        return path

    def buckets(self, wanted: Wanted, index: Index) -> Buckets:
        """Return the bucket of every record of `index`: that of the choice that `file_of` takes."""
        if not self.opened and wanted.resolution is None:
            # All files have legacy names, and their sizes are those of the index.
            return Buckets(index.width, index.height, self.has_file(), 0, 0, 0)
        return buckets_of(self._parts(), wanted, index)

    def has_file(self) -> NDArray[np.bool_]:
        """Return for every record of the index whether it has a file, even a broken one."""
        found = np.zeros(self.records, np.bool_)
        for rows in self._parts():
            found[rows["record"]] = True
        return found

    def iter_files(self, index: Index) -> Iterator[tuple[Path | Member, int, str]]:
        """Yield every listed file, once per record that it is of, with the record's number and key.

        They come in the order of the records, and of one record's files the preferred first.
        """
        before: tuple[int, ...] = ()
        key = stem = ""
        for rows in self._parts():
            names = ("record", "form", "name_width", "name_height")
            members = rows["member"] if self.shards is not None else None
            columns = [rows[name] for name in names]
            entries = zip(*(column.tolist() for column in columns), strict=True)
            for row, entry in enumerate(entries):
                if entry == before:
                    continue
                number, form, width, height = entry
                if before[:1] != entry[:1]:
                    key = index.read(number)[0]
                    stem = stem_of(key).text
                before = entry
                if self.shards is not None and members is not None:
                    yield self.shards[int(members[row])], number, key
                else:
                    yield self.folder / _file_name(stem, form, width, height), number, key

    def below(self, path: Path) -> str:
        """Return the path of a listed file below the folder; an absolute key leads there too."""
        for start in (self.folder, *map(Path, self._roots)):
            if path.is_relative_to(start):
                return path.relative_to(start).as_posix()
        raise AssertionError(f"{path} was not listed")

    def check_inside(self, path: Path) -> None:
        """Raise `OSError` when the folder of a listed file lies outside, behind a link."""
        if not is_below(os.path.realpath(path.parent) + "/", self._roots[-1]):
            raise OSError(errno.EXDEV, "a link leads out of the folder of latents")

    def _parts(self) -> Iterator[dict[str, NDArray[Any]]]:
        """All rows in parts, each with all rows of its records."""
        records, start = self._rows["record"], 0
        while start < len(records):
            end = min(start + ROWS_AT_ONCE, len(records))
            end = int(np.searchsorted(records, records[end - 1], "right"))
            yield {name: column[start:end] for name, column in self._rows.items()}
            start = end

    def _best_row(self, number: int, wanted: Wanted, index: Index) -> int | None:
        records, record = self._rows["record"], np.uint32(number)
        start, end = (int(np.searchsorted(records, record, side)) for side in ("left", "right"))
        if start == end:
            return None
        _, scores = scored(
            {name: column[start:end] for name, column in self._rows.items()}, wanted, index
        )
        best = int(np.argmax(scores))
        return start + best if scores[best] else None

    def _stays(self, path: Path) -> bool:
        """Return whether a path below the folder is still inside it once links are followed."""
        parent = str(path.parent)
        if parent not in self._real_folders:
            if not is_below(os.path.realpath(parent) + "/", self._roots[-1]):
                return False
            if len(self._real_folders) == _MOST_FOLDERS_REMEMBERED:
                self._real_folders.clear()
            self._real_folders.add(parent)
        return not path.is_symlink() or is_below(os.path.realpath(path), self._roots[-1])

    def _leads_out(self, key: str, path: str) -> CapmergeError:
        return CapmergeError(
            f"{printable(str(self.folder))}, record {quoted(key)}: its latents would be "
            f"{quoted(path)}, expected a file in this folder. "
            "If that is intended, set allow_outside = true."
        )


def _file_name(stem: str, form: int, width: int, height: int) -> str:
    for suffix, value in SIZED.items():
        if form & ~BROKEN == value:
            return sized_name(stem, width, height, suffix)
    return legacy_name(stem)


def listing_path(index: Index, folder: Path, beside: Path | None = None) -> Path:
    """Return the path of the listing of `folder`, named after the folder.

    It is beside the index, or `beside` the path of another one.
    """
    name = blake2b(absolute(folder).encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
    place = beside or index.path
    stem = place.name.removesuffix(INDEX) or place.name
    return side_path(place.with_name(stem), f".latents-{name}")


def open_listing(folder: Path, path: Path, fingerprint: str, records: int) -> Listing:
    """Open the listing of `folder` for the index that has this fingerprint and so many records.

    Raises `StaleError`, also for shards in the folder that are damaged.
    """
    shards = Shards(folder) if is_packed(folder) else None
    return _open_packed(shards, folder, path, fingerprint, records)


def _open_packed(
    shards: Shards | None, folder: Path, path: Path, fingerprint: str, records: int
) -> Listing:
    """Open the listing of a folder whose shards are open; None for loose files."""
    columns = Columns(path, _SCHEMA if shards is None else _PACKED_SCHEMA, REMEDY)
    expected = (fingerprint, absolute(folder), None if shards is None else shards.identity)
    if tuple(columns.about.get(name) for name in ("fingerprint", "folder", "shards")) != expected:
        raise StaleError(
            f"{printable(str(path))}: it was made for other metadata or another folder. {REMEDY}"
        )
    # Padding is zero like the rows that a too large row count reads from it; no form is 0.
    if columns.rows and not columns["form"][-1]:
        raise StaleError(
            f"{printable(str(path))}: the file is broken: found no file in the last of its "
            f"{columns.rows:,} rows. {REMEDY}"
        )
    last = int(columns["record"][-1]) if columns.rows else 0
    if (
        columns.about["records"] != records
        or (records and last >= records)
        or (columns.rows and not records)
    ):
        raise StaleError(
            f"{printable(str(path))}: the file is broken: found choices for "
            f"{max(columns.about['records'], last + 1):,} records, "
            f"expected the index's {records:,}. {REMEDY}"
        )
    return Listing(folder, columns, shards)
