"""The records that a preview shows: the first, some by their keys, random ones or the longest."""

import heapq
import random
from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice
from typing import Any

from capmerge.errors import StaleError, UsageError, printable, quoted
from capmerge.files.source import FileSource, Source
from capmerge.index.reader import open_index
from capmerge.metadata.blocks import FileLayout
from capmerge.metadata.codec import Pair
from capmerge.metadata.key_search import find_record, read_record
from capmerge.metadata.pieces import Piece, iter_source

_MOST_SEARCHED = 8
"""The most keys that are searched for one after the other, since each search reads the file."""
Progress = Callable[[int], None]


def first_records(source: Source, layout: FileLayout, count: int) -> Iterator[Pair]:
    """The first `count` records."""
    pairs = (pair for piece in iter_source(source, layout) for pair in piece.records.pairs)
    return islice(pairs, count)


def random_records(
    source: Source, layout: FileLayout, count: int, seed: int, progress: Progress | None
) -> Iterator[Pair]:
    """`count` records of the whole file, each with the same chance, in the order of the file.

    Equal seeds give equal records. No more than `count` records are in memory, besides a piece.
    """
    # Each record gets a random number, and those with the least are chosen. `random()` gives equal
    # numbers in all versions of Python, which is not promised for the other methods.
    draw = random.Random(seed).random  # noqa: S311  # nothing secret
    chosen: list[tuple[float, int, Pair]] = []
    number = 0
    for piece in _read(source, layout, progress):
        for pair in piece.records.pairs:
            number += 1
            _keep_greatest(chosen, (-draw(), -number, pair), count)
    for _, _, pair in sorted(chosen, key=lambda kept: -kept[1]):
        yield pair


def longest_records(
    source: Source,
    layout: FileLayout,
    count: int,
    lengths: Callable[[list[Any]], list[int]],
    progress: Progress | None,
) -> Iterator[Pair]:
    """The `count` records with the greatest `lengths`, the longest first.

    Of equally long ones the earlier is the longer. `lengths` is given the records of a piece.
    """
    chosen: list[tuple[float, int, Pair]] = []
    number = 0
    for piece in _read(source, layout, progress):
        found = lengths(piece.records.values())
        for length, pair in zip(found, piece.records.pairs, strict=True):
            number += 1
            _keep_greatest(chosen, (length, -number, pair), count)
    for _, _, pair in sorted(chosen, key=lambda kept: kept[:2], reverse=True):
        yield pair


def _keep_greatest(
    chosen: list[tuple[float, int, Pair]], new: tuple[float, int, Pair], count: int
) -> None:
    """Add `new` to the heap `chosen`, which keeps its `count` greatest; no two have one number."""
    if len(chosen) < count:
        heapq.heappush(chosen, new)
    elif new[:2] > chosen[0][:2]:
        heapq.heapreplace(chosen, new)


def named_records(
    source: Source, layout: FileLayout, keys: tuple[str, ...], progress: Progress | None
) -> Iterator[Pair]:
    """The first record of each of these keys, in the order of the file.

    A few records of a file are looked up in its index, if there is one that fits, or are found by
    the bytes of their keys. Otherwise, and where there is no record of a key, the file is decoded.

    Raises `UsageError` at the end when the source has no record of a key.
    """
    if isinstance(source, FileSource) and len(set(keys)) <= _MOST_SEARCHED:
        starts = _indexed_records(source, keys)
        starts = starts or _searched_records(source, layout, keys, progress)
        if starts is not None:
            for start in sorted(starts):
                yield read_record(source, layout, start)
            return
    missing = dict.fromkeys(keys)
    stems = {_stem(key): key for key in missing}
    alike: dict[str, str] = {}
    records = 0
    for piece in _read(source, layout, progress):
        found = dict(reversed(list(piece.records.pairs)))  # the first of equal keys
        for key in [key for key in missing if key in found]:
            del missing[key]
            yield key, found[key]
        if not missing:
            return
        for key in found:
            if (stem := _stem(key)) in stems:
                alike.setdefault(stems[stem], key)
        records += len(piece.records.pairs)
    names = ", ".join(map(quoted, missing))
    hints = [f"Did you mean {quoted(alike[key])}?" for key in missing if key in alike]
    hint = " ".join(hints) or "Give whole keys, with folder and ending."
    raise UsageError(f"{printable(source.name)}: found no record {names} among {records:,}. {hint}")


def _indexed_records(source: FileSource, keys: tuple[str, ...]) -> list[int] | None:
    """The offset of the record of each key by the index beside the file.

    Returns None where that does not tell: without an index that fits, where a key is missing, and
    where keys are repeated, because then the index has only the last record of each key.
    """
    assert source.path is not None  # it is a file
    try:
        index = open_index(source.path)
        if index.repeated:
            return None
        numbers = [number for key in dict.fromkeys(keys) for number in index.rows_of(key)]
        starts = [int(index.offset[number]) for number in numbers]
    except StaleError:
        return None
    return starts if len(starts) == len(set(keys)) else None


def _searched_records(
    source: FileSource, layout: FileLayout, keys: tuple[str, ...], progress: Progress | None
) -> list[int] | None:
    """The offset of the first record of each key; None where one of them has none.

    `progress` is told a share of the file, as if all searches together read it once.
    """
    starts: list[int] = []
    total = source.total_bytes or 0
    wanted = dict.fromkeys(keys)
    for number, key in enumerate(wanted):
        told = progress and partial(_tell_share, progress, number * total, len(wanted))
        start = find_record(source, layout, key, told)
        if start is None:
            return None
        starts.append(start)
    return starts


def _tell_share(progress: Progress, before: int, searches: int, done: int) -> None:
    """Tell the progress of one of some searches, `before` which so many bytes were searched."""
    progress((before + done) // searches)


def _read(source: Source, layout: FileLayout, progress: Progress | None) -> Iterator[Piece]:
    """All pieces; `progress` is told the offset that is done."""
    for piece in iter_source(source, layout):
        yield piece
        if progress:
            progress(piece.start + len(piece.data))


def _stem(key: str) -> str:
    """The last part of a key without its ending, in lower case."""
    name = key.replace("\\", "/").rpartition("/")[2].lower()
    return name.rpartition(".")[0] or name
