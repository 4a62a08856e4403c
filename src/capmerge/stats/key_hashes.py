"""Hashes of keys that are the same in every process, on every machine: 8 bytes for each key.

Each byte of a key chooses a random number by its value and its place, and the hash is their
exclusive or (tabulation hashing). Two different keys have the same hash with a chance of 1 in 2^64;
only those that differ beyond `_PLACES` bytes may have it more often. Where hashes are equal, the
keys themselves decide.
"""

from functools import cache
from typing import TYPE_CHECKING

from capmerge.files.atomic import AtomicFile, Buffer
from capmerge.metadata.key_bytes import END

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PLACES = 1 << 10
_SEED = 20_240_601


class KeyHashes:
    """A sink of keys that writes the hash of each to a file, as 8 bytes, the lowest one first."""

    def __init__(self, file: AtomicFile) -> None:
        self._file = file
        self._begun = b""

    def write(self, data: Buffer, *, new_block: bool) -> None:  # noqa: ARG002  # a sink
        """Append keys, each with `END` behind it; the last one may be cut."""
        joined = self._begun + data
        whole = joined.rfind(END) + 1
        self._begun = joined[whole:]
        self._file.write(hash_keys(joined[:whole]).tobytes())


def hash_keys(joined: bytes) -> "NDArray[np.int64]":
    """The hash of each key; every one of them has `END` behind it.

    >>> hash_keys(b"one.png" + END).tolist() == hash_keys(b"two.png" + END).tolist()
    False
    """
    import numpy as np

    data = np.frombuffer(joined, np.uint8)
    ends = np.flatnonzero(data == END[0])
    starts = np.concatenate((ends[:0], [0], ends[:-1] + 1))[: len(ends)]
    places = np.arange(len(data), dtype=np.int32)
    places -= np.repeat(starts.astype(np.int32), ends + 1 - starts)
    places &= _PLACES - 1
    places <<= 8
    places |= data
    chosen = _table().take(places)
    hashes: NDArray[np.uint64] = np.bitwise_xor.reduceat(chosen, starts) if len(starts) else chosen
    return hashes.astype("<u8").view("<i8")


@cache
def _table() -> "NDArray[np.uint64]":
    import numpy as np

    # The raw stream of a bit generator never changes, in no version of numpy.
    numbers: NDArray[np.uint64] = np.random.PCG64(_SEED).random_raw(_PLACES * 256)
    return numbers
