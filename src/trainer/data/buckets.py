"""Buckets, each of which holds the records that may share a batch.

A bucket holds all records of one (width, height, chunk count). Inside this package the triple is
written as its code, a single number with the same order. Columns are read one window at a time.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from capmerge.captions.size import MOST_PX
from trainer.data.shuffle import Numbers
from trainer.errors import LatentsError

WINDOW = 1 << 18
"""The number of records that are read at a time: 6 MB of columns and codes."""

_SIDE_BITS, _CHUNKS_BITS = MOST_PX.bit_length(), 16


class SetRows(NamedTuple):
    """The columns that the plan needs of one data set, with one row per record."""

    width: NDArray[np.integer]
    """Pixels, below 2**24; may be a memmap."""
    height: NDArray[np.integer]
    """Pixels, below 2**24; may be a memmap."""
    chunks: NDArray[np.integer] | None
    """Chunk counts below 2**16, already capped by the settings.

    None in all sets when chunk counts do not separate buckets.
    """
    repeats: int
    """The number of times that an epoch trains each record."""
    usable: NDArray[np.bool_] | None
    """False for records that are left out; None when none are."""


def iter_usable(
    rows: SetRows, first: int = 0, last: int | None = None
) -> Iterator[tuple[Numbers, Numbers]]:
    """The usable records among `first` .. `last` - 1 with the codes of their buckets.

    They come one window at a time. Raises `ValueError` for a size or a chunk count that does not
    fit in a code.
    """
    last = len(rows.width) if last is None else last
    for start in range(first, last, WINDOW):
        window = slice(start, min(start + WINDOW, last))
        records = np.arange(window.start, window.stop, dtype=np.uint64)
        columns = [rows.width[window], rows.height[window]]
        columns.append(
            np.zeros(len(records), dtype=np.int64) if rows.chunks is None else rows.chunks[window]
        )
        if rows.usable is not None:
            usable = np.asarray(rows.usable[window])
            records, columns = records[usable], [column[usable] for column in columns]
        width, height, chunks = (np.asarray(column, dtype=np.uint64) for column in columns)
        if np.any((width | height) >> np.uint64(_SIDE_BITS)) or np.any(
            chunks >> np.uint64(_CHUNKS_BITS)
        ):
            raise ValueError(
                f"expected sides below 2**{_SIDE_BITS} pixels "
                f"and chunk counts below 2**{_CHUNKS_BITS}"
            )
        yield records, (width << np.uint64(_SIDE_BITS) | height) << np.uint64(_CHUNKS_BITS) | chunks


def triple_of(code: int) -> tuple[int, int, int]:
    """The width, height and chunk count (0 for none) of the bucket with this code."""
    sides, chunks = divmod(code, 1 << _CHUNKS_BITS)
    return *divmod(sides, 1 << _SIDE_BITS), chunks


def bucket_sizes(sets: Sequence[SetRows]) -> tuple[Numbers, NDArray[np.int64]]:
    """The codes of all buckets in ascending order, and the number of samples per epoch in each.

    Raises `LatentsError` when no record is usable.
    """
    if len({rows.chunks is None for rows in sets}) > 1:
        raise ValueError("expected chunk counts in all sets or in none")
    sizes: Counter[int] = Counter()
    for rows in sets:
        for _, codes in iter_usable(rows):
            found, counts = np.unique(codes, return_counts=True)
            sizes.update(dict(zip(found.tolist(), (counts * rows.repeats).tolist(), strict=True)))
    if not sizes:
        n_records = sum(len(rows.width) for rows in sets)
        raise LatentsError(
            f"data: none of the {n_records:,} records is usable, expected at least one. "
            "Check data.metadata and data.latents."
        )
    ascending = sorted(sizes)
    return np.array(ascending, dtype=np.uint64), np.array(
        [sizes[code] for code in ascending], dtype=np.int64
    )


def largest_area(sets: Sequence[SetRows]) -> int:
    """The area in square pixels of the largest usable record."""
    areas = [0]
    for rows in sets:
        for start in range(0, len(rows.width), WINDOW):
            window = slice(start, start + WINDOW)
            found = rows.width[window].astype(np.int64) * rows.height[window]
            if rows.usable is not None:
                found = found[np.asarray(rows.usable[window])]
            areas.append(int(found.max(initial=0)))
    return max(areas)


def next_of_bucket(sets: Sequence[SetRows], dataset: int, record: int) -> Iterator[tuple[int, int]]:
    """The other usable records in the data set and bucket of a usable record.

    Each is a (data set, record); those after the record come first, then those before it.
    """
    rows = sets[dataset]
    ((_, (bucket,)),) = iter_usable(rows, record, record + 1)
    for first, last in ((record + 1, len(rows.width)), (0, record)):
        for records, codes in iter_usable(rows, first, last):
            for found in records[codes == bucket].tolist():
                yield dataset, found
