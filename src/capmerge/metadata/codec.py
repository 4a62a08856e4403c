"""Decodes the bytes of records into (key, record) pairs and encodes them again, without loss.

The records are those that `json.load` would read. orjson is the fast way. It refuses lone
surrogates, NaN and numbers past 1e308, and silently turns integers outside [-2^63, 2^64) into
floats; Python's own json wrote such files. Pieces that hold any of these go through the standard
library, both ways.
"""

import codecs
import json
import re
from collections.abc import Collection, Iterable, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import orjson

from capmerge.metadata.blocks import Kind
from capmerge.metadata.format import FRAMINGS
from capmerge.metadata.members import split_members
from capmerge.metadata.quotes import has_no_more_strings, strings_in
from capmerge.metadata.scan import IMAGE_PATH, MAX_NESTING, nests_too_deep

Pair = tuple[str, Any]

_EXPONENT = re.compile(rb"e(?<=[0-9]e)\+?[0-9]")
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
    exact: frozenset[int] = frozenset()
    """The numbers of the records that only the standard library writes as they are."""
    doubled: frozenset[int] = frozenset()
    """The numbers of the records in which a field occurs more than once.

    Its last value is the one that counts."""
    by_key: dict[str, Any] | None = None
    """The pairs as a dict, if the decoder made one."""

    def keys(self) -> list[str]:
        """The keys of the records."""
        if self.by_key is not None:
            return list(self.by_key)
        return [key for key, _ in self.pairs]

    def doubled_keys(self) -> list[str]:
        """The keys of the records in which a field occurs more than once."""
        if not self.doubled:
            return []
        return [key for number, (key, _) in enumerate(self.pairs) if number in self.doubled]

    def values(self) -> list[Any]:
        """The records without their keys."""
        if self.by_key is not None:
            return list(self.by_key.values())
        return [record for _, record in self.pairs]


def decode(data: bytes | memoryview, kind: Kind, *, last: bool) -> Records:
    """The records of one piece; `last` says that its bytes reach the end of the source.

    Records with equal keys are all there, in their order. A line of JSONL that is not an object
    with an `image_path` gives a pair of "" and a `Stray`.

    Raises `NotJsonError` when the bytes are not whole records.
    """
    if kind == "jsonl":
        return _decode_lines(bytes(data))
    # Whole members between braces are one object, and the last piece of a source already ends with
    # the closing brace. orjson reads nearly all of them. Where it refuses, or may have lost digits
    # of an integer, the standard library reads the same text again, and its result counts.
    text = b"".join((b"{", data, b"" if last else b"}"))
    exact = frozenset[int]()
    strings: int | None = None
    try:
        records = orjson.loads(text)
        strings = _count_unless_lossy(records.values())
    except orjson.JSONDecodeError:
        pass
    if strings is None:
        records = _loads(text)
        _check_nesting(text, records.values())
        strings = count_strings(list(records.values()))
        exact = _find_exact({key: record} for key, record in records.items())
    decoded = Records(records.items(), exact, by_key=records)
    if has_no_more_strings(text, strings + len(records)):
        return decoded
    return _with_lost_members(bytes(data), decoded)


def _with_lost_members(data: bytes, decoded: Records) -> Records:
    """All members in `data`, where a JSON library left some out because of equal keys.

    These may be whole records, or fields of a record, which are told in `doubled`.
    """
    try:
        members = split_members(data)
    except RecursionError as error:
        raise NotJsonError("a record is nested too deep") from error
    if len(members) != len(decoded.pairs):
        found = None if decoded.exact else decode_members(members)
        exact = frozenset[int]()
        if found:
            objects = found.objects
        else:
            objects = [_loads(b"{" + member + b"}") for member in members]
            exact = _find_exact(objects)
        pairs = [pair for member in objects for pair in member.items()]
        _check_nesting(data, [record for _, record in pairs])
        decoded = Records(pairs, exact)
    doubled = _doubled(members, decoded.values(), keys=1)
    return decoded._replace(doubled=doubled)


def _find_exact(values: Iterable[Any]) -> frozenset[int]:
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


def _doubled(texts: Iterable[bytes], values: Iterable[Any], *, keys: int = 0) -> frozenset[int]:
    """The numbers of those texts that have members which are not in the value decoded from them.

    Each text has this many `keys` in front of its value.
    """
    return frozenset(
        number
        for number, (text, value) in enumerate(zip(texts, values, strict=True))
        if not has_no_more_strings(text, keys + count_strings(value))
    )


class Members(NamedTuple):
    """Members of the top-level object, decoded to one object each."""

    objects: list[dict[str, Any]]
    strings: int
    """The number of strings in them at any depth, keys included."""


