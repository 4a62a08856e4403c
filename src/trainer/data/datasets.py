"""The opened data sets of a run: the index and the listing of each, and which records are usable.

Records without latents or with broken ones are counted here, before anything trains. No record is
parsed, however large the metadata is, except those that are named in a message or checked.
"""

import hashlib
import os
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from capmerge.cores import usable_cores
from capmerge.errors import printable
from capmerge.files.shards import Member
from capmerge.files.source import BytesSource, FileSource, fingerprint_text
from capmerge.index.latent_listing import Listing
from capmerge.index.reader import Index
from capmerge.tokens.chunks import CHUNK_TOKENS
from trainer.config.settings import CaptionSettings, Config, DataSettings, TextSettings, family_of
from trainer.data.buckets import WINDOW, SetRows
from trainer.data.dataset_checks import check_left_out, check_resolution, find_usable, wanted_of
from trainer.data.latents import FILES_CHECKED, LatentsFile, check_latent_scale, with_way_out
from trainer.data.side_files import open_side_files
from trainer.errors import LatentsError
from trainer.families import Family

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
            wanted_of(self.family, self.settings),
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
    buckets = listing.buckets(wanted_of(family, settings), index)
    notes += check_resolution(buckets, number, settings)
    usable, left_out = find_usable(buckets)
    notes += check_left_out(left_out, number, settings, family, index, listing)
    if index.repeated:
        where = f"data.{number}, {printable(str(settings.metadata))}"
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
        opened,
        notes=(*notes, f"WARNING: data.{number}, {printable(str(settings.latents))}: {warning}"),
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
