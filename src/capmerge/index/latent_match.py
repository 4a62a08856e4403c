"""The search for the records of latents files, by their names.

Names are matched by the hashes of their stems. A matched file is opened only where its name and its
record do not tell the size of its latents. The search takes 12 bytes of memory per record and up to
34 per file; names are forgotten as soon as they are matched.
"""

import time
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from capmerge.captions.size import picture_size
from capmerge.files.shards import Shards
from capmerge.index.latent_names import (
    BROKEN,
    ENDING,
    LEGACY,
    SIZED,
    hash_of,
    parse_sized,
    sized_name,
    stem_of,
)
from capmerge.index.latent_pool import FilePool
from capmerge.index.latent_sizes import Sizes, read_sizes
from capmerge.index.reader import Index

CHOICE = np.dtype(
    [
        ("record", "<u4"),
        ("form", "u1"),
        ("name_width", "<u4"),
        ("name_height", "<u4"),
        ("width", "<u2"),
        ("height", "<u2"),
    ]
)
"""The columns of a listing: 17 bytes per latents file, or per size where a file has several."""
PACKED_CHOICE = np.dtype([*CHOICE.descr, ("member", "<u4")])
"""The columns of a listing of shards, which also have the number of the member."""
Entry = tuple[str | int, str]
"""A found file: its folder, or the number of a member of shards, and its name without `ENDING`."""
_FILES_AT_ONCE = 1 << 15
_FILES_PER_REPORT = 1 << 10


def sizes_of(shards: Shards | None, entry: Entry) -> Sizes:
    """Return the sizes of the latents in a found file, which is a member if there are `shards`."""
    place, name = entry
    if isinstance(place, int):
        assert shards is not None
        return read_sizes(shards[place])
    return read_sizes(Path(f"{place}/{name}{ENDING}"))


