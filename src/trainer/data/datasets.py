"""The opened data sets of a run: the index and the listing of each, and which records are usable.

Records without latents or with broken ones are counted here, before anything trains. No record is
parsed, however large the metadata is, except those that are named in a message or checked.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from capmerge.cores import usable_cores
from capmerge.errors import printable, quoted
from capmerge.files.shards import Member
from capmerge.files.source import BytesSource, FileSource, fingerprint_text
from capmerge.index.latent_choice import Buckets, Wanted
from capmerge.index.latent_listing import Listing
from capmerge.index.latent_sizes import read_sizes
from capmerge.index.reader import Index
from capmerge.tokens.chunks import CHUNK_TOKENS
from trainer.config.settings import (
    CaptionSettings,
    Config,
    DataSettings,
    TextSettings,
    family_of,
)
from trainer.data.buckets import WINDOW, SetRows
from trainer.data.latents import FILES_CHECKED, LatentsFile, check_latent_scale, with_way_out
from trainer.data.side_files import open_side_files
from trainer.errors import LatentsError
from trainer.families import Family

MOST_LEFT_OUT = 0.01
"""The largest share of a data set's records that may lack latents."""

_NAMED_KEYS = 5
_MOST_CHUNKS = (1 << 16) - 1
"""Chunk counts are kept in 16 bits, which is enough for a caption of 5 million tokens."""


@dataclass(frozen=True)
class DataSet:
    """One `[[data]]` section. It pickles as paths, so that every process maps the same pages."""

    number: int
    """The number of the `[[data]]` section, from 0."""
    settings: DataSettings
    captions: CaptionSettings
    """The `[caption]` section with the overrides of this data set."""
    family: Family
    index: Index
    listing: Listing
    rows: SetRows
    """The columns that the plan needs of it."""
    notes: tuple[str, ...]
    """Notes for the user: records left out, latents that look like those of another family."""

    def latents_file(self, record: int, key: str) -> LatentsFile | None:
        """The latents file of `record` of the index, whose key is `key`; None when none was listed.

        Raises `CapmergeError` when it is outside of the folder and `allow_outside` is off.
        """
        return self.listing.file_of(
            record,
            key,
            _wanted(self.family, self.settings),
            self.index,
            allow_outside=self.settings.allow_outside,
        )


def open_datasets(
    config: Config, *, jobs: int | None = None, relist: bool = False
) -> tuple[DataSet, ...]:
    """All data sets of a run, opened; missing indexes and listings are built first.

    They are built under a file lock and with a progress bar on a terminal. Call this before process
    groups start: a first launch may take minutes, while the other ranks wait. `jobs` processes
    (default: all usable cores) build an index; `relist` lists the folders of latents again.

    Raises `LatentsError` when records have no latents, or broken ones, and `data.on_missing` does
    not allow it, and the errors of `ensure_index` and `ensure_listing`.
    """
    return tuple(
        _open(config, number, jobs or usable_cores(), relist=relist)
        for number in range(len(config.data))
    )


def _open(config: Config, number: int, jobs: int, *, relist: bool) -> DataSet:
    # Open the index and the listing, building what is missing.
    settings, family = config.data[number], family_of(config.model)
    dynamic = config.text.dynamic_chunks
    notes: list[str] = []

    def tell(text: str) -> None:
        notes.append(f"data.{number}: {text}")

    index, listing = open_side_files(
        config, number, jobs, tell, tokens=True if dynamic else None, relist=relist
    )
    # Find the bucket of each record, and the records that can be trained.
    buckets = listing.buckets(_wanted(family, settings), index)
    notes += _check_resolution(buckets, number, settings)
    usable, left_out = _find_usable(buckets)
    notes += _check_left_out(left_out, number, settings, family, index, listing)
    if index.repeated:
        where = f"data.{number}, {_shown(settings.metadata)}"
        why = "because a later record has the same key"
        notes.append(f"{where}: records not trained, {why}: {index.repeated:,}.")
    rows = SetRows(
        buckets.width,
        buckets.height,
        _chunks(index, family, config.text) if dynamic else None,
        settings.repeats,
        usable,
    )
    opened = DataSet(
        number, settings, config.caption_of(number), family, index, listing, rows, tuple(notes)
    )
    # Check the scale of some latents. A random model takes any: the example latents serve all
    # families.
    if config.model.path == "random":
        return opened
    try:
        warning = check_latent_scale(
            _some_files(opened), family, skip_broken=settings.on_missing == "skip"
        )
    except LatentsError as error:
        raise with_way_out(error) from error
    if warning is None:
        return opened
    return replace(
        opened, notes=(*notes, f"WARNING: data.{number}, {_shown(settings.latents)}: {warning}")
    )


