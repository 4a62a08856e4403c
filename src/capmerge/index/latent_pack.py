"""The packing of latents into shards: which files each shard holds, and a worker's part of it.

What a shard holds follows from the records, the names and the sizes of the files alone, so any
number of workers writes the same bytes. Each worker writes whole shards. Beside a finished shard
lies a note of what is in it, by which an interrupted run knows that it need not be written again.
"""

import json
import os
import tarfile
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple
from zlib import crc32

import numpy as np

from capmerge.files.atomic import AtomicFile, ScratchFile, write_whole
from capmerge.files.npz import READ_ERRORS
from capmerge.files.openable import InMemory, open_file
from capmerge.files.shards import END, ROW, padded, shard_name, write_index
from capmerge.files.zip_layout import MOST_BYTES
from capmerge.index.latent_check import check_file
from capmerge.index.latent_half import in_half
from capmerge.index.latent_listing import Listing
from capmerge.index.latent_sizes import problem_of
from capmerge.index.reader import Index

Dtype = Literal["keep", "fp16"]

_NOTE = ".members"
_CHECKED_BYTES = 4096
"""The end of an .npz, with the checksums of all its arrays."""


class Loose(NamedTuple):
    """A file to be packed."""

    key: str
    """The key of the first record that it is of."""
    name: str
    """Its name in the shard: its path below the folder, with slashes."""
    path: str
    size: int
    changed_ns: int


class Plan(NamedTuple):
    """The files of one shard."""

    number: int
    files: list[Loose]


class LeftOut(NamedTuple):
    """A file that was not packed, or not as it was asked for."""

    key: str
    name: str
    problem: str
    """A part of a sentence, without a full stop."""


class Packed(NamedTuple):
    """What became of a shard."""

    number: int
    files: int
    """The number of files that were to be packed."""
    members: int
    size: int
    """Its bytes."""
    left_out: list[LeftOut]
    unchanged: list[LeftOut]
    """Files that float16 cannot hold, packed with the type that they had."""
    reused: bool
    """True if an earlier run had finished it."""


def iter_plans(
    index: Index, listing: Listing, shard_bytes: int, unreadable: Callable[[LeftOut], None]
) -> Iterator[Plan]:
    """Yield the shards in order, each of files in the order of the records.

    The files of a shard take at most `shard_bytes` together, headers included, before their type is
    changed; a larger file has a shard of its own. A file that several records have is packed once.
    Files that cannot be found any more go to `unreadable`.
    """
    shared, packed = _shared_stems(index), set[str]()
    number, files, total = 0, list[Loose](), len(END)
    for place, record, key in listing.iter_files(index):
        assert isinstance(place, Path)
        path = str(place)
        if int(index.stem_hash[record]) in shared:
            if path in packed:
                continue
            packed.add(path)
        name = listing.below(place)
        try:
            status = os.stat(path)  # noqa: PTH116  # half the time of Path
        except OSError as error:
            unreadable(LeftOut(key, name, problem_of(error)))
            continue
        size = len(_header(name, status.st_size)) + padded(status.st_size)
        if files and total + size > shard_bytes:
            yield Plan(number, files)
            number, files, total = number + 1, [], len(END)
        files.append(Loose(key, name, path, status.st_size, status.st_mtime_ns))
        total += size
    if files:
        yield Plan(number, files)


def _shared_stems(index: Index) -> set[int]:
    """The hashes of the stems that several records have, such as those of a.png and a.jpg."""
    hashes = np.sort(index.stem_hash)
    return set(np.unique(hashes[1:][hashes[1:] == hashes[:-1]]).tolist())


def _header(name: str, size: int) -> bytes:
    """Return the tar header of a member, which says nothing about its owner and time.

    The format is GNU's, which every tar program reads; a longer name has blocks of its own.
    """
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    return info.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


