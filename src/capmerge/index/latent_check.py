"""The check of all latents in a listing: every file is read whole, and each fault is told.

A run finds a broken file only when it reads it, which may be days after its start. The rules are
those of a run: an array of latents, flipped ones of the same shape, `original_size` and
`crop_ltrb`, and in a legacy file the size that the record has as its `train_resolution`.
"""

from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from capmerge.files.npz import READ_ERRORS, Npz
from capmerge.index.latent_listing import Listing
from capmerge.index.latent_names import ENDING, parse_array, parse_sized
from capmerge.index.latent_pool import FilePool
from capmerge.index.latent_sizes import Sizes, problem_of, read_sizes
from capmerge.index.latent_values import LatentTypeError, read_values
from capmerge.index.reader import Index

_FILES_PER_REPORT = 256


class BrokenFile(NamedTuple):
    """A file that a run could not train with."""

    path: Path
    problem: str
    """A part of a sentence, without a full stop."""


def iter_broken(
    index: Index,
    listing: Listing,
    jobs: int,
    progress: Callable[[int], None] | None = None,
) -> Iterator[BrokenFile]:
    """Read every file of `listing` and yield the broken ones, in the order of the records.

    Any number of `jobs` finds the same. `progress` is told how many files were read. Raises
    `WorkerError`.
    """
    waiting: deque[tuple[Path, int]] = deque()

    def paths() -> Iterator[str]:
        for entry in listing.iter_files(index):
            waiting.append(entry)
            yield str(entry[0])

    done = 0
    with FilePool(check_file, jobs) as pool:
        for done, found in enumerate(pool.map(paths()), start=1):
            path, record = waiting.popleft()
            if problem := found.problem or _other_size(path, found, index, record):
                yield BrokenFile(path, problem)
            if progress and done % _FILES_PER_REPORT == 0:
                progress(done)
    if progress:
        progress(done)


def check_file(path: str) -> Sizes:
    """Read all arrays of a file; return the sizes of its latents, or what is wrong with it."""
    found = read_sizes(path)
    if found.problem:
        return found
    try:
        with Npz(Path(path)) as npz:
            problem = _problem_in(npz)
    except READ_ERRORS as error:
        problem = problem_of(error)
    return Sizes([], problem) if problem else found


def _problem_in(npz: Npz) -> str:
    """What is wrong with the arrays of a file, as a part of a sentence; "" if nothing is."""
    names = sorted(npz.names)
    for name in names:
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
        shape = npz.header(f"latents{suffix}")[0]
        if array.shape != shape:
            return f'"{name}" has the shape {array.shape}, expected {shape}'
    return ""


def _other_size(path: Path, found: Sizes, index: Index, record: int) -> str:
    """The difference between a legacy file and its record's `train_resolution`; "" without one."""
    expected = int(index.width[record]), int(index.height[record])
    if not all(expected) or expected in found.sizes or parse_sized(path.name.removesuffix(ENDING)):
        return ""
    sizes = ", ".join(f"{width} x {height}" for width, height in found.sizes)
    return (
        f"found latents for {sizes} px, expected {expected[0]} x {expected[1]}, the "
        "train_resolution of its record"
    )
