"""The records of any metadata and their latents: an index and a listing for one command.

Metadata that are not rewritten yet have no index that a run could use. The commands that check and
pack latents need only keys and sizes, and keep what they need in a folder of their own.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from capmerge.errors import StaleError
from capmerge.index.build import build_index
from capmerge.index.latent_build import ensure_listing
from capmerge.index.latent_listing import Listing
from capmerge.index.reader import Index, open_index

Progress = Callable[[int], None]


def index_of_any(
    metadata: Path, work: Path, jobs: int, progress: Progress | None, max_record_bytes: int
) -> Index:
    """Return an index of metadata of any kind: that beside it if one fits, else one in `work`.

    Raises what `build_index` raises.
    """
    at = work / "metadata.index"
    for place in (None, at):
        try:
            return open_index(metadata, place)
        except StaleError:
            continue
    return build_index(
        metadata,
        at=at,
        jobs=jobs,
        progress=progress,
        tokens=False,
        rewritten=False,
        max_record_bytes=max_record_bytes,
    )


def listing_anew(
    index: Index, latents: Path, work: Path, jobs: int, progress: Progress | None
) -> Listing:
    """Return a new listing of the folder `latents`, kept in `work`.

    Raises what `ensure_listing` raises.
    """
    return ensure_listing(
        index,
        latents,
        beside=work / "metadata.index",
        relist=True,
        jobs=jobs,
        progress=progress,
    )


def iter_missing(index: Index, listing: Listing) -> Iterator[tuple[int, str]]:
    """Yield the number and the key of every record without a file in the listing, in order."""
    for record in np.flatnonzero(~listing.has_file()):
        yield int(record), index.read(int(record))[0]