class ShardWriter:
    """The work of a process: to write one shard after the other into `folder`."""

    def __init__(self, folder: Path, dtype: Dtype) -> None:
        self._folder, self._dtype = folder, dtype

    def __call__(self, plan: Plan) -> Packed:
        """Write a shard, unless an earlier run has written it whole. Raises `OutputError`."""
        shard = self._folder / shard_name(plan.number)
        digest = blake2b(json.dumps([self._dtype, plan.files]).encode(), digest_size=16).hexdigest()
        note = _read_note(shard)
        if note and note["digest"] == digest and not note["left_out"] and _has_size(shard, note):
            return _packed(plan, note, reused=True)
        forget(shard)
        note = {"digest": digest, **self._write(shard, plan)}
        write_whole(_note_of(shard), json.dumps(note))
        return _packed(plan, note, reused=False)

    def _write(self, shard: Path, plan: Plan) -> dict[str, Any]:
        """Write the shard and return the note of it; one without members is not written."""
        members: list[list[Any]] = []
        left_out: list[LeftOut] = []
        unchanged: list[LeftOut] = []
        with AtomicFile(shard) as file:
            for loose in plan.files:
                data, problem = self._bytes_of(loose)
                if data is None:
                    left_out.append(LeftOut(loose.key, loose.name, problem))
                    continue
                if problem:
                    unchanged.append(LeftOut(loose.key, loose.name, problem))
                file.write(_header(loose.name, len(data)))
                check = crc32(data[-_CHECKED_BYTES:])
                members.append([loose.name, loose.path, file.written_bytes, len(data), check])
                file.write(data)
                file.write(bytes(padded(len(data)) - len(data)))
            file.write(END)
            if members:
                file.publish()
                size = file.written_bytes
            else:
                shard.unlink(missing_ok=True)
                size = 0
        return {"size": size, "members": members, "left_out": left_out, "unchanged": unchanged}

    def _bytes_of(self, loose: Loose) -> tuple[bytes | None, str]:
        """Return the bytes to pack and what is to be told of them; None for a broken file."""
        if loose.size > MOST_BYTES:
            return None, f"it takes {loose.size:,} bytes, expected at most {MOST_BYTES:,}"
        try:
            file = open_file(Path(loose.path))
            try:
                data = file.read() or b""
            finally:
                file.close()
        except READ_ERRORS as error:
            return None, problem_of(error)
        in_memory = InMemory(loose.name, data)
        _, problem = check_file(in_memory)
        if problem:
            return None, problem
        if self._dtype == "keep":
            return data, ""
        half = in_half(in_memory)
        if half is None:
            return data, "it holds numbers beyond 65,504, the largest of float16"
        return half, ""


def has_finished_shards(folder: Path) -> bool:
    """Return whether a later run could take over a shard in `folder`."""
    return any(folder.glob(f"*{_NOTE}"))


def forget(shard: Path) -> None:
    """Remove the note of a shard, so that no later run takes the shard over."""
    _note_of(shard).unlink(missing_ok=True)


def _note_of(shard: Path) -> Path:
    return shard.with_name(shard.name + _NOTE)


def _read_note(shard: Path) -> dict[str, Any] | None:
    try:
        note: dict[str, Any] = json.loads(_note_of(shard).read_bytes())
    except (OSError, ValueError):
        return None
    return note


def _has_size(shard: Path, note: dict[str, Any]) -> bool:
    try:
        return bool(shard.stat().st_size == note["size"])
    except OSError:
        return False


def _packed(plan: Plan, note: dict[str, Any], *, reused: bool) -> Packed:
    return Packed(
        plan.number,
        len(plan.files),
        len(note["members"]),
        note["size"],
        [LeftOut(*entry) for entry in note["left_out"]],
        [LeftOut(*entry) for entry in note["unchanged"]],
        reused,
    )


def write_shard_index(
    folder: Path, shards: int, dtype: Dtype, roots: list[str]
) -> list[tuple[int, int]]:
    """Write the index of all `shards` that lie in `folder`, from the notes beside them.

    Returns the number and the first member of each shard that has members.
    """
    firsts: list[tuple[int, int]] = []
    hashed, done, name_end = blake2b(dtype.encode(), digest_size=16), 0, 0
    with ScratchFile(folder / "rows") as rows, ScratchFile(folder / "names") as names:
        for number in range(shards):
            members = members_of(folder, number)
            if not members:
                continue
            firsts.append((number, done))
            part = np.zeros(len(members), ROW)
            encoded = [os.fsencode(name) for name, *_ in members]
            part["shard"] = number
            part["start"] = [start for _, _, start, _, _ in members]
            part["size"] = [size for *_, size, _ in members]
            part["name_end"] = name_end + np.cumsum([len(name) for name in encoded])
            text = b"".join(encoded)
            checks = np.array([check for *_, check in members], "<u4")
            for data in (part.tobytes(), text, checks.tobytes()):
                hashed.update(data)
            rows.write(part.tobytes())
            names.write(text)
            done, name_end = done + len(members), name_end + len(text)
        about = {"identity": hashed.hexdigest(), "dtype": dtype, "roots": roots}
        write_index(folder, about, rows, names)
    return firsts


def members_of(folder: Path, number: int) -> list[list[Any]]:
    """Return the members of a finished shard from its note, in their order.

    Each is its name, the path of the file, the offset of its bytes, their number, and the CRC-32 of
    the last 4096 of them.
    """
    note = _read_note(folder / shard_name(number))
    assert note is not None  # it was written before this process read the answer about the shard
    members: list[list[Any]] = note["members"]
    return members


def remove_notes(folder: Path, shards: int) -> None:
    """Remove the notes, and what an interrupted run with another plan left in `folder`."""
    kept = {shard_name(number) for number in range(shards)}
    for path in folder.glob("*.tar*"):
        if path.name not in kept:
            path.unlink()
    for path in folder.glob(".*"):
        path.unlink()
