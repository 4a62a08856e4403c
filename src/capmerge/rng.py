"""Draws random integers that are a pure function of a sample's identity and a purpose.

The same question gets the same answer in every process, order, version of Python and release of
this package. Runs are repeated and resumed by it, so nothing here may ever change. The definition,
for other programs:

    word c*8 .. c*8+7 = BLAKE2b(key = seed, person = "capmerge", message = dataset, epoch, repeat,
    c, purpose, 0x00, record key)

read as eight little-endian 64-bit words. The seed is 16 bytes; dataset, epoch, repeat and the
counter c are 8 bytes each; all are signed and little-endian. Purpose and record key are UTF-8, a
lone surrogate as its three bytes.
"""

import hashlib
import struct
from collections.abc import Iterator
from itertools import count
from typing import NamedTuple

_WORD_BITS = 64
_WORDS = struct.Struct("<8Q")
_HEADER = struct.Struct("<4q")


class SampleId(NamedTuple):
    """The identity of one training sample; everything random about the sample follows from it.

    Numbers count from 0. `seed` fits in 127 bits, the other numbers in 63; all may be negative.
    """

    seed: int
    """The seed of the run."""
    epoch: int
    key: str
    """The key of the record; lone surrogates are allowed."""
    dataset: int = 0
    """The number of the data set that the record belongs to."""
    repeat: int = 0
    """The number of the repeat, if an epoch holds the record more than once."""


class Chance(NamedTuple):
    """The random numbers of one sample, a pure function of its identity."""

    sample: SampleId

    def below(self, limit: int, purpose: str) -> int:
        """A uniform random integer in [0, `limit`); different purposes give independent numbers.

        >>> Chance(SampleId(seed=1, epoch=0, key="a.png")).below(10, "line")
        7

        Raises `ValueError` for a limit below 1, `OverflowError` or `struct.error` for a seed past
        127 bits or another number past 63.
        """
        if limit < 1:
            raise ValueError(f"found a limit of {limit}, expected 1 or more")
        if limit == 1:
            return 0
        words_per_number = -(-(limit - 1).bit_length() // _WORD_BITS)
        # Numbers from `fair` on would favour the low remainders, so they are drawn again.
        fair = (1 << _WORD_BITS * words_per_number) // limit * limit
        words = self._words(purpose)
        while True:
            number = next(words)
            for _ in range(words_per_number - 1):
                number = number << _WORD_BITS | next(words)
            if number < fair:
                return number % limit

    def _words(self, purpose: str) -> Iterator[int]:
        seed, epoch, key, dataset, repeat = self.sample
        seed_bytes = seed.to_bytes(16, "little", signed=True)
        asked = f"{purpose}\0{key}".encode("utf-8", "surrogatepass")
        for counter in count():
            message = _HEADER.pack(dataset, epoch, repeat, counter) + asked
            yield from _WORDS.unpack(
                hashlib.blake2b(message, key=seed_bytes, person=b"capmerge").digest()
            )
