"""What orjson would change in a value, and the number of strings in it.

orjson refuses lone surrogates, NaN and numbers past 1e308, and silently turns integers outside
[-2^63, 2^64) into floats; Python's own json wrote such files. Pieces that hold any of these go
through the standard library, both ways.
"""

import re
from collections.abc import Collection, Iterable
from typing import Any

import orjson

from capmerge.metadata.quotes import strings_in
from capmerge.metadata.scan import MAX_NESTING

_EXPONENT = re.compile(rb"e(?<=[0-9]e)\+?[0-9]")
_INT64_OVERFLOW = float(1 << 63)


def find_exact(values: Iterable[Any]) -> frozenset[int]:
    """The numbers of those values that orjson refuses to write, or may write otherwise."""
    return frozenset(number for number, value in enumerate(values) if _is_exact(value))


def _is_exact(value: Any) -> bool:
    try:
        orjson.dumps(value)
    except orjson.JSONEncodeError:
        return True
    # What is not finite becomes null, and a large number has an exponent. Strings need no such
    # search, and they are most of a record.
    others = _others(value.values() if value.__class__ is dict else [value])
    text = orjson.dumps(others)
    return (b"null" in text or _EXPONENT.search(text) is not None) and _look_into(value)[1]


def _others(values: Iterable[Any]) -> list[Any]:
    """What remains of `values` without strings, and without those in the objects among them."""
    return [
        item
        for value in values
        for item in (value.values() if value.__class__ is dict else (value,))
        if item.__class__ is not str
    ]


def count_unless_lossy(values: Collection[Any]) -> int | None:
    """The number of strings in `values`, at any depth, keys included.

    It is None when a float, at any depth, could be an integer that orjson changed, or where a value
    is nested about as deep as it may be, or deeper.
    """
    if set(map(type, values)) != {dict}:
        return _count_inside(list(values))
    # Nearly all values are texts. orjson writes the others faster than a loop in Python looks at
    # them: their strings are then counted by quotes.
    others = [value for record in values for value in record.values() if value.__class__ is not str]
    inside = _count_inside(others)
    return None if inside is None else 2 * sum(map(len, values)) - len(others) + inside


def _count_inside(values: list[Any]) -> int | None:
    """What `count_unless_lossy` gives for values of any kind."""
    # Large floats are those that orjson writes with an exponent: it makes floats of the integers
    # that do not fit into 64 bits. It refuses objects in objects at a depth far below what is
    # allowed.
    try:
        text = orjson.dumps(values)
    except orjson.JSONEncodeError:
        text = b""
    if text and not _EXPONENT.search(text):
        return strings_in(text)
    strings, is_lossy = _look_into(values)
    return None if is_lossy else strings


def count_strings(value: Any) -> int:
    """The number of strings in `value`, at any depth, keys included."""
    return _look_into(value)[0]


def _look_into(value: Any) -> tuple[int, bool]:
    """The number of strings in `value`, at any depth, and whether it could be a lossy reading."""
    # Level by level: a recursion would end at a depth that depends on the calls under way.
    level, depth, strings, is_lossy = [value], 0, 0, False
    while level:
        below: list[Any] = []
        for item in level:
            if isinstance(item, str):
                strings += 1
            elif isinstance(item, float):
                is_lossy = is_lossy or not -_INT64_OVERFLOW < item < _INT64_OVERFLOW
            elif isinstance(item, list):
                below += item
            elif isinstance(item, dict):
                strings += len(item)
                below += item.values()
        level, depth = below, depth + 1
    return strings, is_lossy or depth > MAX_NESTING - 2
