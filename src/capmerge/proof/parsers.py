r"""The parsers of `verify`: ijson for the source, orjson for the output.

yajl2_c, the C backend of ijson, reads most files as Python's json does, but not all (measured with
ijson 3.6):

- A lone surrogate such as `\ud83d` becomes "?", or joins what follows to another character.
- Of a field that a record has twice it gives the last value, as json does, and tells nothing.
- A vertical tab and a form feed count as white space, but are not valid JSON.
- It refuses NaN, Infinity, 1e400, and integers outside (-2^63, 2^63).
- It follows any nesting, and takes memory that grows with the square of the depth.

orjson refuses lone surrogates, NaN and 1e400, and makes floats of integers outside [-2^63, 2^64).

Where any of these may be, the functions here return None, and `reading` takes the standard library.
"""

import re
from io import BytesIO
from itertools import chain
from typing import Any, TypeAlias

import ijson
import orjson

from capmerge.metadata.blocks import Kind
from capmerge.metadata.codec import Stray
from capmerge.metadata.scan import IMAGE_PATH, MAX_NESTING

Pair: TypeAlias = tuple[str, Any]
Values: TypeAlias = list[Any]
"""The pairs of an object, or the values of lines."""

_YAJL = ijson.get_backend("yajl2_c")
_BUFFER_BYTES = 1 << 17
_INT64_OVERFLOW = float(1 << 63)
_ESCAPE = re.compile(rb"\\.", re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
# The escape of a surrogate pair, of half a pair (which is the group), or any other.
_ESCAPES = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F]|(u[dD][89a-fA-F])|.)", re.DOTALL
)


def values_by_ijson(text: bytes, kind: Kind) -> Values | None:
    """Return what ijson reads in an object or in lines; None where it may not read all of it."""
    if b"\x0b" in text or b"\x0c" in text or _has_half_a_pair(text):
        return None
    file = BytesIO(text)
    try:
        if kind == "json":
            values = list(_YAJL.kvitems(file, "", use_float=True, buf_size=_BUFFER_BYTES))
        elif (lines := _lines_of_objects(text)) is None:
            return None
        else:
            values = list(
                _YAJL.items(file, "", use_float=True, multiple_values=True, buf_size=_BUFFER_BYTES)
            )
            if len(values) != lines:
                return None
    except (ijson.JSONError, UnicodeDecodeError):
        return None
    strings, depth, _ = count_strings(values, kind)
    is_exact = depth <= MAX_NESTING and has_strings(text, strings)
    return values if is_exact else None


def values_by_orjson(text: bytes, kind: Kind) -> Values | None:
    """Return what orjson reads in an object or in lines; None where it may not read all of it."""
    try:
        values: Values = (
            list(orjson.loads(text).items())
            if kind == "json"
            else [orjson.loads(line) for line in text.split(b"\n") if _strip(line)]
        )
    except orjson.JSONDecodeError:
        return None
    strings, depth, has_large_floats = count_strings(values, kind)
    is_exact = not has_large_floats and depth <= MAX_NESTING and has_strings(text, strings)
    return values if is_exact else None


def text_of(records: bytes | memoryview, kind: Kind, *, last: bool) -> bytes:
    """Return records as a text that a parser reads: an object, or lines."""
    return b"".join((b"{", records, b"" if last else b"}")) if kind == "json" else bytes(records)


def _has_half_a_pair(text: bytes) -> bool:
    """Return whether an escape in `text` is one half of a surrogate pair, without the other."""
    if not _SURROGATE.search(text):
        return False
    return any(escape[1] for escape in _ESCAPES.finditer(text))


def _lines_of_objects(text: bytes) -> int | None:
    """Return the number of lines in `text` that are not blank; None unless all begin and end so.

    Each of them begins with `{` and ends with `}`. In valid JSON these follow each other only
    between two values, so that no value reaches over the end of a line.
    """
    lines = [line for line in map(_strip, text.split(b"\n")) if line]
    if any(line[:1] != b"{" or line[-1:] != b"}" for line in lines):
        return None
    return len(lines)


def _strip(line: bytes) -> bytes:
    return line.strip(b" \t\r")


def pair_of(value: Any) -> Pair:
    """Return the key and the record of a line of JSONL."""
    if not isinstance(value, dict) or not isinstance(value.get(IMAGE_PATH), str):
        return "", Stray(value, "")
    return value.pop(IMAGE_PATH), value


def has_strings(text: bytes, strings: int) -> bool:
    """Return whether there are so many strings in `text`.

    There are more than in its values where a field or a key occurs twice.
    """
    quotes = text.count(b'"')
    if quotes != 2 * strings and b"\\" in text:
        quotes -= _ESCAPE.findall(text).count(b'\\"')
    return quotes == 2 * strings


def count_strings(values: Values, kind: Kind) -> tuple[int, int, bool]:
    """Return the number of strings in `values`, keys included, how deep they nest, and more.

    The last is whether a float is as large as an integer of which orjson makes a float.
    """
    # Level by level, and without a step of Python for each value: every value of a file comes by.
    strings = depth = 0
    has_large_floats = False
    if kind == "json":
        strings = len(values)
        values = [record for _, record in values]
    while values:
        types = list(map(type, values))
        strings += types.count(str)
        below: list[Any] = []
        if list in types:
            below += chain.from_iterable([value for value in values if value.__class__ is list])
        if dict in types:
            objects = [value for value in values if value.__class__ is dict]
            strings += sum(map(len, objects))
            below += chain.from_iterable(map(dict.values, objects))
        if float in types and not has_large_floats:
            floats = (value for value in values if value.__class__ is float)
            has_large_floats = any(abs(value) >= _INT64_OVERFLOW for value in floats)
        depth += list in types or dict in types
        values = below
    return strings, depth, has_large_floats
