"""Whole numbers in a seeded order, written into an array of any length in bounded memory. Knows neither samples nor files.

The order is part of what a run repeats and resumes by, so nothing here may ever change. The
definition, for other programs: the numbers of a group stand in ascending order of `hash_of(number,
key)`, the (number + 1)-th output of splitmix64 started at `key`, compared as unsigned 64-bit
integers. The hash is one to one, so there are no ties.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.uint64]
Groups = NDArray[np.int64]

_WORD = (1 << 64) - 1
_PART_BITS = 18  # parts of about 2^17 to 2^18 numbers: 12 million in 20 MB of private memory, and no slower than larger ones


def hash_of(numbers: Numbers, key: int) -> Numbers:
    """For each number the (number + 1)-th output of splitmix64 started at `key`, any whole number of 64 bits.

    Source: Steele, Lea, Flood, "Fast splittable pseudorandom number generators" (OOPSLA 2014).
    """
    gamma = 0x9E3779B97F4A7C15
    words = numbers * np.uint64(gamma)
    words += np.uint64((key + gamma) & _WORD)
    words ^= words >> np.uint64(30)
    words *= np.uint64(0xBF58476D1CE4E5B9)
    words ^= words >> np.uint64(27)
    words *= np.uint64(0x94D049BB133111EB)
    words ^= words >> np.uint64(31)
    return words


def fill_in_order(
    out: NDArray[np.unsignedinteger],
    pieces: Callable[[], Iterable[tuple[Numbers, Groups]]],
    group_sizes: NDArray[np.int64],
    key: int,
) -> None:
    """Fill `out` with all numbers: group 0, group 1, ..., each in the order that `key` gives it.

    `pieces` gives the numbers with their groups, in pieces that fit in memory; it is called twice
    and must give the same both times. Numbers go to the parts of their groups by the upper bits of
    their hash, then each part is sorted where it lies.
    """
    bits = np.array(
        [max(0, (int(size) - 1).bit_length() - _PART_BITS) for size in group_sizes], dtype=np.uint64
    )
    first_part = np.concatenate(([0], np.cumsum(1 << bits.astype(np.int64))))
    n_parts = int(first_part[-1])
    narrow = np.uint16 if n_parts <= 1 << 16 else np.uint32  # 16 bits are sorted by radix

    def iter_parts() -> Iterator[tuple[Numbers, NDArray[np.unsignedinteger]]]:
        for numbers, groups in pieces():
            upper = (
                hash_of(numbers, key) >> np.uint64(1) >> (np.uint64(63) - bits[groups])
            )  # a shift by 64 is not defined
            yield numbers, (first_part[groups] + upper.astype(np.int64)).astype(narrow)

    sizes = np.zeros(n_parts, dtype=np.int64)
    for _, parts in iter_parts():
        sizes += np.bincount(parts, minlength=n_parts)
    ends = np.cumsum(sizes)
    places = ends - sizes
    for numbers, parts in iter_parts():
        found = np.bincount(parts, minlength=n_parts)
        here = np.repeat(places - (np.cumsum(found) - found), found)
        here += np.arange(len(numbers))
        out[here] = numbers[np.argsort(parts, kind="stable")]
        places += found
    for start, end in zip((ends - sizes).tolist(), ends.tolist(), strict=True):
        part = out[start:end]
        out[start:end] = part[np.argsort(hash_of(part.astype(np.uint64), key))]
