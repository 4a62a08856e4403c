"""The choice between the latents of a record: what a run wants, and how each choice is scored."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from capmerge.index.latent_names import BROKEN, LEGACY, SIZED
from capmerge.index.latent_sizes import MOST_PX
from capmerge.index.reader import Index

_AREA_BITS = 33
_ANSWERING_BIT = _AREA_BITS + 2
"""The bit of a score that says that a choice has the wanted resolution."""


class Wanted(NamedTuple):
    """The latents that a run takes, where a record has several."""

    suffixes: tuple[str, ...]
    """The forms of `SIZED` that the model takes, the best first; a legacy name goes before them
    all, as in sd-scripts."""
    resolution: int | None = None
    """The side in px of a square that has the area of the wanted buckets; None: the largest."""


class Buckets(NamedTuple):
    """The choices of a run: one row per record."""

    width: NDArray[np.unsignedinteger]
    """The width in px of its bucket; 0 where it has none."""
    height: NDArray[np.unsignedinteger]
    found: NDArray[np.bool_]
    """True where it has a file, even a broken one."""
    several: int
    """The number of records that have latents of several sizes."""
    answering: int
    """The number of records whose bucket has the wanted resolution."""
    differing: int
    """The number of records whose bucket is another one than their `train_resolution`."""


def scored(
    rows: dict[str, NDArray[Any]], wanted: Wanted, index: Index
) -> tuple[tuple[NDArray[Any], NDArray[Any]], NDArray[np.uint64]]:
    """Return the sides in px of each choice, and a score: the highest of a record's is taken.

    0 is a file that the model does not take, and 1 a broken one. Otherwise the wanted resolution
    decides first, then the form of the name, then the area.
    """
    record, opened = rows["record"], rows["width"] != 0
    is_broken = (rows["form"] & BROKEN) != 0
    if opened.all():
        width, height = rows["width"].astype(np.uint64), rows["height"].astype(np.uint64)
    else:
        width, height = (
            np.where(opened | is_broken, rows[name], side[record]).astype(np.uint64)
            for name, side in (("width", index.width), ("height", index.height))
        )
    rank = np.zeros(256, np.uint64)
    for place, suffix in enumerate(reversed(wanted.suffixes)):
        rank[SIZED[suffix]] = place + 1
    rank[LEGACY] = len(wanted.suffixes) + 1
    ranks = rank[rows["form"] & ~np.uint8(BROKEN)]
    area = np.minimum(width * height, np.uint64((1 << _AREA_BITS) - 1))
    scores = (ranks << np.uint64(_AREA_BITS)) + area
    if wanted.resolution is not None:
        square = np.uint64(wanted.resolution**2)
        scores += (
            ((area <= square) & (area * np.uint64(2) > square)).astype(np.uint64)
        ) << np.uint64(_ANSWERING_BIT)
    scores[is_broken] = 1
    scores[ranks == 0] = 0
    return (width, height), scores


def buckets_of(parts: Iterable[dict[str, NDArray[Any]]], wanted: Wanted, index: Index) -> Buckets:
    """Return the bucket of every record of `index`, from the choices of a listing in parts.

    Each part has all choices of its records, in the order of the records.
    """
    # Sides of a `train_resolution` may need more bits than those of a listing.
    most = max(int(side.max(initial=0)) for side in (index.width, index.height))
    side_type: type[np.uint16 | np.uint32] = np.uint16 if most <= MOST_PX else np.uint32
    width: NDArray[np.unsignedinteger] = np.zeros(len(index), side_type)
    height: NDArray[np.unsignedinteger] = np.zeros(len(index), side_type)
    found = np.zeros(len(index), np.bool_)
    several = answering = differing = 0
    for rows in parts:
        records = rows["record"]
        sides, scores = scored(rows, wanted, index)
        starts = np.flatnonzero(np.concatenate(([True], records[1:] != records[:-1])))
        best = np.maximum.reduceat(scores, starts)
        ends = np.append(starts[1:], len(records))
        # The first of equal ones is the newest.
        is_best = np.flatnonzero(scores == np.repeat(best, ends - starts))
        taken = is_best[np.searchsorted(is_best, starts)]
        taken = taken[best > 0]
        mine = records[taken]
        found[mine] = True
        width[mine], height[mine] = sides[0][taken], sides[1][taken]
        answering += int(np.count_nonzero(best >> np.uint64(_ANSWERING_BIT)))
        before = index.width[mine], index.height[mine]
        differing += int(
            np.count_nonzero(
                (before[0] != 0)
                & (sides[0][taken] != 0)
                & ((before[0] != sides[0][taken]) | (before[1] != sides[1][taken]))
            )
        )
        usable = scores > 1
        several += _count_several(records[usable], sides[0][usable], sides[1][usable])
    return Buckets(width, height, found, several, answering, differing)


def _count_several(records: NDArray[Any], width: NDArray[Any], height: NDArray[Any]) -> int:
    """The number of records, which are in ascending order, that have more than one size."""
    if not len(records):
        return 0
    starts = np.flatnonzero(np.concatenate(([True], records[1:] != records[:-1])))
    spread = [
        np.maximum.reduceat(side, starts) != np.minimum.reduceat(side, starts)
        for side in (width, height)
    ]
    return int(np.count_nonzero(spread[0] | spread[1]))
