"""The records that are held out for validation, and as many of those that are trained.

Which they are follows from the seed and the keys alone, so runs resume by it, and nothing of this
definition may ever change:

- The hash of a record is what `shuffle.hash_of` gives for the number in the index that its key has
  without the extension of a picture, with the key `Chance(SampleId(seed, epoch=0, key="")).below(
  2**64, "held-out keys")`. So a picture has one hash in all data sets.
- Only usable records count, and each hash once. `validation.records = N` holds out the N smallest
  hashes, `validation.share = S` those below S x 2**64, in every data set.
- The next larger hashes, as many as are held out or all that are left, stay in the training and are
  validated beside the others. A hash stands for its first record in the first data set with it.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capmerge.rng import Chance, SampleId
from trainer.config.settings import Config
from trainer.data.buckets import WINDOW
from trainer.data.datasets import DataSet
from trainer.data.shuffle import Numbers, hash_of
from trainer.errors import ConfigError

Record = tuple[int, int]
"""The number of a data set and the number of a record in it."""


class HeldOut(NamedTuple):
    """The split of the records of a run into those that are trained and those that are not."""

    datasets: tuple[DataSet, ...]
    """The data sets of the training; held-out records are not usable in them."""
    held_out: tuple[Record, ...]
    """The records to validate that are never trained, in the order of their hashes."""
    trained: tuple[Record, ...]
    """The records to validate that are trained, in the order of their hashes."""
    notes: tuple[str, ...]
    """Notes for the user: what is held out, and data sets that are held out as a whole."""


def hold_out(config: Config, datasets: Sequence[DataSet]) -> HeldOut:
    """Split the records as `[validation]` says; without it, all of them are trained.

    Data sets without a usable record are left for others to refuse. The config must have a seed.
    Reads the columns three times, and holds no more than the hashes that are chosen. Raises
    `ConfigError` when none or all of the records would be held out.
    """
    settings = config.validation
    is_asked = settings.records or settings.share
    if not is_asked or not any(map(_count_usable, datasets)):
        return HeldOut(tuple(datasets), (), (), ())
    # A seed was drawn when the config had none.
    assert config.train.seed is not None
    chance = Chance(SampleId(config.train.seed, epoch=0, key=""))
    key = chance.below(1 << 64, "held-out keys")

    # Find the hashes to hold out, and as many after them.
    wanted = settings.records or _count_below(datasets, key, int(settings.share * 2**64))
    smallest = _smallest(datasets, key, 2 * wanted)
    if not 0 < wanted < len(smallest):
        raise ConfigError(_none_or_all(config, datasets, len(smallest)))

    # Leave the held-out ones out of the training, and look up the records of all of them.
    remaining = tuple(_without(dataset, key, smallest[wanted - 1]) for dataset in datasets)
    records = _first_records(datasets, key, smallest)
    told = (
        f"validation: {wanted:,} held-out records, which are never trained, and "
        f"{len(records) - wanted:,} of the training set"
    )
    emptied = [
        f"WARNING: data.{dataset.number}: all of its records are held out for validation, so it "
        "trains nothing. Hold out fewer."
        for dataset, before in zip(remaining, datasets, strict=True)
        if _count_usable(before) and not _count_usable(dataset)
    ]
    return HeldOut(remaining, records[:wanted], records[wanted:], (told, *emptied))


def _none_or_all(config: Config, datasets: Sequence[DataSet], distinct: int) -> str:
    settings = config.validation
    usable = sum(_count_usable(dataset) for dataset in datasets)
    if settings.share and not distinct:
        return (
            f"validation.share = {settings.share:g} holds out none of {usable:,} usable records, "
            "expected at least one. Raise it, or set validation.records instead."
        )
    asked = f"share = {settings.share:g}" if settings.share else f"records = {settings.records:,}"
    return (
        f"validation.{asked}: found {distinct:,} different keys with latents in all data sets, "
        "expected more, so that some are left to train. Lower it."
    )


def _iter_hashes(dataset: DataSet, key: int) -> Iterator[tuple[slice, Numbers, NDArray[np.bool_]]]:
    """Windows of a data set, each with the hashes of its records and which of them are usable."""
    usable = dataset.rows.usable
    for start in range(0, len(dataset.index), WINDOW):
        window = slice(start, start + WINDOW)
        hashes = hash_of(dataset.index.stem_hash[window].astype(np.uint64), key)
        yield window, hashes, np.ones(len(hashes), np.bool_) if usable is None else usable[window]


def _iter_usable_hashes(datasets: Sequence[DataSet], key: int) -> Iterator[Numbers]:
    for dataset in datasets:
        for _, hashes, usable in _iter_hashes(dataset, key):
            yield hashes[usable]


def _count_usable(dataset: DataSet) -> int:
    usable = dataset.rows.usable
    return len(dataset.index) if usable is None else int(np.count_nonzero(usable))


def _count_below(datasets: Sequence[DataSet], key: int, limit: int) -> int:
    """The number of different hashes of usable records below `limit`."""
    found = [hashes[hashes < np.uint64(limit)] for hashes in _iter_usable_hashes(datasets, key)]
    return len(np.unique(np.concatenate(found))) if found else 0


def _smallest(datasets: Sequence[DataSet], key: int, count: int) -> Numbers:
    """The `count` smallest different hashes of usable records in ascending order, or all."""
    found, size, largest = [np.empty(0, np.uint64)], 0, np.uint64(2**64 - 1)
    for hashes in _iter_usable_hashes(datasets, key):
        found.append(hashes[hashes <= largest])
        size += len(found[-1])
        # Only now and then, so that the time stays linear for any count.
        if size > 2 * (count + WINDOW):
            found = [np.unique(np.concatenate(found))[:count]]
            size = len(found[0])
            largest = found[0][-1] if size == count else largest
    return np.unique(np.concatenate(found))[:count]


def _without(dataset: DataSet, key: int, largest: np.uint64) -> DataSet:
    """The data set without the records whose hashes are at most `largest`."""
    usable = np.empty(len(dataset.index), np.bool_)
    for window, hashes, before in _iter_hashes(dataset, key):
        usable[window] = before & (hashes > largest)
    return replace(dataset, rows=dataset.rows._replace(usable=usable))


def _first_records(datasets: Sequence[DataSet], key: int, hashes: Numbers) -> tuple[Record, ...]:
    """The first usable record of each hash, which are ascending."""
    places = np.full((len(hashes), 2), -1, np.int64)
    for dataset in datasets:
        for window, found, usable in _iter_hashes(dataset, key):
            at = np.searchsorted(hashes, found)
            known = usable & (at < len(hashes))
            known[known] = hashes[at[known]] == found[known]
            rows, first = np.unique(at[known], return_index=True)
            new = places[rows, 0] < 0
            places[rows[new], 0] = dataset.number
            places[rows[new], 1] = np.flatnonzero(known)[first[new]] + window.start
    return tuple((dataset, record) for dataset, record in places.tolist())
