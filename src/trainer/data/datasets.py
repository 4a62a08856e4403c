"""The data sets of a run, opened: index and listing of each, and which of its records can be trained. Parses no record at any size.

Knows neither epochs nor samples. What is missing is counted here, before anything trains.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from capmerge.cores import usable_cores
from capmerge.errors import printable, quoted
from capmerge.index.build import ensure_index
from capmerge.index.latent_listing import Listing, ensure_listing
from capmerge.index.latent_names import LEGACY, SIZED
from capmerge.index.reader import Index, open_indexable
from capmerge.terminal import count_bar, progress_bar
from capmerge.tokens.chunks import CHUNK_TOKENS
from trainer.config.settings import CaptionSettings, Config, DataSettings, TextSettings
from trainer.data.buckets import WINDOW, SetRows
from trainer.data.latents import FILES_CHECKED, check_latent_scale
from trainer.errors import LatentsError
from trainer.families import FAMILIES, Family

MOST_LEFT_OUT = 0.01
"""Share of a data set's records that may be without latents or size."""

_NAMED_KEYS = 5
_MOST_CHUNKS = (1 << 16) - 1
"""Chunk counts are kept in 16 bits: a caption of 5 million tokens."""


@dataclass(frozen=True)
class DataSet:
    """One `[[data]]`. Pickles as paths: every process maps the same pages."""

    number: int
    """Which `[[data]]`, from 0."""
    settings: DataSettings
    captions: CaptionSettings
    """`[caption]` with what this set has different."""
    family: Family
    index: Index
    listing: Listing
    rows: SetRows
    """What the plan knows of it."""
    notes: tuple[str, ...]
    """What the user should know of it: records left out, latents that look like another family's."""

    def latents_file(self, record: int, key: str) -> Path | None:
        """The latents of the index's `record`, whose key this is; None when none were listed.

        Raises `CapmergeError` when it would lead out of the folder and `allow_outside` is off.
        """
        return self.listing.file_of(
            record, key, self.family.latent_suffix, allow_outside=self.settings.allow_outside
        )


def open_datasets(
    config: Config, *, jobs: int | None = None, relist: bool = False
) -> tuple[DataSet, ...]:
    """All data sets of a run; what has no index or listing yet gets one, under a file lock and with a bar on a terminal.

    To be called before process groups start: a first launch may take minutes, while the other ranks
    wait. `jobs` processes (default: all usable cores) build an index; `relist` lists the folders of
    latents anew. Raises `LatentsError` when records have no latents or no size and
    `data.on_missing` does not allow for it, and what `ensure_index` and `ensure_listing` raise.
    """
    return tuple(
        _open(config, number, jobs or usable_cores(), relist=relist)
        for number in range(len(config.data))
    )


def _open(config: Config, number: int, jobs: int, *, relist: bool) -> DataSet:
    settings, family = config.data[number], FAMILIES[config.model.family]
    dynamic = config.text.dynamic_chunks
    with open_indexable(settings.metadata) as source, progress_bar(source) as progress:
        index = ensure_index(
            settings.metadata, jobs=jobs, progress=progress, tokens=True if dynamic else None
        )
    with count_bar(settings.latents) as progress:
        listing = ensure_listing(
            index,
            settings.latents,
            relist=relist,
            allow_outside=settings.allow_outside,
            progress=progress,
        )
    usable, left_out = _find_usable(family, index, listing)
    notes = _check_left_out(left_out, number, settings, family, index, listing)
    rows = SetRows(
        index.width,
        index.height,
        _chunks(index, family, config.text) if dynamic else None,
        settings.repeats,
        usable,
    )
    opened = DataSet(
        number, settings, config.caption_of(number), family, index, listing, rows, notes
    )
    if config.model.path == "random":
        return opened  # the example latents serve all families
    warning = check_latent_scale(
        _some_files(opened), family, skip_broken=settings.on_missing == "skip"
    )
    if warning is None:
        return opened
    return replace(
        opened, notes=(*notes, f"WARNING: data.{number}, {_shown(settings.latents)}: {warning}")
    )


class _LeftOut(NamedTuple):
    """The records of a data set that cannot be trained."""

    records: int
    without_latents: int
    without_size: int
    first: list[int]
    """The numbers of the first few, to be named."""


