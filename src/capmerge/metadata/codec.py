"""Decodes the bytes of records into (key, record) pairs, without loss; `encoding` writes them.

The records are those that `json.load` would read. orjson is the fast way. What it refuses or
changes, which `exactness` finds, the standard library reads.
"""

import json
from collections.abc import Collection, Iterable, Sequence
from typing import Any, NamedTuple

import orjson

from capmerge.metadata.blocks import Kind
from capmerge.metadata.exactness import count_strings, count_unless_lossy, find_exact
from capmerge.metadata.members import split_members
from capmerge.metadata.quotes import has_no_more_strings
from capmerge.metadata.scan import IMAGE_PATH, MAX_NESTING, nests_too_deep

Pair = tuple[str, Any]


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
        strings = count_unless_lossy(records.values())
    except orjson.JSONDecodeError:
        pass
    if strings is None:
        records = _loads(text)
        _check_nesting(text, records.values())
        strings = count_strings(list(records.values()))
        exact = find_exact({key: record} for key, record in records.items())
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
            exact = find_exact(objects)
        pairs = [pair for member in objects for pair in member.items()]
        _check_nesting(data, [record for _, record in pairs])
        decoded = Records(pairs, exact)
    doubled = _doubled(members, decoded.values(), keys=1)
    return decoded._replace(doubled=doubled)


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
    strings = count_unless_lossy([value for one in objects for value in one.values()])
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
    exact, strings = frozenset(refused), count_unless_lossy(values)
    if strings is None:
        values = [_exact_line(line) for line in lines]
        exact, strings = find_exact(values), count_strings(values)
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
