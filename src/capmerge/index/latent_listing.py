"""Which latents each record of an index has in one folder: found by listing the folder once, kept in a file beside the index.

No name is ever probed. It is built from the record's key and what the listing knows, so two stems
with one hash can give a name that does not exist, but never the name of another record's file.
Knows nothing of what is in the files.
"""

import os
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from capmerge.errors import CapmergeError, StaleError, UsageError, printable, quoted
from capmerge.files.atomic import AtomicFile, side_path
from capmerge.files.columns import Column, Columns, opened_or_made, parts_of, write_columns
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
from capmerge.index.latent_scan import Found, folders_of, iter_latents, latents_in
from capmerge.index.reader import Index

if TYPE_CHECKING:
    from numpy.typing import NDArray

KIND, VERSION = "capmerge.listing", 1

_FILES_A_REPORT = 1 << 14
_MOST_FOLDERS_REMEMBERED = 1 << 16


class Listing:
    """The opened listing of `folder`: a row for each record of the index, each column a read-only array mapped from disk.

    It can be pickled: it is opened again by its path.
    """

    def __init__(self, folder: Path, columns: Columns) -> None:
        self.folder = folder
        self.path = columns.path
        self.fingerprint: str = columns.about["fingerprint"]
        """That of the index."""
        self.form: NDArray[np.uint8] = columns["form"]
        """The sum of the forms that were found: `LEGACY` and those of `SIZED`; 0 for none."""
        self.found: int = columns.about["found"]
        """Records that have at least one file."""
        self.outside: bool = columns.about["outside"]
        """Whether folders that keys lead out to were listed too."""
        self.unlisted: int = columns.about["unlisted"]
        """Records without a file whose key leads out of the folder."""
        self._sizes = {
            suffix: (columns["width" + suffix], columns["height" + suffix]) for suffix in SIZED
        }
        self._roots = _roots(folder)
        self._real_folders: set[str] = set()
        self._columns = columns

    def __len__(self) -> int:
        return self._columns.rows

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.folder, self.path, self.fingerprint)

    def file_of(
        self, number: int, key: str, suffixes: tuple[str, ...], *, allow_outside: bool = False
    ) -> Path | None:
        """The latents of record `number` with this `key`; None when there were none.

        `suffixes`: which of `SIZED` the model takes, the best first; a legacy name goes before all,
        as sd-scripts has it. Raises `CapmergeError` when the key leads out of the folder, itself or
        by a link, unless `allow_outside`.
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
        """Whether a file below the folder lies there in truth, links followed."""
        parent = str(path.parent)
        if parent not in self._real_folders:
            if not _is_below(os.path.realpath(parent) + "/", self._roots[-1]):
                return False
            if len(self._real_folders) == _MOST_FOLDERS_REMEMBERED:
                self._real_folders.clear()
            self._real_folders.add(parent)
        return not path.is_symlink() or _is_below(os.path.realpath(path), self._roots[-1])

    def _leads_out(self, key: str, place: str) -> CapmergeError:
        return CapmergeError(
            f"{printable(str(self.folder))}, record {quoted(key)}: its latents would be {quoted(place)}, expected a file in this folder. "
            "If that is meant, set allow_outside = true."
        )


def ensure_listing(
    index: Index,
    folder: Path,
    *,
    relist: bool = False,
    allow_outside: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Listing:
    """The listing of `folder` for the records of `index`, made first when there is none that fits; `relist` makes it anew.

    With `allow_outside` the folders that keys lead out to are listed too. `progress` is told how
    many files were seen. Raises `UsageError` when the folder is missing, and `OutputError`.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{printable(str(folder))}: there is no such folder. Name the folder of the cached latents."
        )
    path = listing_path(index, folder)

    def look() -> Listing | None:
        if relist:
            return None
        try:
            listing = _open(index.fingerprint, folder, path)
        except StaleError:
            return None
        return None if allow_outside and listing.unlisted and not listing.outside else listing

    def make(file: AtomicFile) -> Listing:
        _make(index, folder, file, progress, outside=allow_outside)
        return _open(index.fingerprint, folder, path)

    return opened_or_made(path, look, make)


def listing_path(index: Index, folder: Path) -> Path:
    """Where the listing of `folder` lies: beside the index, named after the folder's path."""
    name = blake2b(_absolute(folder).encode("utf-8", "surrogateescape"), digest_size=4).hexdigest()
    return side_path(index.metadata.resolve(), f".latents-{name}")


def _open(fingerprint: str, folder: Path, path: Path) -> Listing:
    remedy = "List the folder anew: capmerge index FILE --latents DIR --relist"
    columns = Columns(path, KIND, VERSION, remedy)
    if columns.about.get("fingerprint") != fingerprint or columns.about.get("folder") != _absolute(
        folder
    ):
        raise StaleError(
            f"{printable(str(path))}: it is of other metadata, or of another folder. {remedy}"
        )
    return Listing(folder, columns)


def _open_again(folder: Path, path: Path, fingerprint: str) -> Listing:
    return _open(fingerprint, folder, path)


def _absolute(folder: Path) -> str:
    return os.path.abspath(folder)  # noqa: PTH100  # Path.absolute() keeps `..`


def _roots(folder: Path) -> tuple[str, ...]:
    """The paths of the folder that absolute keys can begin with, as stems are written; the real one last."""
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
    """List `folder` and write what was found into `file`."""
    found = Found(index)
    roots = (
        [f"{root.rstrip('/')}/" for root in _roots(folder)]
        if bool((index.leads == ABSOLUTE).any())
        else []
    )
    for below, name in iter_latents(_absolute(folder)):
        found.add([below, *(root + below for root in roots)], name)
        if progress and not found.seen % _FILES_A_REPORT:
            progress(found.seen)
    found.match()
    leading_out = np.flatnonzero((index.leads != INSIDE) & (found.form == 0))
    if outside:
        for prefix, path in folders_of(index, folder, leading_out):
            for name in latents_in(path):
                found.add([prefix], name)
        found.match()
    if progress:
        progress(found.seen)
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
