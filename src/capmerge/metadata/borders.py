"""Finds the borders between records by counting braces, where searching for them is deceived.

Nested objects and odd keys can look like the end of a record, so `cuts` may guess wrong again and
again. Counting knows what is inside a string and how deep each character lies. It reads every byte
once, at some 200 MB per second and in bounded memory, whatever the file holds. It takes valid JSON
for granted: as with a guess, only decoding proves that a border is right.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Integers = NDArray[np.int64]
    Bytes = NDArray[np.uint8]

_QUOTE, _COMMA, _BACKSLASH = 0x22, 0x2C, 0x5C
# Braces and brackets differ only in this bit.
_BRACE_BIT, _OPENING, _CLOSING = 0x20, 0x7B, 0x7D


class Border(NamedTuple):
    """A border between two members of the top-level object, as offsets in the source."""

    comma: int
    next_start: int
    """The quote of the next key. Only white space may stand between the comma and it."""


class BorderCounter:
    """Finds the borders in consecutive parts of a source.

    `start` is the offset of the first part, which begins at the quote of a key.
    """

    def __init__(self, start: int) -> None:
        self.place = start
        """The offset of the part that must be fed next."""
        self.depth = 0
        """How many objects and lists are open behind what was fed; -1 behind the last brace."""
        self.in_string = False
        """True when a string is open behind what was fed."""
        self._comma: int | None = None

    def feed(self, data: bytes, least: int = 0) -> Iterator[Border]:
        """Yield the borders in `data` whose comma stands at the offset `least` or behind it.

        A border whose quote is in a later part comes with that part. The next part begins at
        `place`, which may be one byte before the end of `data`. A part has at least two bytes, but
        for the last one.
        """
        import numpy as np

        # The next part must not begin behind half an escape.
        if (len(data) - len(data.rstrip(b"\\"))) % 2 and len(data) > 1:
            data = data[:-1]
        start, self.place = self.place, self.place + len(data)
        letters = np.frombuffer(data, np.uint8)

        # The places of all quotes, commas, braces and brackets, without the quotes in strings.
        braces = letters | _BRACE_BIT
        wanted = (letters == _QUOTE) | (letters == _COMMA)
        wanted |= (braces == _OPENING) | (braces == _CLOSING)
        places = np.flatnonzero(wanted)
        found = letters[places]
        if b'\\"' in data:
            kept = _end_strings(letters, places, found)
            places, found = places[kept], found[kept]
        if not len(places):
            return

        # The number of quotes up to each of them tells whether it is inside a string, and the sum
        # of the braces outside of strings how deep it is.
        quotes = found == _QUOTE
        inside = (np.cumsum(quotes) + self.in_string) & 1 == 1
        braces = found | _BRACE_BIT
        steps = (braces == _OPENING).astype(np.int8) - (braces == _CLOSING)
        steps[inside] = 0
        depths = np.cumsum(steps, dtype=np.int64) + self.depth
        commas = places[~inside & (found == _COMMA) & (depths == 0)] + start
        openings = places[quotes & inside] + start
        self.depth, self.in_string = int(depths[-1]), bool(inside[-1])

        # The first quote behind a comma between two records opens a key.
        commas = commas[commas >= least]
        if self._comma is not None:
            commas = np.concatenate(([self._comma], commas))
        numbers = np.searchsorted(openings, commas)
        self._comma = int(commas[-1]) if len(commas) and numbers[-1] == len(openings) else None
        whole = commas[numbers < len(openings)]
        yield from map(Border, whole.tolist(), openings[numbers[: len(whole)]].tolist())


def _end_strings(letters: "Bytes", places: "Integers", found: "Bytes") -> "NDArray[np.bool_]":
    """False for each of the letters `found` at `places` that is an escaped quote.

    `letters` do not begin behind half an escape.
    """
    import numpy as np

    # A quote is escaped if the backslashes in front of it are odd in number.
    behind = np.flatnonzero((found == _QUOTE) & (places > 0) & (letters[places - 1] == _BACKSLASH))
    backslashes = np.concatenate(([False], letters == _BACKSLASH))
    rows = np.flatnonzero(backslashes[1:] & ~backslashes[:-1])
    ends = places[behind]
    lengths = ends - rows[np.searchsorted(rows, ends) - 1]
    kept = np.ones(len(places), bool)
    kept[behind[lengths % 2 == 1]] = False
    return kept