class Found:
    """The listing in memory while files come in: the choices that each record has.

    Hashes of file names are collected and then looked up together in the sorted hashes of the
    records' stems, because one search for many names is much faster than many for one. `pool`
    applies `sizes_of`. `progress` is told the number of files that are done.
    """

    def __init__(
        self,
        index: Index,
        pool: FilePool[Entry, Sizes],
        progress: Callable[[int], None] | None = None,
        *,
        packed: bool = False,
    ) -> None:
        self._dtype = PACKED_CHOICE if packed else CHOICE
        self._index, self._pool, self._progress = index, pool, progress
        order = np.argsort(index.stem_hash)
        self._hashes = index.stem_hash[order]
        self._order = order.astype(np.uint32)
        self.is_found = np.zeros(len(index), np.bool_)
        """True for the records that have at least one file."""
        self.seen = 0
        """The number of files so far."""
        self.opened = 0
        """The number of files so far that were opened for their sizes."""
        self.opening_seconds = 0.0
        """The time that opening them took."""
        self._done = 0
        self._files: list[Entry] = []
        self._waiting: list[tuple[bytes, int, int, int, int]] = []
        self._parts: list[NDArray[Any]] = []

    def add(self, prefixes: list[str], place: str | int, name: str) -> None:
        """Note the file `name`.npz at this place, where stems begin with any of `prefixes`.

        The place is a folder, or the number of a member of shards.
        """
        self.seen += 1
        number = len(self._files)
        self._files.append((place, name))
        sized = parse_sized(name)
        for prefix in prefixes:
            self._waiting.append((hash_of(prefix + name), LEGACY, 0, 0, number))
            if sized and sized[3] in SIZED:
                stem, width, height, suffix = sized
                hashed = hash_of(prefix + stem)
                self._waiting.append((hashed, SIZED[suffix], width, height, number))
        if len(self._waiting) >= _FILES_AT_ONCE:
            self.match()
        self._report(self.seen - len(self._files))

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
        choices = np.zeros(len(which), self._dtype)
        choices["record"] = records
        self.is_found[records] = True
        choices["form"], choices["name_width"], choices["name_height"], files = rest[which].T
        if self._dtype is PACKED_CHOICE:
            choices["member"] = np.array([place for place, _ in self._files], np.uint32)[files]
        self._parts.append(self._with_sizes(choices, files))
        self._files.clear()
        self._report(self.seen)

    def _with_sizes(self, choices: NDArray[Any], files: NDArray[np.uint32]) -> NDArray[Any]:
        """The choices, with one row for each size in their files; `files` are their numbers.

        A legacy file whose record has a `train_resolution` is not opened, and its size stays 0.
        """
        to_open = (choices["form"] != LEGACY) | (self._index.width[choices["record"]] == 0)
        if not to_open.any():
            return choices
        started, before = time.perf_counter(), self.seen - len(self._files)
        numbers, which = np.unique(files[to_open], return_inverse=True)
        entries = (self._files[number] for number in numbers.tolist())
        found = []
        for sizes, _ in self._pool.map(entries):
            found.append(sizes)
            self._report(before + len(found))
        # Repeat every opened file once per size.
        counts = np.array([max(1, len(sizes)) for sizes in found])
        starts = np.cumsum(counts) - counts
        flat = np.array([size for sizes in found for size in sizes or [(0, 0)]], np.uint16)
        times = counts[which]
        opened = np.repeat(choices[to_open], times)
        place = np.arange(len(opened)) - np.repeat(np.cumsum(times) - times, times)
        opened["width"], opened["height"] = flat[np.repeat(starts[which], times) + place].T
        opened["form"][opened["width"] == 0] |= BROKEN
        self.opened += len(found)
        self.opening_seconds += time.perf_counter() - started
        return np.concatenate((choices[~to_open], opened))

    def _report(self, done: int) -> None:
        if self._progress and done - self._done >= _FILES_PER_REPORT:
            self._done = done
            self._progress(done)

    def settle(self, folder: Path) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """Return all choices, and the order in which they belong into the listing.

        They are ordered by their records. Of several files of one form that a record has, those
        whose names have the size of its picture are kept; if there are none, all are kept, the
        newest first. Nothing can be added afterwards.
        """
        del self._hashes, self._order
        rows = np.concatenate(self._parts) if self._parts else np.zeros(0, self._dtype)
        self._parts.clear()
        order = np.argsort(rows["record"], kind="stable")
        records = rows["record"][order]
        equal = np.flatnonzero(records[1:] == records[:-1])
        if not len(equal):
            return rows, order

        # Among the records with several choices, order those by form, name and size.
        places = np.unique(np.concatenate((equal, equal + 1)))
        part = rows[order[places]]
        columns = ("height", "width", "name_height", "name_width")
        by_name = np.lexsort(
            (*(part[name] for name in columns), part["form"] & ~np.uint8(BROKEN), part["record"])
        )
        part, order[places] = part[by_name], order[places][by_name]

        # Choose between files whose names differ in nothing but the size.
        same, names = (part[1:], part[:-1]), ("name_width", "name_height")
        of_one_form = (same[0]["record"] == same[1]["record"]) & (
            (same[0]["form"] ^ same[1]["form"]) & ~np.uint8(BROKEN) == 0
        )
        other_name = of_one_form & np.logical_or(
            *(same[0][name] != same[1][name] for name in names)
        )
        kept = np.ones(len(order), np.bool_)
        disputed = np.unique(part["record"][:-1][other_name])
        inside = np.flatnonzero(np.isin(part["record"], disputed))
        for _, group in groupby(
            inside.tolist(),
            key=lambda at: (int(part["record"][at]), int(part["form"][at]) & ~BROKEN),
        ):
            at = list(group)
            best = self._preferred(part[at], folder)
            order[places[at[: len(best)]]] = order[places[at]][best]
            kept[places[at[len(best) :]]] = False
        return rows, order[kept]

    def _preferred(self, choices: NDArray[Any], folder: Path) -> list[int]:
        """The numbers of the choices to keep among those of one record and form, the best first.

        Shards have no times: they hold the newest file of a picture first.
        """
        key, record = self._index.read(int(choices["record"][0]))
        names = list(
            zip(choices["name_width"].tolist(), choices["name_height"].tolist(), strict=True)
        )
        own = [number for number, name in enumerate(names) if name == picture_size(record)]
        if own:
            return own
        form = int(choices["form"][0]) & ~BROKEN
        suffix = next((suffix for suffix, value in SIZED.items() if value == form), None)
        if suffix is None:
            return list(range(len(names)))
        stem = stem_of(key).text
        if self._dtype is PACKED_CHOICE:
            ages = dict(zip(names, (-choices["member"].astype(np.int64)).tolist(), strict=True))
        else:
            ages = {name: _written(folder / sized_name(stem, *name, suffix)) for name in set(names)}
        return sorted(
            range(len(names)),
            key=lambda number: (ages[names[number]], names[number][0] * names[number][1], number),
            reverse=True,
        )


def _written(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:  # it vanished meanwhile
        return 0
