"""Decodes the bytes of records into (key, record) pairs and encodes them again, without loss.

The records are those that `json.load` would read. orjson is the fast way. It refuses lone
surrogates, NaN and numbers past 1e308, and silently turns integers outside [-2^63, 2^64) into
floats; Python's own json wrote such files. Pieces that hold any of these go through the standard
library, both ways.
"""

import codecs
import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import orjson

from capmerge.metadata.blocks import Kind
from capmerge.metadata.format import FRAMINGS
from capmerge.metadata.scan import IMAGE_PATH, MAX_NESTING, nests_too_deep

Pair = tuple[str, Any]

_INT64_OVERFLOW = float(1 << 63)
_INSIDE = slice(len(FRAMINGS["json"].opening), -len(FRAMINGS["json"].closing))


class NotJsonError(ValueError):
    """The bytes are not whole records, because the cut was wrong or the source is damaged."""


class Stray(NamedTuple):
    """A line of JSONL that is valid JSON but not a record with a key."""

    value: Any
    problem: str


class Records(NamedTuple):
    """Decoded records, in the order of their bytes."""

    pairs: Collection[Pair]
    exact: bool
    """True when only the standard library can write them as they are."""

    def values(self) -> list[Any]:
        """The records without their keys."""
        return [record for _, record in self.pairs]


def decode(data: bytes | memoryview, kind: Kind, *, last: bool) -> Records:
    """The records of one piece; `last` says that its bytes reach the end of the source.

    A line of JSONL that is not an object with an `image_path` gives a pair of "" and a `Stray`.

    Raises `NotJsonError` when the bytes are not whole records.
    """
    if kind == "jsonl":
        return _decode_lines(bytes(data))
    # Whole members between braces are one object, and the last piece of a source already ends with
    # the closing brace. orjson reads nearly all of them. Where it refuses, or may have lost digits
    # of an integer, the standard library reads the same text again, and its result counts.
    text = b"".join((b"{", data, b"" if last else b"}"))
    try:
        records = orjson.loads(text)
        if not _holds_lost_integer(records.values()):
            return Records(records.items(), exact=False)
    except orjson.JSONDecodeError:
        pass
    records = _loads(text)
    _check_nesting(text, records.values())
    return Records(records.items(), exact=True)


def decode_members(members: Sequence[bytes]) -> list[dict[str, Any]] | None:
    """The members, each of them `"key": value`, decoded at once to one object each.

    Returns None when some are not whole, or when only the standard library reads them; then
    `decode` each of them. If the first is known to begin at a key of the top-level object, the
    result proves every boundary between two of them: the `},{` inserted there leaves the parser as
    deep as it was, so it separates two objects of the list only if it is at the depth of that
    object.
    """
    try:
        objects: list[dict[str, Any]] = orjson.loads(b"".join((b"[{", b"},{".join(members), b"}]")))
    except orjson.JSONDecodeError:
        return None
    if len(objects) != len(members) or _holds_lost_integer(
        value for members in objects for value in members.values()
    ):
        return None
    return objects


def encode(records: Records, kind: Kind) -> bytes | memoryview:
    r"""The bytes of records in the output, without what separates them from their neighbours.

    JSON: members of an object indented by two spaces, raw UTF-8, `\uXXXX` only for control
    characters and lone surrogates, as `json.dump(indent=2, ensure_ascii=False)` lays them out.
    JSONL: one line per record, `image_path` first. A JSONL record must not have an `image_path` of
    its own.
    """
    if not records.pairs:
        return b""
    separator = FRAMINGS[kind].separator
    if kind == "jsonl":
        return separator.join(
            _line(key, record, exact=records.exact) for key, record in records.pairs
        )
    members = dict(records.pairs)
    if len(members) == len(records.pairs):
        return _members(members, exact=records.exact)
    return separator.join(
        _members({key: record}, exact=records.exact) for key, record in records.pairs
    )