def _find_usable(
    family: Family, index: Index, listing: Listing
) -> tuple[NDArray[np.bool_] | None, _LeftOut]:
    """False for each record without latents of `family` or without a size, and what is left out.

    None in place of the column when every record is usable.
    """
    forms = np.uint8(LEGACY + sum(SIZED[suffix] for suffix in family.latent_suffix))
    usable: NDArray[np.bool_] | None = None
    without_latents, without_size = 0, 0
    first: list[int] = []
    for start in range(0, len(index), WINDOW):
        window = slice(start, start + WINDOW)
        found = (listing.form[window] & forms) != 0
        sized = (index.width[window] != 0) & (index.height[window] != 0)
        good = found & sized
        if good.all():
            continue
        usable = np.ones(len(index), np.bool_) if usable is None else usable
        usable[window] = good
        without_latents += int(np.count_nonzero(~found))
        without_size += int(np.count_nonzero(~sized))
        first += (np.flatnonzero(~good)[: _NAMED_KEYS - len(first)] + start).tolist()
    left_out = 0 if usable is None else int(np.count_nonzero(~usable))
    return usable, _LeftOut(left_out, without_latents, without_size, first)


def _check_left_out(
    left_out: _LeftOut,
    number: int,
    settings: DataSettings,
    family: Family,
    index: Index,
    listing: Listing,
) -> tuple[str, ...]:
    """The notes on the records of `[[data]]` number `number` that are left out.

    Raises `LatentsError` when `data.on_missing` allows for none, or for fewer.
    """
    if not left_out.records:
        return ()
    records = len(index)
    # Say what is missing, and of which records.
    places = ", ".join(_shown(settings.latents / f"<key>{ending}") for ending in _endings(family))
    why = [f"{left_out.without_latents:,} without latents ({places})"] * bool(
        left_out.without_latents
    )
    why += [
        f'{left_out.without_size:,} without a size ("train_resolution" or "image_size")'
    ] * bool(left_out.without_size)
    keys = ", ".join(quoted(index.read(record)[0]) for record in left_out.first)
    more = ", ..." if left_out.records > len(left_out.first) else ""
    found = (
        f"data.{number}, {_shown(settings.metadata)}: found {' and '.join(why)} "
        f"among {records:,} records; the first: {keys}{more}"
    )
    # Say what to do about it.
    relist = f"(capmerge index {_shown(settings.metadata)} --latents {_shown(settings.latents)} --relist)"
    lead_out = ""
    if listing.unlisted and not settings.allow_outside:
        lead_out = (
            f" The keys of {listing.unlisted:,} lead out of that folder: "
            "data.allow_outside = true looks there too."
        )
    if settings.on_missing == "stop":
        raise LatentsError(
            f"{found}. Expected both for all. Cache their latents, list the folder anew if they "
            f'came later {relist}, or set data.on_missing = "skip".{lead_out}'
        )
    if left_out.records > MOST_LEFT_OUT * records:
        raise LatentsError(
            f'{found}. Expected at most {MOST_LEFT_OUT:.0%} with data.on_missing = "skip", '
            f"found {left_out.records / records:.1%}. Look at data.latents and model.family; "
            f"list the folder anew if the files came later {relist}.{lead_out}"
        )
    return (f"{found}. {left_out.records:,} are left out.",)


def _endings(family: Family) -> list[str]:
    return [".npz", *(f"_<width>x<height>{suffix}.npz" for suffix in family.latent_suffix)]


def _chunks(index: Index, family: Family, text: TextSettings) -> NDArray[np.uint16]:
    """How many chunks each record's longest alternative is encoded at, a window at a time."""
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


def _some_files(dataset: DataSet) -> list[Path]:
    """Latents of `FILES_CHECKED` records, evenly spaced."""
    usable, records = dataset.rows.usable, len(dataset.index)
    numbers = [place * records // FILES_CHECKED for place in range(FILES_CHECKED)]
    if usable is not None:
        numbers = [
            number + int(np.argmax(usable[number:])) for number in numbers if usable[number:].any()
        ]
    files = (
        [
            dataset.latents_file(number, dataset.index.read(number)[0])
            for number in dict.fromkeys(numbers)
        ]
        if records
        else []
    )
    return [file for file in files if file is not None]


def _shown(path: Path) -> str:
    return printable(str(path))
