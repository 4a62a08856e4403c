"""The making of a listing: a folder of latents -> names -> the choices of each record -> one file.

`capmerge index --latents` and the trainer both make listings by this module.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capmerge.errors import StaleError, UsageError, printable
from capmerge.files.atomic import AtomicFile
from capmerge.files.columns import Column, opened_or_made, write_columns
from capmerge.files.shards import Shards, is_packed
from capmerge.index.latent_listing import (
    KIND,
    PACKED_KIND,
    REMEDY,
    ROWS_AT_ONCE,
    VERSION,
    Listing,
    listing_path,
    open_listing,
)
from capmerge.index.latent_match import Found, sizes_of
from capmerge.index.latent_names import ABSOLUTE, INSIDE
from capmerge.index.latent_pool import FilePool
from capmerge.index.latent_roots import absolute, roots_of
from capmerge.index.latent_scan import folders_of, iter_latents, latents_in, members_of
from capmerge.index.reader import Index


def ensure_listing(
    index: Index,
    folder: Path,
    *,
    beside: Path | None = None,
    relist: bool = False,
    allow_outside: bool = False,
    jobs: int = 1,
    progress: Callable[[int], None] | None = None,
    tell: Callable[[str], None] | None = None,
) -> Listing:
    """Return the listing of `folder` for the records of `index`, made first if none fits.

    It lies beside the index, or `beside` the path of another one. `relist` makes it again in any
    case. With `allow_outside` the folders outside that keys lead to are listed too. `jobs`
    processes open the files whose sizes have to be seen; any number of them gives the same bytes.
    `progress` is told how many files are done, and `tell` why an older listing is made again and
    how fast files were opened. Raises `UsageError` when the folder is
    missing, `OutputError` when the listing cannot be written, and `WorkerError`.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{printable(str(folder))}: there is no such folder. "
            "Name the folder of the cached latents."
        )
    path = listing_path(index, folder, beside)
    stale: list[str] = []

    def look() -> Listing | None:
        if relist:
            return None
        try:
            listing = open_listing(folder, path, index.fingerprint, len(index))
        except StaleError as error:
            stale[:] = [str(error).removesuffix(REMEDY)] if path.exists() else []
            return None
        return None if allow_outside and listing.unlisted and not listing.outside else listing

    def make(file: AtomicFile) -> Listing:
        for problem in stale:
            _tell(tell, f"{problem}The folder is listed again.")
        _make(index, folder, file, jobs, progress, tell, outside=allow_outside)
        return open_listing(folder, path, index.fingerprint, len(index))

    return opened_or_made(path, look, make)


def _make(
    index: Index,
    folder: Path,
    file: AtomicFile,
    jobs: int,
    progress: Callable[[int], None] | None,
    tell: Callable[[str], None] | None,
    *,
    outside: bool,
) -> None:
    """List `folder` and write the listing into `file`."""
    shards = Shards(folder) if is_packed(folder) else None
    with FilePool(partial(sizes_of, shards), jobs) as pool:
        # Walk the folder. An absolute key can name a file below it by either path of the folder.
        found, top = Found(index, pool, progress, packed=shards is not None), absolute(folder)
        roots = roots_for(index, folder)
        if shards is not None:
            roots += shards.roots
            for number, (below, name) in enumerate(members_of(shards)):
                found.add([below, *(root + below for root in roots)], number, name)
        else:
            for below, name in iter_latents(top):
                found.add([below, *(root + below for root in roots)], f"{top}/{below}", name)
        found.match()

        # List what lies outside, which only the keys without a file inside can lead to.
        leading_out = np.flatnonzero((index.leads != INSIDE) & ~found.is_found)
        if outside and shards is None:
            for prefix, path in folders_of(index, folder, leading_out):
                for name in latents_in(path):
                    found.add([prefix], str(path), name)
            found.match()
    if progress:
        progress(found.seen)
    if found.opened:
        rate = found.opened / found.opening_seconds
        _tell(
            tell,
            f"{found.opened:,} latents files were opened to see their sizes, {rate:,.0f} files "
            f"per second.",
        )

    # Choose between several files of one picture, then write.
    rows, order = found.settle(folder)
    about = {
        "kind": KIND if shards is None else PACKED_KIND,
        "version": VERSION,
        "fingerprint": index.fingerprint,
        "folder": absolute(folder),
        "records": len(index),
        "found": int(np.count_nonzero(found.is_found)),
        "outside": outside,
        "unlisted": int(np.count_nonzero(~found.is_found[leading_out])),
        "opened": found.opened,
        "differing": _count_differing(rows, index),
    }
    if shards is not None:
        about["shards"] = shards.identity
    columns = {
        name: Column(rows.dtype[name], _parts_of(rows[name], order))
        for name in rows.dtype.names or ()
    }
    write_columns(file, about, len(order), columns)
    file.publish()


def roots_for(index: Index, folder: Path) -> list[str]:
    """Return what absolute keys can begin with to lead into the folder; nothing without such."""
    if not bool((index.leads == ABSOLUTE).any()):
        return []
    return [f"{root.rstrip('/')}/" for root in roots_of(folder)]


def _parts_of(column: NDArray[Any], order: NDArray[np.int64]) -> Iterator[bytes]:
    """Yield the bytes of a column whose rows are taken in this order."""
    for start in range(0, len(order), ROWS_AT_ONCE):
        yield column[order[start : start + ROWS_AT_ONCE]].tobytes()


def _count_differing(rows: NDArray[Any], index: Index) -> int:
    """The number of records whose opened files hold no latents of their `train_resolution`."""
    opened = rows[rows["width"] != 0]
    record = opened["record"]
    width, height = index.width[record], index.height[record]
    same = (width == opened["width"]) & (height == opened["height"])
    return len(np.setdiff1d(record[(width != 0) & ~same], record[same]))


def _tell(tell: Callable[[str], None] | None, text: str) -> None:
    if tell:
        tell(text)
