"""Encodes records as the bytes of the output, without loss.

orjson is the fast way. Records that it refuses, or that it would write otherwise, are written by
the standard library.
"""

import codecs
import json
from itertools import groupby
from typing import Any

import orjson

from capmerge.metadata.blocks import Kind
from capmerge.metadata.codec import Records
from capmerge.metadata.format import FRAMINGS
from capmerge.metadata.scan import IMAGE_PATH

_INSIDE = slice(len(FRAMINGS["json"].opening), -len(FRAMINGS["json"].closing))


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


def _surrogate_as_json(error: UnicodeError) -> tuple[str, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    return "".join(
        f"\\u{ord(char):04x}" for char in error.object[error.start : error.end]
    ), error.end


codecs.register_error("surrogate_as_json", _surrogate_as_json)
