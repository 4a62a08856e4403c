"""The plan of an epoch: its definition, and reading it from a memory-mapped file.

The plan says which samples make up which global batch. It holds only numbers, and all processes of
a machine share the file, which `plan_files` builds. It is a pure function of the seed, the epoch,
the global batch size and the columns of the data sets; ranks, accumulation and workers only slice
its batches. Runs resume by it, so nothing of this definition may ever change:

- Samples are numbered over the data sets in order, in a set repeat by repeat, in a repeat record by
  record, unusable ones included.
- A bucket holds all samples of one (width, height, chunk count). The buckets are in ascending order
  of that triple. The samples of a bucket are in the order that `shuffle.hash_of` gives their
  numbers, with the key `Chance(SampleId(seed, epoch, key="")).below(2**64, "order of samples")`.
- Each bucket is cut into batches from its front; the last one may be short. All batches, numbered
  from 0 bucket by bucket, are trained in the order that `shuffle.hash_of` gives their numbers, with
  the key `Chance(SampleId(seed, epoch, key="")).below(2**64, "order of batches")`.

A file takes 4 bytes per sample and 4 per batch (8 and 8 from 2**32 samples on), and little besides.
"""

import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from trainer.data.buckets import SetRows, bucket_sizes

MAGIC = b"trplan01"
HEADER = struct.Struct("<8sQ16s6q")
"""The magic, the CRC-32 of all that follows it, the identity, then six numbers.

Those are the numbers of sets, buckets, samples and steps, the batch size, and the bytes per number.
"""
CHECKED_FROM = 16
"""The offset of the first byte that the CRC-32 covers."""


class GlobalBatch(NamedTuple):
    """The samples of one optimizer step, over all ranks and micro-batches.

    All are of one bucket; the columns are int64, in the order in which the samples are dealt.
    """

    dataset: NDArray[np.int64]
    record: NDArray[np.int64]
    repeat: NDArray[np.int64]
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    chunks: int | None
    """The chunk count of the bucket; None when chunk counts do not separate buckets."""


class Slots(NamedTuple):
    """The samples that one rank trains in one micro-step."""

    places: range
    """The positions of the samples in the global batch; at least one."""
    weight: int
    """1, or 0 when no sample was left for this slice, which then repeats one."""


class Batches(Protocol):
    """Global batches by their places, as `Plan` has them."""

    def batch(self, place: int) -> GlobalBatch:
        """The global batch at `place`, from 0."""


class Plan:
    """The plan of one epoch, open for reading; it pickles as its path.

    Raises `OSError` when there is no such file, and `ValueError` when the file is damaged or holds
    another plan.
    """

    def __init__(self, path: Path, identity: bytes) -> None:
        self._path, self._identity = path, identity
        whole = np.memmap(path, mode="r")
        if len(whole) < HEADER.size:
            raise ValueError(f"{path}: cut off")
        magic, checksum, found, n_sets, n_buckets, n_samples, self.steps, self._batch_size, size = (
            HEADER.unpack_from(whole.data)
        )
        if (magic, checksum, found) != (MAGIC, zlib.crc32(whole[CHECKED_FROM:].data), identity):
            raise ValueError(f"{path}: damaged, or another plan")
        tables, numbers = whole[HEADER.size :], np.dtype(f"<u{size}")
        ends = np.cumsum([n_sets * 16, n_buckets * 40, n_samples * size, self.steps * size])
        sets, buckets, samples, order = np.split(tables, ends[:-1])
        # Columns: first sample, records.
        self._sets: NDArray[np.int64] = sets.view("<i8").reshape(-1, 2)
        # Columns: first sample, first batch, width, height, chunk count or 0.
        self._buckets: NDArray[np.int64] = buckets.view("<i8").reshape(-1, 5)
        self._samples: NDArray[np.unsignedinteger] = samples.view(numbers)
        self._order: NDArray[np.unsignedinteger] = order.view(numbers)

    def __reduce__(self) -> tuple[type[Self], tuple[Path, bytes]]:
        return type(self), (self._path, self._identity)

    def batch(self, place: int) -> GlobalBatch:
        """The global batch of step `place` of the epoch, counted from 0.

        Raises `IndexError` for a step outside of 0 .. `steps` - 1.
        """
        if not 0 <= place < self.steps:
            raise IndexError(f"found step {place} of the epoch, expected 0 to {self.steps - 1}")
        number = int(self._order[place])
        bucket = int(np.searchsorted(self._buckets[:, 1], number, side="right")) - 1
        # The bucket of the batch tells which of the samples belong to it.
        first_sample, first_batch, width, height, chunks = self._buckets[bucket].tolist()
        end_of_bucket = (
            int(self._buckets[bucket + 1, 0])
            if bucket + 1 < len(self._buckets)
            else len(self._samples)
        )
        start = first_sample + (number - first_batch) * self._batch_size
        samples = self._samples[start : min(start + self._batch_size, end_of_bucket)].astype(
            np.int64
        )
        # Within a data set, samples are numbered repeat by repeat, then record by record.
        dataset = np.searchsorted(self._sets[:, 0], samples, side="right") - 1
        repeat, record = np.divmod(samples - self._sets[dataset, 0], self._sets[dataset, 1])
        return GlobalBatch(dataset.astype(np.int64), record, repeat, width, height, chunks or None)


def count_epoch(sets: Sequence[SetRows], global_batch_size: int) -> tuple[int, int]:
    """The number of buckets and the number of global batches that every epoch has.

    Both are counted from the columns; the second one is `Plan.steps`. Raises `LatentsError` when
    no record is usable.
    """
    _, sizes = bucket_sizes(sets)
    return len(sizes), int(np.sum(-(-sizes // global_batch_size)))


def deal(n_samples: int, *, ranks: int, accumulation: int, batch_size: int) -> list[list[Slots]]:
    """The slice of each rank in each micro-step of a global batch of `n_samples`.

    The slices are as even as possible, and each sample appears once with weight 1. When there are
    fewer samples than slices, the remaining slices get one sample each with weight 0. Raises
    `ValueError` when the samples do not fit in the slices, or there are none.

    >>> dealt = deal(5, ranks=2, accumulation=2, batch_size=2)
    >>> [[list(slots.places) for slots in of_ranks] for of_ranks in dealt]
    [[[0, 1], [2]], [[3], [4]]]
    """
    slices = ranks * accumulation
    if not 1 <= n_samples <= slices * batch_size:
        raise ValueError(
            f"found {n_samples} samples, "
            f"expected 1 to {ranks} ranks x {accumulation} micro-steps x {batch_size}"
        )
    each, more = divmod(n_samples, slices)
    dealt, start = [], 0
    for number in range(slices):
        end = start + each + (number < more)
        dealt.append(
            Slots(range(start, end), 1)
            if end > start
            else Slots(range(number % n_samples, number % n_samples + 1), 0)
        )
        start = end
    return [dealt[micro * ranks : (micro + 1) * ranks] for micro in range(accumulation)]
