"""The check of latents: every file is read whole, and each fault is told.

A run finds a broken file only when it reads it, which may be days after its start. The rules are
those of a run: an array of latents, flipped ones of the same shape, `original_size` and
`crop_ltrb`, and in a legacy file the size that the record has as its `train_resolution`. Besides,
the zip must be laid out as every reader takes it, and each array must fill its member.
"""

import zipfile
from collections import deque
from collections.abc import Callable, Iterator
from math import prod
from pathlib import Path
from typing import IO, Literal, NamedTuple, cast

import numpy as np

from capmerge.files.npz import READ_ERRORS, Npz
from capmerge.files.openable import Openable, open_file
from capmerge.files.shards import Member, Shards
from capmerge.files.zip_layout import check_layout
from capmerge.index.latent_listing import Listing
from capmerge.index.latent_names import ENDING, parse_array, parse_sized
from capmerge.index.latent_pool import FilePool
from capmerge.index.latent_sizes import Size, problem_of, size_of_array, sizes_in
from capmerge.index.latent_values import LatentTypeError, read_values
from capmerge.index.reader import Index

_FILES_PER_REPORT = 256
_PIECE_BYTES = 1 << 20

Fault = Literal["", "unreadable", "broken", "other size"]
"""What is wrong with a file: nothing; the system could not read it, which may be the fault of a
disk or of permissions; its bytes; or they are fine, but not for the record that names it."""


class Known(NamedTuple):
    """What an earlier check found out about a file."""

    size: int
    changed_ns: int
    """The time of the file's last change in ns since 1970."""
    fault: Fault
    problem: str


class Asked(NamedTuple):
    """A file to be checked."""

    place: str | int
    """Its path, or the number of a member of shards."""
    expected: Size | None
    """The bucket in px that it must have latents for; None if any will do."""
    known: Known | None = None
    """Taken as the answer if the file has this size and time still."""


class Answer(NamedTuple):
    """A checked file."""

    size: int
    changed_ns: int
    fault: Fault
    problem: str
    """A part of a sentence, without a full stop; "" when nothing is wrong."""
    opened: bool
    """False if what was known was taken."""


class CheckedFile(NamedTuple):
    """A file of the listing, and what was found in it."""

    place: Path | Member
    record: int
    key: str
    answer: Answer


def iter_checked(
    index: Index,
    listing: Listing,
    jobs: int,
    progress: Callable[[int], None] | None = None,
    known: Callable[[int, str], Known | None] | None = None,
) -> Iterator[CheckedFile]:
    """Read every file of `listing` and yield what was found, in the order of the records.

    Any number of `jobs` finds the same. `progress` is told how many files were read, and `known`
    is asked what is known of a file by its record and text; its calls are in the same order, some
    thousands of files ahead of what is yielded. Raises `WorkerError`.
    """
    waiting: deque[tuple[Path | Member, int, str]] = deque()

    def asked() -> Iterator[Asked]:
        for place, record, key in listing.iter_files(index):
            waiting.append((place, record, key))
            yield Asked(
                place.number if isinstance(place, Member) else str(place),
                expected_size(place.name, record, index),
                known(record, str(place)) if known else None,
            )

    done = 0
    with FilePool(Checker(listing.shards), jobs) as pool:
        for done, answer in enumerate(pool.map(asked()), start=1):
            yield CheckedFile(*waiting.popleft(), answer)
            if progress and done % _FILES_PER_REPORT == 0:
                progress(done)
    if progress:
        progress(done)


class Checker:
    """The work of a process: to check one file after the other, members of `shards` or others."""

    def __init__(self, shards: Shards | None) -> None:
        self._shards = shards

    def __call__(self, asked: Asked) -> Answer:
        """Return what was found in a file, or what was known of it if it has not changed since."""
        place: Path | Member
        if isinstance(asked.place, int):
            assert self._shards is not None
            place = self._shards[asked.place]
            where = self._shards.place(asked.place)
            try:
                size, changed_ns = where.size, self._shards.shard(where.shard).changed_ns
            except OSError as error:
                return Answer(0, 0, "unreadable", problem_of(error), opened=True)
        else:
            place = Path(asked.place)
            try:
                status = place.stat()
            except OSError as error:
                return Answer(0, 0, "unreadable", problem_of(error), opened=True)
            size, changed_ns = status.st_size, status.st_mtime_ns
        known = asked.known
        if known and (known.size, known.changed_ns) == (size, changed_ns):
            return Answer(*known, opened=False)
        fault, problem = check_file(place, asked.expected)
        return Answer(size, changed_ns, fault, problem, opened=True)


