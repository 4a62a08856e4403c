"""The listing of a folder of latents: which files each record of an index has there.

The folder is walked once, and the result is kept in a file beside the index. No name is ever
probed. A name is built from the record's key and what the listing knows, so two stems with one hash
can give a name that does not exist, but never the name of another record's file. The content of
the latents is not looked at.
"""

import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capmerge.errors import CapmergeError, StaleError, UsageError, printable, quoted
from capmerge.files.atomic import AtomicFile, side_path
from capmerge.files.columns import (
    Column,
    Columns,
    Schema,
    opened_or_made,
    parts_of,
    write_columns,
)
from capmerge.index.latent_names import (
    ABOVE,
    ABSOLUTE,
    INSIDE,
    LEGACY,
    SIZED,
    legacy_name,
    sized_name,
    stem_of,
)
from capmerge.index.latent_scan import (
    SIZE_COLUMNS,
    Found,
    folders_of,
    iter_latents,
    latents_in,
)
from capmerge.index.reader import Index

if TYPE_CHECKING:
    from numpy.typing import NDArray

KIND, VERSION = "capmerge.listing", 1
_SCHEMA = Schema(
    KIND,
    VERSION,
    {"fingerprint": str, "folder": str, "found": int, "outside": bool, "unlisted": int},
    {"form": np.dtype("u1"), **dict.fromkeys(SIZE_COLUMNS, np.dtype("<u4"))},
)

_FILES_PER_REPORT = 1 << 14
_MOST_FOLDERS_REMEMBERED = 1 << 16


class Listing:
    """The opened listing of `folder`, with one row per record of the index.

    Each column is a read-only array mapped from disk. A pickled listing is opened again by its
    path.
    """

    def __init__(self, folder: Path, columns: Columns) -> None:
        self.folder = folder
        self.path = columns.path
        self.fingerprint: str = columns.about["fingerprint"]
        """The fingerprint of the index that the listing belongs to."""
        self.form: NDArray[np.uint8] = columns["form"]
        """The forms of each record's files, `LEGACY` and those of `SIZED` added up; 0 for none."""
        self.found: int = columns.about["found"]
        """The number of records that have at least one file."""
        self.outside: bool = columns.about["outside"]
        """True if the folders outside that keys lead to were listed too."""
        self.unlisted: int = columns.about["unlisted"]
        """The number of records without a file whose key leads out of the folder."""
        self._sizes = {
            suffix: (columns["width" + suffix], columns["height" + suffix]) for suffix in SIZED
        }
        self._roots = _roots(folder)
        self._real_folders: set[str] = set()
        self._columns = columns

    def __len__(self) -> int:
        return self._columns.rows

    def __reduce__(self) -> tuple[Any, ...]:
        return _open, (self.folder, self.path, self.fingerprint, len(self))

    def file_of(
        self, number: int, key: str, suffixes: tuple[str, ...], *, allow_outside: bool = False
    ) -> Path | None:
        """Return the latents file of record `number` with this `key`; None if there was none.

        `suffixes` are the forms of `SIZED` that the model takes, the best first; a legacy name
        goes before them all, as in sd-scripts. Raises `CapmergeError` when the key leads out of the
        folder, by itself or through a link, unless `allow_outside`.
        """
        stem, leads = stem_of(key)
        if not allow_outside and (
            leads == ABOVE
            or (leads == ABSOLUTE and not any(_is_below(stem, root) for root in self._roots))
        ):
            raise self._leads_out(key, stem)
        name = self._name(number, stem, suffixes)
        if name is None:
            return None
        path = self.folder / name
        if not allow_outside and not self._stays(path):
            raise self._leads_out(key, os.path.realpath(path))
        return path

    def _name(self, number: int, stem: str, suffixes: tuple[str, ...]) -> str | None:
        form = int(self.form[number])
        if form & LEGACY:
            return legacy_name(stem)
        for suffix in suffixes:
            if form & SIZED[suffix]:
                widths, heights = self._sizes[suffix]
                return sized_name(stem, int(widths[number]), int(heights[number]), suffix)
        return None

    def _stays(self, path: Path) -> bool:
        """Return whether a path below the folder is still inside it once links are followed."""
        parent = str(path.parent)
        if parent not in self._real_folders:
            if not _is_below(os.path.realpath(parent) + "/", self._roots[-1]):
                return False
            if len(self._real_folders) == _MOST_FOLDERS_REMEMBERED:
                self._real_folders.clear()
            self._real_folders.add(parent)
        return not path.is_symlink() or _is_below(os.path.realpath(path), self._roots[-1])

    def _leads_out(self, key: str, path: str) -> CapmergeError:
        return CapmergeError(
            f"{printable(str(self.folder))}, record {quoted(key)}: its latents would be "
            f"{quoted(path)}, expected a file in this folder. "
            "If that is intended, set allow_outside = true."
        )


