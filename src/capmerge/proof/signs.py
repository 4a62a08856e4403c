r"""Counts signs in a JSON text without a parser: quotes, escapes, brackets and digits.

What a parser gives is held against these counts. numpy counts five to ten times as fast as
`bytes.count`. The text is taken in parts, so that the memory for it is bounded.
"""

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PART_BYTES = 1 << 20
_BACKSLASH, _QUOTE, _U, _D = b'\\"ud'
_LIST, _CASE = b"["[0], 0x20
"""The bit that tells small letters from capital ones."""
_QUOTE_CODE = rb"\u0022"
_CODES_TO_LOOK_AT = re.compile(rb"\\u(?:[dD][89a-fA-F]|0022)")
"""Those of surrogates, and of a quote."""
_HIGH_HALVES, _DIGITS = 0xF0F0F0F0F0F0F0F0, 0x3030303030303030


class Signs(NamedTuple):
    """What is found in a JSON text at first sight."""

    quotes: int
    """How many quotes it has, escaped ones included."""
    lists: int
    """How many opening square brackets it has, those in strings included."""
    may_have_half_a_pair: bool
    r"""Whether an escape such as `\ud83d` may lack the other half of its surrogate pair."""
    may_have_quote_codes: bool
    r"""Whether it may have `\u0022`, a quote that is not written as one."""


class ExactSigns(NamedTuple):
    """What is found in a JSON text at second sight."""

    quotes: int
    """How many quotes begin or end a string, so twice the number of strings."""
    has_half_a_pair: bool
    r"""Whether an escape such as `\ud83d` is one half of a surrogate pair, without the other."""


def signs_of(text: bytes) -> Signs:
    """Return what is found in a text at first sight."""
    import numpy as np

    quotes = lists = 0
    letters = np.frombuffer(text, np.uint8)
    for start, end in _parts(letters):
        part = letters[start:end]
        quotes += int(np.count_nonzero(part == _QUOTE))
        lists += int(np.count_nonzero(part == _LIST))
    if not _CODES_TO_LOOK_AT.search(text):
        return Signs(quotes, lists, may_have_half_a_pair=False, may_have_quote_codes=False)
    may_have_half_a_pair = False
    for start, end in _parts(letters):
        places = np.flatnonzero(letters[start:end] == _BACKSLASH) + start
        if places.size:
            # The last letter of valid JSON is none of these, whatever is found behind it.
            codes = places[letters.take(places + 1, mode="clip") == _U]
            ones, others = _halves(letters, codes)
            # Where one backslash follows another, some of the codes may be none.
            is_sure = places[0] > start and not (places[1:] == places[:-1] + 1).any()
            if ones.size or others.size:
                may_have_half_a_pair |= not (is_sure and np.array_equal(ones + 6, others))
    return Signs(quotes, lists, may_have_half_a_pair, _QUOTE_CODE in text)


def exact_signs_of(text: bytes) -> ExactSigns:
    """Return what is found in a valid JSON text at second sight."""
    import numpy as np

    letters = np.frombuffer(text, np.uint8)
    quotes, has_half_a_pair = 0, False
    second_halves = np.empty(0, np.intp)  # where they have to be, behind the part
    first = 0  # behind the escape that begins at the end of the part before
    for start, end in _parts(text):
        quotes += int(np.count_nonzero(letters[start:end] == _QUOTE))
        escapes = _escapes(letters, max(first, start), end)
        if escapes.size:
            first = int(escapes[-1]) + 2
            escaped = letters[np.minimum(escapes + 1, len(text) - 1)]
            quotes -= int(np.count_nonzero(escaped == _QUOTE))
            escapes = escapes[escaped == _U]
        if escapes.size or second_halves.size:
            ones, others = _halves(letters, escapes)
            due = np.concatenate((second_halves, ones + 6))
            has_half_a_pair |= not np.array_equal(due[due < end], others)
            second_halves = due[due >= end]
    return ExactSigns(quotes, has_half_a_pair or second_halves.size > 0)


def _escapes(letters: "NDArray[np.uint8]", start: int, end: int) -> "NDArray[np.intp]":
    """Return the places in [start, end) where an escape begins; none reaches over `start`."""
    import numpy as np

    places = np.flatnonzero(letters[start:end] == _BACKSLASH)
    if not places.size:
        return places
    # In a run of backslashes, every second one is escaped by the one before.
    numbers = np.arange(places.size)
    is_first = np.ones(places.size, np.bool_)
    np.not_equal(places[1:], places[:-1] + 1, out=is_first[1:])
    in_run = numbers - np.maximum.accumulate(np.where(is_first, numbers, 0))
    found: NDArray[np.intp] = places[(in_run & 1) == 0] + start
    return found


def _halves(
    letters: "NDArray[np.uint8]", escapes: "NDArray[np.intp]"
) -> "tuple[NDArray[np.intp], NDArray[np.intp]]":
    r"""Return which of the escapes `\uXXXX` are first halves of surrogate pairs, and second ones.

    The first are D800 to DBFF, the second DC00 to DFFF.
    """
    escapes = escapes[escapes + 3 < letters.size]
    escapes = escapes[(letters[escapes + 2] | _CASE) == _D]
    digits = letters[escapes + 3] | _CASE
    is_second = digits >= b"c"[0]
    return escapes[(digits >= b"8"[0]) & ~is_second], escapes[is_second]


def may_have_long_integer(text: bytes) -> bool:
    """Return whether `text` may have an integer outside [-2^63, 2^63), which has 19 digits.

    It is False for nearly all texts that have none.
    """
    import numpy as np

    # Of so many digits, eight in a row are one of the words that the text consists of.
    words = np.frombuffer(text, np.uint64, len(text) // 8)
    return any(
        bool(((words[start:end] & _HIGH_HALVES) == _DIGITS).any()) for start, end in _parts(words)
    )


def quotes_in(text: bytes) -> int:
    """Return the number of quotes in `text`, escaped or not."""
    import numpy as np

    letters = np.frombuffer(text, np.uint8)
    return sum(
        int(np.count_nonzero(letters[start:end] == _QUOTE)) for start, end in _parts(letters)
    )


def _parts(text: "bytes | NDArray[Any]") -> Iterator[tuple[int, int]]:
    for start in range(0, len(text), _PART_BYTES):
        yield start, min(start + _PART_BYTES, len(text))