def to_json(value: Any) -> str:
    """The JSON text of `value` on one line, from which the standard library reads an equal value.

    It may hold NaN and integers of any size; lone surrogates are written as escapes.
    """
    return (
        json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogate_as_json").decode("utf-8")
    )


def _decode_lines(data: bytes) -> Records:
    lines = [line for line in data.split(b"\n") if line.strip(b" \t\r")]
    try:
        values, exact = [orjson.loads(line) for line in lines], False
        if _holds_lost_integer(values):
            values, exact = _exact_lines(lines), True
    except orjson.JSONDecodeError:
        values, exact = _exact_lines(lines), True
    return Records([_keyed(value) for value in values], exact)


def _exact_lines(lines: list[bytes]) -> list[Any]:
    values = [_loads(line) for line in lines]
    _check_nesting(b"".join(lines), values)
    return values


def _keyed(value: Any) -> Pair:
    if not isinstance(value, dict):
        return "", Stray(value, "the line is not an object, expected one record per line.")
    key = value.get(IMAGE_PATH)
    if not isinstance(key, str):
        return "", Stray(
            value, f'the line has no "{IMAGE_PATH}" string, expected the key of an image.'
        )
    del value[IMAGE_PATH]
    return key, value


def _loads(text: bytes) -> Any:
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise NotJsonError(str(error)) from error


def _check_nesting(text: bytes, records: Iterable[Any]) -> None:
    """Raise `NotJsonError` when one of the records, which `text` holds, is nested too deep."""
    if text.count(b"{") + text.count(b"[") > MAX_NESTING and any(map(nests_too_deep, records)):
        raise NotJsonError("a record is nested too deep")


def _members(members: dict[str, Any], *, exact: bool) -> bytes | memoryview:
    """The members of an object indented by two spaces, without the braces around them."""
    if exact:
        text = json.dumps(members, indent=2, ensure_ascii=False)
        return text[_INSIDE].encode("utf-8", "surrogate_as_json")
    try:
        # A view leaves the braces out without a copy.
        return memoryview(orjson.dumps(members, option=orjson.OPT_INDENT_2))[_INSIDE]
    except orjson.JSONEncodeError:  # nested deeper than orjson writes, or a weight past 64 bits
        return _members(members, exact=True)


def _line(key: str, record: dict[str, Any], *, exact: bool) -> bytes:
    keyed = {IMAGE_PATH: key, **record}
    try:
        return to_json(keyed).encode() if exact else orjson.dumps(keyed)
    except orjson.JSONEncodeError:
        return to_json(keyed).encode()


def _holds_lost_integer(records: Iterable[Any]) -> bool:
    """True when a float in `records`, at any depth, could be an integer that orjson changed.

    It is also true where a record is nested about as deep as it may be, or deeper.
    """
    # This loop sees every value of every record, so it tests the commonest types first and calls no
    # function for them. Only a float can be such an integer: orjson makes floats of those that do
    # not fit into 64 bits.
    for record in records:
        if record.__class__ is not dict:
            if _is_lost_integer(record):
                return True
            continue
        for value in record.values():
            if value.__class__ is str:
                continue
            if value.__class__ is list:
                for item in value:
                    if item.__class__ is not int and _is_lost_integer(item):
                        return True
            elif value.__class__ is not int and _is_lost_integer(value):
                return True
    return False


def _is_lost_integer(value: Any) -> bool:
    # Level by level: a recursion would end at a depth that depends on the calls under way.
    level, depth = [value], 0
    while level and depth < MAX_NESTING - 2:
        below: list[Any] = []
        for item in level:
            if isinstance(item, float):
                if not -_INT64_OVERFLOW < item < _INT64_OVERFLOW:
                    return True
            elif isinstance(item, list):
                below += item
            elif isinstance(item, dict):
                below += item.values()
        level, depth = below, depth + 1
    return bool(level)


def _surrogate_as_json(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(
        f"\\u{ord(char):04x}" for char in error.object[error.start : error.end]
    ), error.end


codecs.register_error("surrogate_as_json", _surrogate_as_json)