def decode_members(members: Sequence[bytes]) -> Members | None:
    """The members, each of them `"key": value`, decoded at once to one object each.

    Returns None when some are not whole, or when only the standard library reads them.
    """
    return decode_listed(b"".join((b"[{", b"},{".join(members), b"}]")), len(members))


def decode_listed(text: bytes, count: int) -> Members | None:
    """The objects in a list of `count` members, each of them between braces.

    If the first member is known to begin at a key of the top-level object, the result proves every
    boundary between two of them: the `},{` inserted there leaves the parser as deep as it was, so
    it separates two objects of the list only if it is at the depth of that object.

    Returns None when the members are not whole, or when only the standard library reads them; then
    `decode_listed_exactly`.
    """
    try:
        objects: list[dict[str, Any]] = orjson.loads(text)
    except orjson.JSONDecodeError:
        return None
    if len(objects) != count:
        return None
    strings = _count_unless_lossy([value for one in objects for value in one.values()])
    return None if strings is None else Members(objects, strings + sum(map(len, objects)))


def decode_listed_exactly(text: bytes, count: int) -> Members | None:
    """What `decode_listed` returns, read by the standard library.

    It reads what orjson refuses or changes, at a fifth of the speed. Returns None when the members
    are not whole, or are nested too deep.
    """
    try:
        objects: list[dict[str, Any]] = _loads(text)
        _check_nesting(text, [value for one in objects for value in one.values()])
    except NotJsonError:
        return None
    return Members(objects, count_strings(objects)) if len(objects) == count else None


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
            _line(key, record, exact=number in records.exact)
            for number, (key, record) in enumerate(records.pairs)
        )
    if records.by_key is not None and not records.exact:
        return _members(records.by_key)
    # Records of one kind are written together, and equal keys apart.
    parts: list[bytes | memoryview] = []
    numbered = enumerate(records.pairs)
    for is_exact, group in groupby(numbered, lambda pair: pair[0] in records.exact):
        pairs = [pair for _, pair in group]
        members = dict(pairs)
        together = [members] if len(members) == len(pairs) else [{k: v} for k, v in pairs]
        parts += (_exact_members(one) if is_exact else _members(one) for one in together)
    return separator.join(parts)


def to_json(value: Any) -> str:
    """The JSON text of `value` on one line, from which the standard library reads an equal value.

    It may hold NaN and integers of any size; lone surrogates are written as escapes.
    """
    return (
        json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogate_as_json").decode("utf-8")
    )


def _decode_lines(data: bytes) -> Records:
    lines = [line for line in data.split(b"\n") if line.strip(b" \t\r")]
    values: list[Any] = []
    refused: set[int] = set()
    for number, line in enumerate(lines):
        try:
            values.append(orjson.loads(line))
        except orjson.JSONDecodeError:
            values.append(_exact_line(line))
            refused.add(number)
    exact, strings = frozenset(refused), _count_unless_lossy(values)
    if strings is None:
        values = [_exact_line(line) for line in lines]
        exact, strings = _find_exact(values), count_strings(values)
    doubled = frozenset[int]() if has_no_more_strings(data, strings) else _doubled(lines, values)
    return Records([_keyed(value) for value in values], exact, doubled)


def _exact_line(line: bytes) -> Any:
    value = _loads(line)
    _check_nesting(line, [value])
    return value


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


def _members(members: dict[str, Any]) -> bytes | memoryview:
    """The members of an object indented by two spaces, without the braces around them."""
    try:
        # A view leaves the braces out without a copy.
        return memoryview(orjson.dumps(members, option=orjson.OPT_INDENT_2))[_INSIDE]
    except orjson.JSONEncodeError:  # nested deeper than orjson writes, or a weight past 64 bits
        return _exact_members(members)


def _exact_members(members: dict[str, Any]) -> bytes:
    text = json.dumps(members, indent=2, ensure_ascii=False)
    return text[_INSIDE].encode("utf-8", "surrogate_as_json")


def _line(key: str, record: dict[str, Any], *, exact: bool) -> bytes:
    keyed = {IMAGE_PATH: key, **record}
    try:
        return to_json(keyed).encode() if exact else orjson.dumps(keyed)
    except orjson.JSONEncodeError:
        return to_json(keyed).encode()


def _count_unless_lossy(values: Collection[Any]) -> int | None:
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
    """What `_count_unless_lossy` gives for values of any kind."""
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


def _surrogate_as_json(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(
        f"\\u{ord(char):04x}" for char in error.object[error.start : error.end]
    ), error.end


codecs.register_error("surrogate_as_json", _surrogate_as_json)
