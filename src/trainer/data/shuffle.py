"""Integers in a seeded order, written into an array of any length in bounded memory.

The order is part of what a run repeats and resumes by, so nothing here may ever change. The
definition, for other programs: the numbers of a group are in ascending order of `hash_of(number,
key)`, the (number + 1)-th output of splitmix64 started at `key`, compared as unsigned 64-bit
integers. The hash is one to one, so there are no ties.
"""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
from numpy.typing import NDArray

Numbers = NDArray[np.uint64]
Groups = NDArray[np.int64]

_WORD = (1 << 64) - 1
# Parts of about 2^17 to 2^18 numbers: 12 million numbers take 20 MB of private memory, and larger
# parts are no faster.
_PART_BITS = 18


def hash_of(numbers: Numbers, key: int) -> Numbers:
    """For each number the (number + 1)-th output of splitmix64 started at `key`.

    The key is any 64-bit integer. Source: Steele, Lea, Flood, "Fast splittable pseudorandom number
    generators" (OOPSLA 2014).
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

    `pieces` yields the numbers with their groups, in arrays that fit in memory; it is called twice
    and must yield the same both times. `group_sizes` holds the number of numbers in each group.

    A counting sort puts the numbers into parts of their groups, by the upper bits of their hash:

        out    | group 0: part 0 | part 1 | group 1: part 2 | part 3 | part 4 | ...
        places   ^ next free position of each part; each array adds its numbers there

    The parts of a group are in ascending order of hash, so sorting each part in place sorts the
    group.
    """
    # A group is cut into 2**bits parts.
    bits = np.array(
        [max(0, (int(size) - 1).bit_length() - _PART_BITS) for size in group_sizes], dtype=np.uint64
    )
    first_part = np.concatenate(([0], np.cumsum(1 << bits.astype(np.int64))))
    n_parts = int(first_part[-1])
    narrow = np.uint16 if n_parts <= 1 << 16 else np.uint32  # 16 bits are sorted by radix

    def iter_parts() -> Iterator[tuple[Numbers, NDArray[np.unsignedinteger]]]:
        for numbers, groups in pieces():
            # Two shifts, because one by 64 is not defined.
            upper = hash_of(numbers, key) >> np.uint64(1) >> (np.uint64(63) - bits[groups])
            yield numbers, (first_part[groups] + upper.astype(np.int64)).astype(narrow)

    # First pass: count the numbers of each part, to know where each part begins.
    sizes = np.zeros(n_parts, dtype=np.int64)
    for _, parts in iter_parts():
        sizes += np.bincount(parts, minlength=n_parts)
    ends = np.cumsum(sizes)
    places = ends - sizes
    # Second pass: order the numbers of an array by part, and write each run to the next free
    # positions of its part.
    for numbers, parts in iter_parts():
        found = np.bincount(parts, minlength=n_parts)
        here = np.repeat(places - (np.cumsum(found) - found), found)
        here += np.arange(len(numbers))
        out[here] = numbers[np.argsort(parts, kind="stable")]
        places += found
    # Sort each part in place.
    for start, end in zip((ends - sizes).tolist(), ends.tolist(), strict=True):
        part = out[start:end]
        out[start:end] = part[np.argsort(hash_of(part.astype(np.uint64), key))]
