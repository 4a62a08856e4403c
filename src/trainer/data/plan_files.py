"""The plan files of a run: building, opening and removing them.

`plan` defines what a plan is and reads it. A file is built once per machine, under a lock, in
bounded memory.

All plans of a run have one size. While there are epochs to come, a file of that size holds the room
for the next plan, so that a disk that fills up in the meantime, such as with states, ends no run.
"""

import contextlib
import hashlib
import json
import os
import re
import sys
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from capmerge.errors import OutputError, printable
from capmerge.files.lock import open_locked
from capmerge.rng import Chance, SampleId
from trainer.data.buckets import WINDOW, SetRows, bucket_sizes, iter_usable, triple_of
from trainer.data.plan import CHECKED_FROM, HEADER, MAGIC, Plan
from trainer.data.shuffle import Groups, Numbers, fill_in_order

ROOM_FILE = "room"
_NAME = re.compile(r"epoch-(\d+)-.*\.plan(\..*\.tmp)?")


def open_plan(
    folder: Path,
    *,
    seed: int,
    epoch: int,
    global_batch_size: int,
    sets: Sequence[SetRows],
    fingerprint: str,
    hold_room: bool = False,
) -> Plan:
    """The plan of an epoch, counted from 0, read from its file in `folder`.

    A file that is missing or damaged is built first: the first process to arrive builds it under a
    lock; the others wait and map the same file. `fingerprint` identifies everything that the
    columns were made from: the metadata, the latents that were found, the family, the chunking of
    captions and its limit. Building takes about 25 MB of private memory at any size. With
    `hold_room`, room on the disk is held for the plan of another epoch.

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
            if hold_room:
                _hold_room(folder / ROOM_FILE, path.stat().st_size)
        return Plan(path, identity)
    except OSError as error:
        raise OutputError(
            f"{printable(str(path))}: cannot write the order of epoch {epoch}: {error.strerror}. "
            "Free some disk space, or check the permissions of the folder."
        ) from error


def drop_old_plans(folder: Path, epoch: int, *, hold_room: bool = False) -> None:
    """Remove the plans of all epochs before `epoch` from the folder of a run.

    A process that has one of them open can read it until it closes it. With `hold_room`, one of
    them becomes the room for the next plan, if no room is held; no process may read it any more.
    """
    old = [
        path
        for path in folder.iterdir()
        if (match := _NAME.fullmatch(path.name)) and int(match[1]) < epoch
    ]
    # Where that fails, another process was faster, or Windows has the file open: the next call
    # removes it.
    for path in old:
        with contextlib.suppress(OSError):
            if hold_room and path.suffix == ".plan" and not (folder / ROOM_FILE).exists():
                path.replace(folder / ROOM_FILE)
            else:
                path.unlink()


def _identity(
    seed: int, epoch: int, global_batch_size: int, sets: Sequence[SetRows], fingerprint: str
) -> bytes:
    """The identity of a plan: 16 bytes that differ from those of any other plan."""
    shapes = [
        (
            len(rows.width),
            rows.repeats,
            rows.chunks is not None,
            None if rows.usable is None else int(np.count_nonzero(rows.usable)),
        )
        for rows in sets
    ]
    text = json.dumps([seed, epoch, global_batch_size, fingerprint, shapes])
    return hashlib.blake2b(text.encode(), digest_size=16, person=MAGIC).digest()


def _opened(path: Path, identity: bytes) -> Plan | None:
    """The plan in the file `path`, or None when there is no usable one."""
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
    # Count: buckets, batches, and the numbers that samples have over all data sets.
    codes, sizes = bucket_sizes(sets)
    n_batches = -(-sizes // global_batch_size)
    n_samples, steps = int(sizes.sum()), int(n_batches.sum())
    n_numbers = np.cumsum([0, *(len(rows.width) * rows.repeats for rows in sets)])
    size = 4 if n_numbers[-1] <= 1 << 32 else 8
    numbers = np.dtype(f"<u{size}")

    # Lay out the header and the two tables that turn a sample's number into its record and bucket.
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
    head = HEADER.pack(
        MAGIC, 0, identity, len(sets), len(codes), n_samples, steps, global_batch_size, size
    )
    head += set_table.tobytes() + bucket_table.tobytes()

    # Iterate over what is to be put in order; `fill_in_order` asks for it twice.
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

    # Write a temporary file in place through a memory map, then give it its name.
    chance = Chance(SampleId(seed, epoch, key=""))
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with _opened_room(path.with_name(ROOM_FILE), temporary) as file:
            _reserve(file.fileno(), len(head) + (n_samples + steps) * size)
            whole = np.memmap(file, mode="r+")
        whole[: len(head)] = np.frombuffer(head, dtype=np.uint8)
        samples, order = np.split(whole[len(head) :].view(numbers), [n_samples])
        fill_in_order(samples, iter_samples, sizes, chance.below(1 << 64, "order of samples"))
        fill_in_order(
            order, iter_batches, np.array([steps]), chance.below(1 << 64, "order of batches")
        )
        whole[8:CHECKED_FROM].view("<u8")[0] = zlib.crc32(whole[CHECKED_FROM:].data)
        del whole, samples, order  # Windows cannot rename an open file
        # Not synced: the damage that a power failure leaves is noticed, and the plan built again.
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _opened_room(room: Path, path: Path) -> BinaryIO:
    """A new file at `path` to write to, with the room that is held, if there is any."""
    try:
        return room.replace(path).open("r+b")
    except OSError:
        return path.open("w+b")


def _hold_room(room: Path, size_bytes: int) -> None:
    """Hold `size_bytes` of disk space in the file `room`, or none on a full disk."""
    try:
        with room.open("ab") as file:
            _reserve(file.fileno(), size_bytes)
    except OSError:
        room.unlink(missing_ok=True)


def _reserve(descriptor: int, size_bytes: int) -> None:
    """Give a file `size_bytes` of disk space.

    On a full disk, writing to mapped memory without space behind it would kill the process.
    """
    if sys.platform == "linux":
        os.posix_fallocate(descriptor, 0, size_bytes)
    os.truncate(descriptor, size_bytes)
