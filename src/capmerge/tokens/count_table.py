"""Looks up small counts for short pieces of text, ten thousand at once, in fixed memory.

This module owns the cutting of texts into space-separated pieces, and a hash table of machine words
that compares whole keys, so it never mistakes one piece for another. It does not know that the
counts are of tokens. It is numpy and not a dict because a look-up among 300,000 strings takes
0.2 us, nearly all of it waiting for memory; here the look-ups of a batch wait together, and take
0.07 us per piece, including the cutting.
"""

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Self

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Words = NDArray[np.uint64]

# The number of 8-byte words in the keys of each table. The last byte of a key is left for the
# count, so that keys hold 7, 15 and 31 bytes.
_WIDTHS = (1, 2, 4)
_WAYS = 4
_COUNT_SHIFT = np.uint64(56)
_KEY_BITS = np.uint64(8)
# Odd numbers with their bits spread out, so that the top bits of a sum of products depend on every
# byte.
_FACTORS = np.array(
    [0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9, 0xD6E8FEB86659FD93], np.uint64
)
_FIRST_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)

# The space and NUL are the only bytes without any of these bits.
_NOT_SPACE = np.uint8(~ord(" ") & 0xFF)
_LETTER_OR_DIGIT = np.array([chr(byte).isascii() and chr(byte).isalnum() for byte in range(256)])

LONGEST_BYTES = 8 * _WIDTHS[-1] - 1


class Pieces:
    """The pieces of `" ".join(texts).split(" ")`, as spans of bytes.

    The bytes are the texts in UTF-8, with NUL between them. `starts` and `lengths` are int64
    (n_pieces,), in bytes. `first` is int64 (n_texts,): the number of each text's first piece.
    `hold_nul` is true when a text contains a NUL of its own; then the pieces are of no use, because
    keys are filled up with zeros.
    """

    def __init__(self, texts: Sequence[str]) -> None:
        # A piece ends at every space and every NUL, which are the bytes that the mask makes zero.
        # `edges` are the starts of all pieces, and one start more after the last. A text begins
        # with the piece after a NUL.
        self.bytes = "\0".join(texts).encode("utf-8", "surrogatepass")
        self.hold_nul = self.bytes.count(0) != len(texts) - 1
        self._padded = np.frombuffer(self.bytes + bytes(8 * _WIDTHS[-1]), np.uint8)
        ends = np.flatnonzero((self._padded[: len(self.bytes)] & _NOT_SPACE) == 0)
        edges = np.empty(len(ends) + 2, np.int64)
        edges[0], edges[-1] = 0, len(self.bytes) + 1
        np.add(ends, 1, out=edges[1:-1])
        self.starts: Integers = edges[:-1]
        self.lengths: Integers = np.diff(edges) - 1
        self.first: Integers = np.concatenate(
            ([0], np.flatnonzero(self._padded.take(ends) == 0) + 1)
        )

    def __len__(self) -> int:
        return len(self.starts)

    def texts(self, numbers: Integers) -> list[str]:
        """The pieces with these numbers."""
        starts = self.starts.take(numbers)
        ends = starts + self.lengths.take(numbers)
        spans = zip(starts.tolist(), ends.tolist(), strict=True)
        return [self.bytes[start:end].decode("utf-8", "surrogatepass") for start, end in spans]

    def without_last_byte(self, numbers: Integers) -> Self:
        """The pieces with these numbers, each without its last byte; `first` is of no use there."""
        shorter = copy(self)
        shorter.starts = self.starts.take(numbers)
        shorter.lengths = self.lengths.take(numbers) - 1
        return shorter

    def places(self, numbers: Integers) -> list[int]:
        """The numbers of the texts that contain the pieces with these numbers."""
        places: list[int] = (np.searchsorted(self.first, numbers, side="right") - 1).tolist()
        return places

    def find(self, byte: int, chosen: NDArray[np.bool_]) -> tuple[Integers, Integers, Integers]:
        """Every occurrence of an ASCII character in the `chosen` texts.

        Returns its offsets in `bytes`, and the numbers of the pieces and of the texts it is in.
        """
        found = np.flatnonzero(self._padded[: len(self.bytes)] == byte)
        texts = np.searchsorted(self.starts.take(self.first), found, side="right") - 1
        mine = chosen[texts]
        found = found[mine]
        return found, np.searchsorted(self.starts, found, side="right") - 1, texts[mine]

    def is_between(self, places: Integers, not_before: bytes, behind: bytes) -> NDArray[np.bool_]:
        """True for places with none of the bytes `not_before` in front, and one of `behind` behind.

        Between two texts there is a NUL. There is nothing before the first text, which is no place
        between bytes.
        """
        may_be_before, may_be_behind = np.ones(256, bool), np.zeros(256, bool)
        may_be_before[[*not_before]], may_be_behind[[*behind]] = False, True
        before, after = self._padded[places - 1], self._padded[places + 1]
        found: NDArray[np.bool_] = (places > 0) & may_be_before[before] & may_be_behind[after]
        return found

    def ends_a_word(self, places: Integers, numbers: Integers) -> NDArray[np.bool_]:
        """True for each character that ends its piece, alone or after an ASCII letter or digit.

        `places` are the offsets of the characters in `bytes`, `numbers` those of their pieces.
        """
        starts = self.starts.take(numbers)
        follows = (places == starts) | _LETTER_OR_DIGIT[self._padded[places - 1]]
        last: NDArray[np.bool_] = (places == starts + self.lengths.take(numbers) - 1) & follows
        return last

    def keys(self, chosen: Integers, width: int) -> Words:
        """The bytes of each chosen piece as words (n_chosen, width), filled up with zeros."""
        # A view of the bytes as words, one beginning at every byte, without a copy. The mask clears
        # the bytes of a word that are past the end of its piece.
        words = np.ndarray((len(self._padded) - 7,), "<u8", self._padded, strides=(1,))
        starts, lengths = self.starts.take(chosen), self.lengths.take(chosen)
        keys = np.empty((len(chosen), width), np.uint64)
        for column in range(width):
            first_bytes = _FIRST_BYTES.take(lengths - 8 * column, mode="clip")
            np.bitwise_and(words[starts + 8 * column], first_bytes, out=keys[:, column])
        return keys