def expected_size(name: str, record: int, index: Index) -> Size | None:
    """Return the size that a file of this name must hold: the `train_resolution` of its record.

    None where the record has none, and for a new-style name, whose file decides itself.
    """
    size = int(index.width[record]), int(index.height[record])
    return None if not all(size) or parse_sized(name.removesuffix(ENDING)) else size


def check_file(place: Path | Openable, expected: Size | None = None) -> tuple[Fault, str]:
    """Read a file whole and return what is wrong with it, and that in words.

    With an `expected` size, it must hold latents of that size in px.
    """
    try:
        members = _checked_layout(place)
        with Npz(place) as npz:
            found = sizes_in(npz)
            problem = found.problem or _problem_in(npz, members)
            read_by_numpy = npz.read_by_numpy
        if not problem and read_by_numpy:
            _check_whole(place)
    except READ_ERRORS as error:
        # A damaged shard is the fault of its bytes; every other OSError is one of the system.
        unreadable = isinstance(error, OSError) and error.errno is not None
        return "unreadable" if unreadable else "broken", problem_of(error)
    if problem:
        return "broken", problem
    if expected and expected not in found.sizes:
        sizes = ", ".join(f"{width} x {height}" for width, height in found.sizes)
        return "other size", (
            f"found latents for {sizes} px, expected {expected[0]} x {expected[1]}, the "
            "train_resolution of its record"
        )
    return "", ""


def _checked_layout(place: Path | Openable) -> dict[str, int]:
    file = open_file(place)
    try:
        return check_layout(file)
    finally:
        file.close()


def _problem_in(npz: Npz, members: dict[str, int]) -> str:
    """What is wrong with the arrays of a file, as a part of a sentence; "" if nothing is.

    `members` are the sizes of the members of its zip in bytes.
    """
    names = sorted(npz.names)
    for name in names:
        if f"{name}.npy" not in members:
            continue  # a member of another kind, which nobody reads
        # An array must not claim more bytes than there are: reading it would take the memory.
        shape, dtype = npz.header(name)
        if dtype.hasobject:
            return f'"{name}" holds Python objects, which are never read'
        size = members[f"{name}.npy"]
        if prod(shape) * dtype.itemsize > size:
            return f'"{name}" claims to be {dtype} {shape}, but has {size:,} bytes'
        parsed = parse_array(name)
        if parsed is None:
            _ = npz[name]  # its checksum is compared
            continue
        try:
            array = read_values(npz, name)
        except LatentTypeError as error:
            return str(error)
        broken = array.size - int(np.isfinite(array).sum())
        if broken:
            return f'{broken:,} of {array.size:,} numbers of "{name}" are NaN or infinite'
        suffix = parsed.suffix
        missing = [
            other + suffix
            for other in ("latents", "original_size", "crop_ltrb")
            if other + suffix not in names
        ]
        if missing:
            return f'"{missing[0]}" is missing beside "{name}"'
        latents_shape = npz.header(f"latents{suffix}")[0]
        if array.shape != latents_shape:
            return f'"{name}" has the shape {array.shape}, expected {latents_shape}'
        if not parsed.flipped and size_of_array(npz, name) is None:
            return (
                f'"{name}" has the shape {array.shape}, expected (channels, height / 8, '
                "width / 8), and the size of its name"
            )
    return ""


def _check_whole(place: Path | Openable) -> None:
    """Raise `zipfile.BadZipFile` when a checksum is wrong, or an array does not fill its member.

    numpy stops reading a member where its array ends, and so never compares the checksum of a
    member that goes on.
    """
    file = open_file(place)
    try:
        with zipfile.ZipFile(cast("IO[bytes]", file)) as zipped:
            for info in zipped.infolist():
                with zipped.open(info) as member:
                    head = member.read(12)
                    left = info.file_size - len(head)
                    while piece := member.read(_PIECE_BYTES):
                        left -= len(piece)
                if left:
                    raise zipfile.BadZipFile(f'"{info.filename}" is {left:,} bytes too short')
                if info.filename.endswith(".npy"):
                    _check_fill(zipped, info)
    finally:
        file.close()


def _check_fill(zipped: zipfile.ZipFile, info: zipfile.ZipInfo) -> None:
    with zipped.open(info) as member:
        version = np.lib.format.read_magic(member)
        read = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, _, dtype = read(member)
        behind = info.file_size - member.tell() - prod(shape) * dtype.itemsize
    if behind:
        raise zipfile.BadZipFile(f'found {behind:,} bytes behind the array in "{info.filename}"')
