"""The plan of an epoch: which samples make which global batch, as a memory-mapped file that all processes of a machine share.

Only numbers: knows neither captions, latents nor tensors. The plan is a pure function of seed,
epoch, global batch size and the data sets' columns; ranks, accumulation and workers only slice its
batches. Runs resume by it, so nothing of this may ever change:

- Samples are numbered over the data sets in order, in a set repeat by repeat, in a repeat record by record, unusable ones included.
- A bucket holds all samples of one (width, height, chunk count). Buckets stand in ascending order of that triple; the samples of one
  in the order that `order.hash_of` gives their numbers, with the key
  `Chance(SampleId(seed, epoch, key="")).below(2**64, "order of samples")`.
- Each bucket is cut into batches from its front, the last one may be short. All batches, numbered from 0 bucket by bucket, are trained
  in the order that `order.hash_of` gives their numbers, with the key
  `Chance(SampleId(seed, epoch, key="")).below(2**64, "order of batches")`.

A file takes 4 bytes a sample and 4 a batch (8 and 8 from 2**32 samples on), and little besides.
"""

import contextlib
import hashlib
import json
import os
import re
import struct
import sys
import tempfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from capmerge.errors import OutputError, printable
from capmerge.files.lock import open_locked
from capmerge.rng import Chance, SampleId
from trainer.data.buckets import WINDOW, SetRows, bucket_sizes, iter_usable, triple_of
from trainer.data.shuffle import Groups, Numbers, fill_in_order

_MAGIC = b"trplan01"
_HEADER = struct.Struct(
    "<8sQ16s6q"
)  # magic, CRC-32 of all that follows it, identity, sets, buckets, samples, steps, batch size, bytes a number
_CHECKED_FROM = 16
_NAME = re.compile(r"epoch-(\d+)-.*\.plan(\..*\.tmp)?")


class GlobalBatch(NamedTuple):
    """The samples of one optimizer step, over all ranks and micro-batches: all of one bucket, int64 columns in their order."""

    dataset: NDArray[np.int64]
    record: NDArray[np.int64]
    repeat: NDArray[np.int64]
    width: int
    """Pixels."""
    height: int
    """Pixels."""
    chunks: int | None
    """Of the bucket; None when chunk counts do not part buckets."""


class Slots(NamedTuple):
    """What one rank trains in one micro-step."""

    places: range
    """Samples of the global batch, by their place in it; at least one."""
    weight: int
    """1; 0 when there was no sample left for it and it repeats one."""


class Plan:
    """The plan of one epoch, open for reading. Pickles as its path.

    Raises `OSError` when there is no such file, `ValueError` when it is damaged or another plan.
    """

    def __init__(self, path: Path, identity: bytes) -> None:
        self._path, self._identity = path, identity
        whole = np.memmap(path, mode="r")
        if len(whole) < _HEADER.size:
            raise ValueError(f"{path}: cut off")
        magic, checksum, found, n_sets, n_buckets, n_samples, self.steps, self._batch_size, size = (
            _HEADER.unpack_from(whole.data)
        )
        if (magic, checksum, found) != (_MAGIC, zlib.crc32(whole[_CHECKED_FROM:].data), identity):
            raise ValueError(f"{path}: damaged, or another plan")
        tables, numbers = whole[_HEADER.size :], np.dtype(f"<u{size}")
        ends = np.cumsum([n_sets * 16, n_buckets * 40, n_samples * size, self.steps * size])
        sets, buckets, samples, order = np.split(tables, ends[:-1])
        self._sets: NDArray[np.int64] = sets.view("<i8").reshape(-1, 2)  # first sample, records
        self._buckets: NDArray[np.int64] = buckets.view("<i8").reshape(
            -1, 5
        )  # first sample, first batch, width, height, chunks or 0
        self._samples: NDArray[np.unsignedinteger] = samples.view(numbers)
        self._order: NDArray[np.unsignedinteger] = order.view(numbers)

    def __reduce__(self) -> tuple[type[Self], tuple[Path, bytes]]:
        return type(self), (self._path, self._identity)

    def batch(self, place: int) -> GlobalBatch:
        """The global batch of the epoch's step `place`, from 0. Raises `IndexError` outside of 0 .. `steps` - 1."""
        if not 0 <= place < self.steps:
            raise IndexError(f"found step {place} of the epoch, expected 0 to {self.steps - 1}")
        number = int(self._order[place])
        bucket = int(np.searchsorted(self._buckets[:, 1], number, side="right")) - 1
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
        dataset = np.searchsorted(self._sets[:, 0], samples, side="right") - 1
        repeat, record = np.divmod(samples - self._sets[dataset, 0], self._sets[dataset, 1])
        return GlobalBatch(dataset.astype(np.int64), record, repeat, width, height, chunks or None)


