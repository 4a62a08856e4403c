"""Which records of a data set can be trained, and what is told about the others.

Everything is judged by the listing and the index; no record is parsed, except those that are named
in a message.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capmerge.errors import printable, quoted
from capmerge.index.latent_choice import Buckets, Wanted
from capmerge.index.latent_listing import Listing
from capmerge.index.latent_sizes import read_sizes
from capmerge.index.reader import Index
from trainer.config.settings import DataSettings
from trainer.data.buckets import WINDOW
from trainer.errors import LatentsError
from trainer.families import Family

MOST_LEFT_OUT = 0.01
"""The largest share of a data set's records that may lack latents."""
_NAMED_KEYS = 5


def wanted_of(family: Family, settings: DataSettings) -> Wanted:
    """The latents that a data set takes where a record has several."""
    return Wanted(family.latent_suffix, settings.resolution)


def check_resolution(buckets: Buckets, number: int, settings: DataSettings) -> Iterator[str]:
    """Notes on the sizes that were chosen.

    Raises `LatentsError` when no record has latents of the resolution that was asked for.
    """
    where, wanted = f"data.{number}", settings.resolution
    with_size = int(np.count_nonzero(buckets.width))
    if wanted is not None and with_size and not buckets.answering:
        raise LatentsError(
            f"{where}, {_shown(settings.latents)}: found no latents of data.resolution = {wanted}, "
            f"expected buckets of more than half of {wanted} x {wanted} px and at most that area. "
            "Cache the latents at that resolution, set another one, or leave it out."
        )
    if buckets.several and wanted is None:
        yield (
            f"{where}: {buckets.several:,} records have latents of several sizes, and the largest "
            "are trained. data.resolution = 512 would take those of that resolution."
        )
    elif wanted is not None and buckets.answering < with_size:
        yield (
            f"{where}: {with_size - buckets.answering:,} of {with_size:,} records have no latents "
            f"of data.resolution = {wanted}, and their largest are trained."
        )
    if buckets.differing:
        yield (
            f"{where}: the latents of {buckets.differing:,} records have another size than their "
            "train_resolution, and the size of the latents is their bucket."
        )


class LeftOut(NamedTuple):
    """The records of a data set that cannot be trained."""

    records: int
    without_latents: int
    broken: int
    """The number of those whose latents file was found broken when it was listed."""
    first: list[int]
    """The numbers of the first few of them, to be named in messages."""
    first_broken: int | None
    """The number of the first broken one."""


def find_usable(buckets: Buckets) -> tuple[NDArray[np.bool_] | None, LeftOut]:
    """A column that is False for unusable records, and a summary of those records.

    A record is unusable when it has no latents, or when no size was found in them. The column is
    None when every record is usable.
    """
    usable: NDArray[np.bool_] | None = None
    without_latents, broken = 0, 0
    first: list[int] = []
    first_broken: int | None = None
    for start in range(0, len(buckets.found), WINDOW):
        window = slice(start, start + WINDOW)
        found = buckets.found[window]
        good = found & (buckets.width[window] != 0)
        if good.all():
            continue
        usable = np.ones(len(buckets.found), np.bool_) if usable is None else usable
        usable[window] = good
        without_latents += int(np.count_nonzero(~found))
        (bad,) = np.nonzero(found & ~good)
        broken += len(bad)
        if first_broken is None and len(bad):
            first_broken = int(bad[0]) + start
        first += (np.flatnonzero(~good)[: _NAMED_KEYS - len(first)] + start).tolist()
    left_out = 0 if usable is None else int(np.count_nonzero(~usable))
    return usable, LeftOut(left_out, without_latents, broken, first, first_broken)


def check_left_out(
    left_out: LeftOut,
    number: int,
    settings: DataSettings,
    family: Family,
    index: Index,
    listing: Listing,
) -> Iterator[str]:
    """The notes on the records that are left out of data set number `number`.

    Raises `LatentsError` when `data.on_missing` allows none, or fewer.
    """
    if not left_out.records:
        return
    records = len(index)
    # Say what is missing, and of which records.
    places = ", ".join(_shown(settings.latents / f"<key>{ending}") for ending in _endings(family))
    why = [f"{left_out.without_latents:,} without latents ({places})"] * bool(
        left_out.without_latents
    )
    if left_out.first_broken is not None:
        why.append(
            f"{left_out.broken:,} with a broken latents file "
            f"({_broken_file(left_out.first_broken, settings, family, index, listing)})"
        )
    keys = ", ".join(quoted(index.read(record)[0]) for record in left_out.first)
    more = ", ..." if left_out.records > len(left_out.first) else ""
    found = (
        f"data.{number}, {_shown(settings.metadata)}: found {' and '.join(why)} "
        f"among {records:,} records; the first: {keys}{more}"
    )
    # Say what to do about it.
    source, folder = _shown(settings.metadata), _shown(settings.latents)
    relist = f"(capmerge index {source} --latents {folder} --relist)"
    lead_out = ""
    if listing.unlisted and not settings.allow_outside:
        lead_out = (
            f" {listing.unlisted:,} keys lead out of that folder: "
            "data.allow_outside = true allows this."
        )
    if settings.on_missing == "stop":
        raise LatentsError(
            f"{found}. Expected latents for every record. Cache those latents, "
            f"list the folder again if they were cached later {relist}, "
            f'or set data.on_missing = "skip".{lead_out}'
        )
    if left_out.records > MOST_LEFT_OUT * records:
        raise LatentsError(
            f'{found}. Expected at most {MOST_LEFT_OUT:.0%} with data.on_missing = "skip", '
            f"found {left_out.records / records:.1%}. Check data.latents and model.family; "
            f"list the folder again if the latents were cached later {relist}.{lead_out}"
        )
    yield f"{found}. Records left out: {left_out.records:,}."


def _broken_file(
    record: int, settings: DataSettings, family: Family, index: Index, listing: Listing
) -> str:
    """The broken latents file of a record, and what is wrong with it."""
    path = listing.file_of(
        record, index.read(record)[0], wanted_of(family, settings), index, allow_outside=True
    )
    # It was found broken when it was listed, so it has a name.
    assert path is not None
    problem = read_sizes(path).problem or "it was broken when it was listed"
    return f"{printable(str(path))}: {printable(problem)}"


def _endings(family: Family) -> list[str]:
    return [".npz", *(f"_<width>x<height>{suffix}.npz" for suffix in family.latent_suffix)]


def _shown(path: Path) -> str:
    return printable(str(path))
