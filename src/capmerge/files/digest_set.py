"""A set of many texts in 16 bytes each, for tests of membership alone.

It holds digests and not the texts. Among 12 million texts two different ones have the same digest
with a chance of 1 in 10^24.
"""

from collections.abc import Iterable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

_DIGEST_BYTES = 16
_DIGEST = np.dtype(f"S{_DIGEST_BYTES}")


class DigestSet:
    """The digests of texts, sorted. Worker processes that are forked share its memory."""

    def __init__(self, texts: Iterable[bytes]) -> None:
        digests = bytearray()
        for text in texts:
            digests += _digest(text)
        self._sorted: NDArray[np.bytes_] = np.frombuffer(digests, _DIGEST)
        self._sorted.sort()  # in place, so that there is never a second copy

    def __len__(self) -> int:
        """The number of different texts."""
        ordered = self._sorted
        return len(ordered) and 1 + int(np.count_nonzero(ordered[1:] != ordered[:-1]))

    def contains(self, texts: Sequence[bytes]) -> list[bool]:
        """Whether each of `texts` is in the set."""
        if not len(self._sorted):
            return [False] * len(texts)
        wanted = np.frombuffer(b"".join(map(_digest, texts)), _DIGEST)
        places = np.searchsorted(self._sorted, wanted)
        found: list[bool] = (self._sorted[places % len(self._sorted)] == wanted).tolist()
        return found


def _digest(text: bytes) -> bytes:
    return blake2b(text, digest_size=_DIGEST_BYTES).digest()
