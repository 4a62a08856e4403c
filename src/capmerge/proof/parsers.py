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

from io import BytesIO
from itertools import chain
from typing import Any, TypeAlias

import ijson
import orjson

from capmerge.metadata.blocks import Kind
from capmerge.metadata.codec import Stray
from capmerge.metadata.scan import IMAGE_PATH, MAX_NESTING
from capmerge.proof.signs import (
    Signs,
    exact_signs_of,
    may_have_long_integer,
    quotes_in,
    signs_of,
)

Pair: TypeAlias = tuple[str, Any]
Values: TypeAlias = list[Any]
"""The pairs of an object, or the values of lines."""

_YAJL = ijson.get_backend("yajl2_c")
_INT64_OVERFLOW = float(1 << 63)
_MOST_BRACKETS = 4096
"""The most objects and lists in what ijson reads at once: 40 MB if all are inside each other."""


def values_by_ijson(text: bytes, kind: Kind) -> Values | None:
    """Return what ijson reads in an object or in lines; None where it may not read all of it."""
    signs = signs_of(text)
    if (
        b"\x0b" in text
        or b"\x0c" in text
        # Every object that is not empty has a key between quotes.
        or (signs.lists + signs.quotes // 2 > _MOST_BRACKETS and not _is_flat(text, kind))
        or (signs.may_have_half_a_pair and exact_signs_of(text).has_half_a_pair)
    ):
        return None
    # ijson gets all of it at once: a string that reaches over many parts takes it the square of
    # their number.
    file, size = BytesIO(text), len(text) + 1
    try:
        if kind == "json":
            values = list(_YAJL.kvitems(file, "", use_float=True, buf_size=size))
        elif (lines := _lines_of_objects(text)) is None:
            return None
        else:
            values = list(
                _YAJL.items(file, "", use_float=True, multiple_values=True, buf_size=size)
            )
            if len(values) != lines:
                return None
    except (ijson.JSONError, UnicodeDecodeError):
        return None
    return values if _has_all(text, signs, values, kind) else None


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
    if may_have_long_integer(text):
        _, _, has_large_floats = count_strings(values, kind)
        if has_large_floats:
            return None
    return values if _has_all(text, signs_of(text), values, kind) else None


def _is_flat(text: bytes, kind: Kind) -> bool:
    """Return whether orjson reads `text`, which refuses what is nested deeper than 1024.

    ijson would take much memory for that.
    """
    try:
        for part in (text,) if kind == "json" else text.split(b"\n"):
            if _strip(part):
                orjson.loads(part)
    except orjson.JSONDecodeError:
        return False
    return True


def _has_all(text: bytes, signs: Signs, values: Values, kind: Kind) -> bool:
    """Return whether `values` hold all strings of `text`, and are not nested too deep.

    There are fewer than in the text where a field or a key occurs twice.
    """
    try:
        # orjson refuses what is nested deeper than 254, and so less than `MAX_NESTING`.
        written = orjson.dumps(values)
    except orjson.JSONEncodeError:
        strings, depth, _ = count_strings(values, kind)
        return depth <= MAX_NESTING and 2 * strings == exact_signs_of(text).quotes
    # A quote in a string is written as an escaped quote, which is how it mostly stands in the text.
    if quotes_in(written) == signs.quotes and not signs.may_have_quote_codes:
        return True
    return exact_signs_of(written).quotes == exact_signs_of(text).quotes


def text_of(records: bytes | memoryview, kind: Kind, *, last: bool) -> bytes:
    """Return records as a text that a parser reads: an object, or lines."""
    return b"".join((b"{", records, b"" if last else b"}")) if kind == "json" else bytes(records)


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