def ensure_listing(
    index: Index,
    folder: Path,
    *,
    relist: bool = False,
    allow_outside: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Listing:
    """Return the listing of `folder` for the records of `index`, made first if none fits.

    `relist` makes it again in any case. With `allow_outside` the folders outside that keys lead to
    are listed too. `progress` is told how many files were seen. Raises `UsageError` when the folder
    is missing, and `OutputError` when the listing cannot be written.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{printable(str(folder))}: there is no such folder. "
            "Name the folder of the cached latents."
        )
    path = listing_path(index, folder)

    def look() -> Listing | None:
        if relist:
            return None
        try:
            listing = _open(folder, path, index.fingerprint, len(index))
        except StaleError:
            return None
        return None if allow_outside and listing.unlisted and not listing.outside else listing

    def make(file: AtomicFile) -> Listing:
        _make(index, folder, file, progress, outside=allow_outside)
        return _open(folder, path, index.fingerprint, len(index))

    return opened_or_made(path, look, make)


def listing_path(index: Index, folder: Path) -> Path:
    """Return the path of the listing of `folder`: beside the index, named after the folder."""
    name = blake2b(_absolute(folder).encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
    return side_path(index.metadata.resolve(), f".latents-{name}")


def _open(folder: Path, path: Path, fingerprint: str, records: int) -> Listing:
    """Open the listing of `folder` for the index that has this fingerprint and so many records."""
    remedy = "List the folder again: capmerge index FILE --latents DIR --relist"
    columns = Columns(path, _SCHEMA, remedy)
    if (columns.about["fingerprint"], columns.about["folder"]) != (fingerprint, _absolute(folder)):
        raise StaleError(
            f"{printable(str(path))}: it was made for other metadata or another folder. {remedy}"
        )
    if columns.rows != records:
        raise StaleError(
            f"{printable(str(path))}: the file is broken: found {columns.rows:,} rows, "
            f"expected the index's {records:,}. {remedy}"
        )
    return Listing(folder, columns)


def _absolute(folder: Path) -> str:
    return os.path.abspath(folder)  # noqa: PTH100  # Path.absolute() keeps `..`


def _roots(folder: Path) -> tuple[str, ...]:
    """Return the paths of the folder that absolute keys can begin with, the real one last.

    They are written with slashes, as stems are.
    """
    given, real = (
        path.replace(os.sep, "/") for path in (_absolute(folder), os.path.realpath(folder))
    )
    return tuple(dict.fromkeys((given, real))) if given != real else (real,)


def _is_below(path: str, root: str) -> bool:
    return path.replace(os.sep, "/").startswith(root.rstrip("/") + "/")


def _make(
    index: Index,
    folder: Path,
    file: AtomicFile,
    progress: Callable[[int], None] | None,
    *,
    outside: bool,
) -> None:
    """List `folder` and write the listing into `file`."""
    # Walk the folder. An absolute key can name a file below it by either path of the folder.
    found = Found(index)
    roots = (
        [f"{root.rstrip('/')}/" for root in _roots(folder)]
        if bool((index.leads == ABSOLUTE).any())
        else []
    )
    for below, name in iter_latents(_absolute(folder)):
        found.add([below, *(root + below for root in roots)], name)
        if progress and not found.seen % _FILES_PER_REPORT:
            progress(found.seen)
    found.match()

    # List what lies outside, which only the keys without a file inside can lead to.
    leading_out = np.flatnonzero((index.leads != INSIDE) & (found.form == 0))
    if outside:
        for prefix, path in folders_of(index, folder, leading_out):
            for name in latents_in(path):
                found.add([prefix], name)
        found.match()
    if progress:
        progress(found.seen)

    # Choose between several sizes of one picture, then write.
    found.settle(folder)
    about = {
        "kind": KIND,
        "version": VERSION,
        "fingerprint": index.fingerprint,
        "folder": _absolute(folder),
        "found": int(np.count_nonzero(found.form)),
        "outside": outside,
        "unlisted": int(np.count_nonzero(found.form[leading_out] == 0)),
    }
    columns: dict[str, NDArray[Any]] = {"form": found.form, **found.sizes}
    write_columns(
        file,
        about,
        len(index),
        {name: Column(column.dtype, parts_of(column)) for name, column in columns.items()},
    )
    file.publish()