def count_epoch(sets: Sequence[SetRows], global_batch_size: int) -> tuple[int, int]:
    """How many buckets and how many global batches every epoch has, counted from the columns; the latter is `Plan.steps`.

    Raises `LatentsError` when no record is usable.
    """
    _, sizes = bucket_sizes(sets)
    return len(sizes), int(np.sum(-(-sizes // global_batch_size)))


def open_plan(
    folder: Path,
    *,
    seed: int,
    epoch: int,
    global_batch_size: int,
    sets: Sequence[SetRows],
    fingerprint: str,
) -> Plan:
    """The plan of an epoch (from 0) from its file in `folder`, which is built first where it is missing or damaged.

    The first process to come builds, under a lock; the others wait and map the same file.
    `fingerprint` names all that the columns were made of: the metadata, the latents found, the
    family, the cutting of captions and its limit. Building takes about 25 MB of private memory at
    any size.

    Raises `OutputError` when the file cannot be written, `LatentsError` when no record is usable.
    """
    identity = _identity(seed, epoch, global_batch_size, sets, fingerprint)
    path = folder / f"epoch-{epoch:08d}-{identity.hex()}.plan"
    try:
        if plan := _opened(path, identity):
            return plan
        folder.mkdir(parents=True, exist_ok=True)
        with open_locked(folder / "plan.lock", wait=True):
            if plan := _opened(path, identity):
                return plan
            _build(path, identity, seed, epoch, global_batch_size, sets)
        return Plan(path, identity)
    except OSError as error:
        raise OutputError(
            f"{printable(str(path))}: cannot write the order of epoch {epoch}, {error.strerror}. Free some room, or check the folder."
        ) from error


def drop_old_plans(folder: Path, epoch: int) -> None:
    """Remove the plans of all epochs before `epoch` from the folder of a run. Who has one open keeps it until it is closed."""
    for path in folder.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and int(match[1]) < epoch:
            with contextlib.suppress(
                OSError
            ):  # another process was faster, or Windows has it open: it goes the next time
                path.unlink()


def deal(n_samples: int, *, ranks: int, accumulation: int, batch_size: int) -> list[list[Slots]]:
    """For each micro-step, each rank's slice of a global batch of `n_samples`: as even as possible, each sample once with weight 1.

    Where fewer samples than slices are left, the rest get one sample each with weight 0.

    >>> [[list(slots.places) for slots in ranks] for ranks in deal(5, ranks=2, accumulation=2, batch_size=2)]
    [[[0, 1], [2]], [[3], [4]]]
    """
    slices = ranks * accumulation
    if not 1 <= n_samples <= slices * batch_size:
        raise ValueError(
            f"found {n_samples} samples, expected 1 to {ranks} ranks x {accumulation} micro-steps x {batch_size}"
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


def _identity(
    seed: int, epoch: int, global_batch_size: int, sets: Sequence[SetRows], fingerprint: str
) -> bytes:
    """16 bytes that are different for another plan."""
    shapes = [
        (
            len(rows.width),
            rows.repeats,
            rows.chunks is not None,
            None if rows.usable is None else int(np.count_nonzero(rows.usable)),
        )
        for rows in sets
    ]
    said = json.dumps([seed, epoch, global_batch_size, fingerprint, shapes])
    return hashlib.blake2b(said.encode(), digest_size=16, person=_MAGIC).digest()


def _opened(path: Path, identity: bytes) -> Plan | None:
    """The plan, or None where there is none that can be used."""
    try:
        return Plan(path, identity)
    except (FileNotFoundError, ValueError):
        return None


def _build(
    path: Path,
    identity: bytes,
    seed: int,
    epoch: int,
    global_batch_size: int,
    sets: Sequence[SetRows],
) -> None:
    codes, sizes = bucket_sizes(sets)
    n_batches = -(-sizes // global_batch_size)
    n_samples, steps = int(sizes.sum()), int(n_batches.sum())
    n_numbers = np.cumsum([0, *(len(rows.width) * rows.repeats for rows in sets)])
    size = 4 if n_numbers[-1] <= 1 << 32 else 8
    numbers = np.dtype(f"<u{size}")

    set_table = np.array(
        [(first, len(rows.width)) for first, rows in zip(n_numbers.tolist(), sets, strict=False)],
        dtype="<i8",
    )
    firsts = zip(
        (np.cumsum(sizes) - sizes).tolist(),
        (np.cumsum(n_batches) - n_batches).tolist(),
        strict=True,
    )
    bucket_table = np.array(
        [(*first, *triple_of(code)) for first, code in zip(firsts, codes.tolist(), strict=True)],
        dtype="<i8",
    )
    head = _HEADER.pack(
        _MAGIC, 0, identity, len(sets), len(codes), n_samples, steps, global_batch_size, size
    )
    head += set_table.tobytes() + bucket_table.tobytes()

    def iter_samples() -> Iterator[tuple[Numbers, Groups]]:
        for first, rows in zip(n_numbers.tolist(), sets, strict=False):
            for records, found in iter_usable(rows):
                buckets = np.searchsorted(codes, found)
                for repeat in range(rows.repeats):
                    yield records + np.uint64(first + repeat * len(rows.width)), buckets

    def iter_batches() -> Iterator[tuple[Numbers, Groups]]:
        for start in range(0, steps, WINDOW):
            batches = np.arange(start, min(start + WINDOW, steps), dtype=np.uint64)
            yield batches, np.zeros(len(batches), dtype=np.int64)

    chance = Chance(SampleId(seed, epoch, key=""))
    descriptor, temporary = tempfile.mkstemp(prefix=f"{path.name}.", suffix=".tmp", dir=path.parent)
    try:
        with os.fdopen(descriptor, "r+b") as file:
            _reserve(file.fileno(), len(head) + (n_samples + steps) * size)
            whole = np.memmap(file, mode="r+")
        whole[: len(head)] = np.frombuffer(head, dtype=np.uint8)
        samples, order = np.split(whole[len(head) :].view(numbers), [n_samples])
        fill_in_order(samples, iter_samples, sizes, chance.below(1 << 64, "order of samples"))
        fill_in_order(
            order, iter_batches, np.array([steps]), chance.below(1 << 64, "order of batches")
        )
        whole[8:_CHECKED_FROM].view("<u8")[0] = zlib.crc32(whole[_CHECKED_FROM:].data)
        del whole, samples, order  # Windows cannot rename an open file
        Path(temporary).replace(
            path
        )  # not synced: what a power failure leaves of it is damaged, seen and built again
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _reserve(descriptor: int, size_bytes: int) -> None:
    """Make room for `size_bytes` in a file: on a full disk, writing to memory without room behind it kills the process."""
    if sys.platform == "linux":
        os.posix_fallocate(descriptor, 0, size_bytes)
    else:
        os.truncate(descriptor, size_bytes)
