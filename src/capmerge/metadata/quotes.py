"""Counts the strings in JSON by their quotes, which shows whether a JSON library left some out."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import ModuleType

_BACKSLASH, _QUOTE = b'\\"'
_BYTES_PER_LOOK = 100
"""Bytes that are searched for a backslash and a quote in the time of a look at one backslash."""
_LARGE_BYTES, _SMALL_BYTES = 256_000_000, 1 << 14
"""The size of files that numpy is imported for, and of parts that it counts."""
_numpy: "ModuleType | None" = None


def prepare_to_count(total_bytes: int) -> None:
    """Let numpy count from now on, if so many bytes are worth its import.

    It takes a quarter to a half of the time of `bytes.count`, and its import takes 0.1 s.
    """
    global _numpy  # noqa: PLW0603  # the module is imported late
    if total_bytes >= _LARGE_BYTES:
        import numpy as np

        _numpy = np


def has_no_more_strings(data: bytes, strings: int) -> bool:
    """True if there are no more strings in `data`, keys included, than the ones that were found.

    `data` is any part of valid JSON, and `strings` is the number of them in the value that a JSON
    library made of it. The library has left a member out if there are more: it keeps one value for
    each key of an object.
    """
    # Only the two quotes around a string are not escaped. Most parts have no other quotes, and then
    # the first comparison is proof enough, since there are at least as many strings as were found.
    quotes = _quotes(data)
    return quotes == 2 * strings or quotes - _escaped_quotes(data) == 2 * strings


def strings_in(data: bytes) -> int:
    """The number of strings in `data`, keys included, which is any part of valid JSON."""
    return (_quotes(data) - _escaped_quotes(data)) // 2


def _quotes(data: bytes) -> int:
    if _numpy is None or len(data) < _SMALL_BYTES:
        return data.count(b'"')
    return int(_numpy.count_nonzero(_numpy.frombuffer(data, _numpy.uint8) == _QUOTE))


def _escaped_quotes(data: bytes) -> int:
    if _numpy is not None and len(data) >= _SMALL_BYTES:
        return _escaped_by_numpy(data)
    # Where backslashes are rare, one after the other is looked at; a search for two bytes at once
    # takes ten times as long as one for a single byte.
    if data.count(b"\\") * _BYTES_PER_LOOK > len(data):
        # Without its escaped backslashes, a backslash before a quote escapes the quote.
        return data.replace(b"\\\\", b"").count(b'\\"')
    quotes, place = 0, data.find(b"\\")
    while place >= 0:
        quotes += data[place + 1] == _QUOTE
        place = data.find(b"\\", place + 2)
    return quotes


def _escaped_by_numpy(data: bytes) -> int:
    import numpy as np

    letters = np.frombuffer(data, np.uint8)
    places = np.flatnonzero(letters == _BACKSLASH)
    # In a row of backslashes, the first, the third and so on escape what follows.
    numbers = np.arange(places.size)
    is_first = np.ones(places.size, np.bool_)
    np.not_equal(places[1:], places[:-1] + 1, out=is_first[1:])
    number_in_row = numbers - np.maximum.accumulate(np.where(is_first, numbers, 0))
    escaping = places[number_in_row % 2 == 0]
    return int(np.count_nonzero(letters.take(escaping + 1, mode="clip") == _QUOTE))