class CountTable:
    """A map from pieces of up to LONGEST_BYTES bytes to counts below 256.

    It takes 56 bytes x `n_slots`, which is a power of 2. It consists of three hash tables, for
    pieces of up to 7, 15 and 31 bytes, with `n_slots` rows each. A row holds the piece's bytes,
    then zeros, and the count as the last byte. A piece may be in any of the four rows of its group;
    if all of them are taken, a new piece replaces one of them.
    """

    def __init__(self, n_slots: int) -> None:
        self._shift = np.uint64(64 - (n_slots - 1).bit_length())
        self._rows = [np.zeros((n_slots, width), np.uint64) for width in _WIDTHS]
        self._turn = 0

    def look_up(self, pieces: Pieces) -> tuple[Integers, Integers]:
        """The count of each piece, and the numbers of the pieces that are not held.

        The counts are int64 (n_pieces,), and 0 for those not held. The numbers are in no particular
        order.
        """
        # All keys of one width are compared with the first row of their groups at once. Those that
        # differ go on to the second row, and so on; a key that differs from all four is unknown.
        # The rows of a group are those whose numbers differ in the last two bits.
        counts = np.zeros(len(pieces), np.int64)
        unknown = [np.flatnonzero(pieces.lengths > LONGEST_BYTES)]
        for rows, chosen in self._by_width(pieces.lengths):
            keys = pieces.keys(chosen, rows.shape[1])
            slots = self._slots(keys)
            found, rest = _compare(rows, slots, keys)
            for way in range(1, _WAYS):
                if len(rest) == 0:
                    break
                found[rest], still = _compare(rows, slots.take(rest) ^ way, keys.take(rest, axis=0))
                rest = rest.take(still)
            found[rest] = 0
            counts[chosen] = found
            unknown.append(chosen.take(rest))
        return counts, np.concatenate(unknown)

    def store(self, pieces: Pieces, numbers: Integers, counts: Integers) -> None:
        """Hold the counts of the pieces with these `numbers`, all of them different and not held.

        Pieces that are too long are left out.
        """
        for rows, chosen in self._by_width(pieces.lengths.take(numbers)):
            keys = pieces.keys(numbers.take(chosen), rows.shape[1])
            slots = self._slots(keys)
            # The first free row of the group is taken, because it is looked at first. If there is
            # none, the four rows of the group are replaced in turn.
            self._turn += 1
            target = slots ^ (self._turn % _WAYS)
            for way in reversed(range(_WAYS)):
                free = rows[slots ^ way, 0] == 0
                target[free] = slots[free] ^ way
            keys[:, -1] |= counts.take(chosen).astype(np.uint64) << _COUNT_SHIFT
            rows[target] = keys  # if two keys have the same target, the last one gets it

    @property
    def n_held(self) -> int:
        """The number of pieces that are held."""
        return sum(int(np.count_nonzero(rows[:, 0])) for rows in self._rows)

    def _by_width(self, lengths: Integers) -> Iterator[tuple[Words, Integers]]:
        """The rows of each table, and the indices of the `lengths` that belong into it."""
        shortest = 0
        for rows, width in zip(self._rows, _WIDTHS, strict=True):
            yield rows, np.flatnonzero((lengths >= shortest) & (lengths < 8 * width))
            shortest = 8 * width

    def _slots(self, keys: Words) -> Integers:
        """The number of the first row to try for each key: the top bits of its hash."""
        hashes = keys[:, 0] * _FACTORS[0]
        for column in range(1, keys.shape[1]):
            hashes += keys[:, column] * _FACTORS[column]
        hashes >>= self._shift
        slots: Integers = hashes.view(np.int64)
        return slots


def _compare(rows: Words, slots: Integers, keys: Words) -> tuple[Integers, Integers]:
    """The counts in the rows at `slots`, and the indices of the rows that hold another key.

    The XOR of a row and its own key leaves only the count in the last byte, because a key ends in
    0. If any other byte is left, the row holds another key.
    """
    differences = rows.take(slots, axis=0)
    differences ^= keys
    counts = differences[:, -1] >> _COUNT_SHIFT
    other = differences[:, -1] << _KEY_BITS
    for column in range(rows.shape[1] - 1):
        other |= differences[:, column]
    return counts.view(np.int64), np.flatnonzero(other)
