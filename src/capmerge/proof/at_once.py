"""The records of a block compared at once with their bytes in the output.

The records that a rewrite should give are written as it writes them, by code of `verify`'s own. If
the output has just these bytes, and they read as these records, no record has to be compared by
itself. Where anything differs, `digests` looks record by record.
"""

import json
import re
from typing import Any

import orjson

from capmerge.metadata.blocks import Kind
from capmerge.metadata.scan import IMAGE_PATH
from capmerge.proof.parsers import Pair

_SPACE = b" \t\n\r"
_SURROGATE = re.compile("[\ud800-\udfff]")
_SEPARATORS: dict[Kind, bytes] = {"json": b",\n  ", "jsonl": b"\n"}
"""The bytes between two records, up to the quote of a key or the brace of a line."""


class WrittenBytes:
    """The bytes of the output that hold the records of one block, from the first on.

    `last` says that they reach the end of the file; else they end where the next record begins.
    """

    def __init__(self, data: bytes, kind: Kind, *, last: bool) -> None:
        self._data, self._kind, self._last = data, kind, last
        self._place = 0

    def continue_with(self, pairs: list[Pair], *, by_json: bool) -> bool:
        """Return whether the next records are these, and go behind them.

        `by_json` says that only the standard library may write them as they are. False means no
        more than that the bytes are not those that were expected.
        """
        if not pairs:
            return True
        if by_json:
            text, is_read = _by_json(pairs, self._kind)
        else:
            try:
                text, is_read = _by_orjson(pairs, self._kind)
            except orjson.JSONEncodeError:
                text, is_read = _by_json(pairs, self._kind)
        start = self._place
        if start:
            start += len(_SEPARATORS[self._kind])
            if self._data[self._place : start] != _SEPARATORS[self._kind]:
                return False
        self._place = start + len(text)
        return is_read and self._data[start : self._place] == text

    def is_at_end(self) -> bool:
        """Return whether nothing follows but what ends the file, or comes before a record."""
        rest = self._data[self._place :]
        if self._kind == "jsonl":
            return rest.strip(_SPACE) == b"" if self._last else rest == b"\n"
        return rest.strip(_SPACE) == (b"}" if self._last else b",")


def _by_orjson(pairs: list[Pair], kind: Kind) -> tuple[bytes, bool]:
    """Return the bytes of records, and whether orjson reads them back as they are."""
    if kind == "jsonl":
        lines = [{IMAGE_PATH: key, **record} for key, record in pairs]
        texts = list(map(orjson.dumps, lines))
        return b"\n".join(texts), list(map(orjson.loads, texts)) == lines
    members = dict(pairs)
    together = [members] if len(members) == len(pairs) else [dict([pair]) for pair in pairs]
    texts = [orjson.dumps(one, option=orjson.OPT_INDENT_2) for one in together]
    is_read = list(map(orjson.loads, texts)) == together
    return b",\n  ".join([text[4:-2] for text in texts]), is_read


def _by_json(pairs: list[Pair], kind: Kind) -> tuple[bytes, bool]:
    """Do the same by the standard library."""
    if kind == "jsonl":
        values: list[Any] = [{IMAGE_PATH: key, **record} for key, record in pairs]
        texts = [json.dumps(value, ensure_ascii=False) for value in values]
    else:
        values = [dict([pair]) for pair in pairs]
        texts = [json.dumps(value, ensure_ascii=False, indent=2) for value in values]
    encoded = [_SURROGATE.sub(_escaped, text).encode() for text in texts]
    # NaN is not equal to itself, but looks like it.
    is_read = repr(list(map(json.loads, encoded))) == repr(values)
    if kind == "json":
        encoded = [text[4:-2] for text in encoded]
    return _SEPARATORS[kind].join(encoded), is_read


def _escaped(surrogate: re.Match[str]) -> str:
    return f"\\u{ord(surrogate[0]):04x}"