def latents_fingerprint(dataset: DataSet) -> str:
    """A fingerprint of up to 64 latents files, the same wherever they lie, packed or not."""
    hashed = hashlib.blake2b(digest_size=16)
    for file in _some_files(dataset):
        if isinstance(file, Member):
            content = fingerprint_text(BytesSource(file.name, file.read(), 0))
        elif file.is_file():
            with FileSource(file) as source:
                content = fingerprint_text(source)
        else:
            continue
        hashed.update(os.fsencode(f"{file.name} {content}\n"))
    return hashed.hexdigest()


def _wanted(family: Family, settings: DataSettings) -> Wanted:
    """The latents that a data set takes where a record has several."""
    return Wanted(family.latent_suffix, settings.resolution)


def _check_resolution(buckets: Buckets, number: int, settings: DataSettings) -> Iterator[str]:
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


class _LeftOut(NamedTuple):
    """The records of a data set that cannot be trained."""

    records: int
    without_latents: int
    broken: int
    """The number of those whose latents file was found broken when it was listed."""
    first: list[int]
    """The numbers of the first few of them, to be named in messages."""
    first_broken: int | None
    """The number of the first broken one."""


def _find_usable(buckets: Buckets) -> tuple[NDArray[np.bool_] | None, _LeftOut]:
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
    return usable, _LeftOut(left_out, without_latents, broken, first, first_broken)


def _check_left_out(
    left_out: _LeftOut,
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
    relist = (
        f"(capmerge index {_shown(settings.metadata)} "
        f"--latents {_shown(settings.latents)} --relist)"
    )
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
        record, index.read(record)[0], _wanted(family, settings), index, allow_outside=True
    )
    # It was found broken when it was listed, so it has a name.
    assert path is not None
    problem = read_sizes(path).problem or "it was broken when it was listed"
    return f"{printable(str(path))}: {printable(problem)}"


def _endings(family: Family) -> list[str]:
    return [".npz", *(f"_<width>x<height>{suffix}.npz" for suffix in family.latent_suffix)]


def _chunks(index: Index, family: Family, text: TextSettings) -> NDArray[np.uint16]:
    """The number of chunks that the longest alternative of each record is encoded at."""
    most = _MOST_CHUNKS if text.max_tokens == "unlimited" else text.max_tokens // CHUNK_TOKENS
    if text.chunking == "crop":
        return np.ones(len(index), np.uint16)
    unit: Literal["tokens", "chunks"] = "chunks" if text.chunking == "a1111" else "tokens"
    column = index.longest_alternative(unit, family.index_tokens)
    chunks = np.empty(len(index), np.uint16)
    for start in range(0, len(index), WINDOW):
        needed: NDArray[np.integer[Any]] = column[start : start + WINDOW]
        if text.chunking == "kohya":
            needed = -(-needed.astype(np.int64) // CHUNK_TOKENS)
        chunks[start : start + WINDOW] = np.clip(needed, 1, most)
    return chunks


def _some_files(dataset: DataSet) -> list[LatentsFile]:
    """The latents files of up to `FILES_CHECKED` evenly spaced usable records."""
    usable, records = dataset.rows.usable, len(dataset.index)
    numbers = [place * records // FILES_CHECKED for place in range(FILES_CHECKED)]
    if usable is not None:
        numbers = [
            number + int(np.argmax(usable[number:])) for number in numbers if usable[number:].any()
        ]
    if not records:
        return []
    files = [
        dataset.latents_file(number, dataset.index.read(number)[0])
        for number in dict.fromkeys(numbers)
    ]
    return [file for file in files if file is not None]


def _shown(path: Path) -> str:
    return printable(str(path))
