"""The search for the latents of an index's records: walking a folder and matching its file names.

The walk sees every name once, and names are matched by the hashes of their stems. It takes 24 bytes
of memory per record, 20 of them for the result; names are forgotten as soon as they are hashed.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from capmerge.errors import CapmergeError, printable
from capmerge.index.latent_names import (
    ENDING,
    LEGACY,
    SIZED,
    hash_of,
    parse_sized,
    sized_name,
    stem_of,
)
from capmerge.index.reader import Index

SIZE_COLUMNS = tuple(side + suffix for suffix in SIZED for side in ("width", "height"))
"""The columns of a listing with the size of each sized form, in the order of the file."""

_FILES_AT_ONCE = 1 << 15


def iter_latents(folder: str) -> Iterator[tuple[str, str]]:
    """Yield every latents file in `folder` and below, links to folders followed.

    A file is given as its folder, written as a prefix of stems, and its name without `ENDING`. A
    link to a folder that contains the link is skipped, since it would never end. Raises
    `CapmergeError` for a folder that cannot be listed.
    """
    # Each entry has a path, its prefix, and the real folders that links on the way led out of.
    waiting: list[tuple[str, str, tuple[str, ...]]] = [(folder, "", ())]
    while waiting:
        path, prefix, passed = waiting.pop()
        with _listed(path) as entries:
            for entry in entries:
                if entry.name.endswith(ENDING) and not entry.is_dir(follow_symlinks=False):
                    yield prefix, entry.name.removesuffix(ENDING)
                elif _is_folder(entry):
                    here = passed
                    if entry.is_symlink():
                        here = (*passed, os.path.realpath(path))
                        target = os.path.realpath(entry.path)
                        if any((above + os.sep).startswith(target + os.sep) for above in here):
                            continue
                    waiting.append((entry.path, f"{prefix}{entry.name}/", here))


def latents_in(folder: Path) -> Iterator[str]:
    """Yield the names without `ENDING` of the latents in `folder` itself; none if it is missing."""
    if folder.is_dir():
        with _listed(str(folder)) as entries:
            for entry in entries:
                if entry.name.endswith(ENDING):
                    yield entry.name.removesuffix(ENDING)


def folders_of(index: Index, folder: Path, numbers: Iterable[int]) -> list[tuple[str, Path]]:
    """Return the folders outside of `folder` that the keys of these records lead to.

    Each is given as the prefix of its stems and its path.
    """
    parents = {stem_of(index.read(int(number))[0]).text.rpartition("/") for number in numbers}
    prefixes = {parent + slash for parent, slash, _ in parents if slash}
    return [(prefix, folder / prefix) for prefix in sorted(prefixes)]


def _listed(path: str) -> AbstractContextManager[Iterator[os.DirEntry[str]]]:
    try:
        return os.scandir(path)
    except OSError as error:
        raise CapmergeError(
            f"{printable(path)}: the folder cannot be listed ({error.strerror}). "
            "Check its permissions."
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    """True for a folder and a link to one; False for a link that leads to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def _age_and_area(
    folder: Path, stem: str, suffix: str, size: tuple[int, int]
) -> tuple[int, int, tuple[int, int]]:
    """Return the sort key of a size: of several sizes, the one with the largest key is taken."""
    try:
        written = (folder / sized_name(stem, *size, suffix)).stat().st_mtime_ns
    except OSError:  # it vanished meanwhile
        written = 0
    return written, size[0] * size[1], size


class Found:
    """The listing in memory while files come in: `form` and `sizes`, with one row per record.

    Hashes of file names are collected and then looked up together in the sorted hashes of the
    records' stems, because one search for many names is much faster than many for one.
    """

    def __init__(self, index: Index) -> None:
        self._index = index
        order = np.argsort(index.stem_hash)
        self._hashes = index.stem_hash[order]
        self._order = order.astype(np.uint32)
        self.form = np.zeros(len(index), np.uint8)
        self.sizes = {name: np.zeros(len(index), np.uint32) for name in SIZE_COLUMNS}
        self.seen = 0
        """The number of files so far."""
        self._waiting: list[tuple[bytes, int, int, int]] = []
        self._more: list[NDArray[np.uint32]] = []

    def add(self, prefixes: list[str], name: str) -> None:
        """Note the file `name`.npz of a folder that stems may begin with by any of `prefixes`."""
        self.seen += 1
        sized = parse_sized(name)
        for prefix in prefixes:
            self._waiting.append((hash_of(prefix + name), LEGACY, 0, 0))
            if sized:
                stem, width, height, suffix = sized
                self._waiting.append((hash_of(prefix + stem), SIZED[suffix], width, height))
        if len(self._waiting) >= _FILES_AT_ONCE:
            self.match()

    def match(self) -> None:
        """Find the records of all files that were noted since the last call."""
        if not self._waiting:
            return
        hashes = np.frombuffer(b"".join(entry[0] for entry in self._waiting), "<u8")
        rest = np.array([entry[1:] for entry in self._waiting], np.uint32)
        self._waiting.clear()
        # Each hash has a run of equal hashes in the sorted stems: none, one, or several, as a.png
        # and a.jpg have one stem. Repeat every file once per record of its run, and number the
        # places of the run from `first` on.
        first, end = (np.searchsorted(self._hashes, hashes, side) for side in ("left", "right"))
        times = end - first
        which = np.repeat(np.arange(len(hashes)), times)
        records = self._order[
            np.arange(len(which)) - np.repeat(np.cumsum(times) - times - first, times)
        ]
        forms, widths, heights = rest[which].T
        self.form[records[forms == LEGACY]] |= LEGACY
        for suffix, form in SIZED.items():
            mine = forms == form
            self._take(suffix, form, records[mine], widths[mine], heights[mine])

    def _take(
        self,
        suffix: str,
        form: int,
        records: NDArray[np.uint32],
        widths: NDArray[np.uint32],
        heights: NDArray[np.uint32],
    ) -> None:
        all_widths, all_heights = self.sizes["width" + suffix], self.sizes["height" + suffix]
        new = (self.form[records] & form) == 0
        all_widths[records[new]], all_heights[records[new]] = widths[new], heights[new]
        self.form[records] |= form
        # A record with several sizes has one of them in the columns now; `settle` gets the others.
        other = (all_widths[records] != widths) | (all_heights[records] != heights)
        if other.any():
            self._more.append(
                np.stack(
                    (
                        records[other],
                        np.full(np.count_nonzero(other), form),
                        widths[other],
                        heights[other],
                    ),
                    axis=1,
                )
            )

    def settle(self, folder: Path) -> None:
        """Choose one size for each picture that has files of several sizes.

        Its `image_size` goes first, then the newest file, then the largest size.
        """
        if not self._more:
            return
        more = np.unique(np.concatenate(self._more), axis=0)
        suffix_of = {form: suffix for suffix, form in SIZED.items()}
        for (number, form), sizes in groupby(
            map(np.ndarray.tolist, more), key=lambda row: (row[0], row[1])
        ):
            suffix = suffix_of[form]
            widths, heights = self.sizes["width" + suffix], self.sizes["height" + suffix]
            found = {(width, height) for _, _, width, height in sizes} | {
                (int(widths[number]), int(heights[number]))
            }
            key, record = self._index.read(number)
            own = [pair for pair in found if list(pair) == record.get("image_size")]
            widths[number], heights[number] = max(
                own or found, key=partial(_age_and_area, folder, stem_of(key).text, suffix)
            )
