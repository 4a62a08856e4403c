"""Reads the records of a block for `verify`, by none of the code that cut or wrote them.

A block is proven to hold whole records by the parser itself: it begins at a key, and `{` + block +
`}` is one JSON object. Pieces that the parser cannot represent, or that end within a record, are
walked through by the standard library, which finds every border.
"""

import json
import re
from collections.abc import Collection, Generator, Iterator
from json import JSONDecoder
from typing import Any, Literal, NamedTuple

from capmerge.metadata.blocks import Block, FileLayout, Kind
from capmerge.metadata.scan import MAX_NESTING
from capmerge.proof.borders import check_between
from capmerge.proof.parsers import (
    Pair,
    Values,
    count_strings,
    pair_of,
    text_of,
    values_by_ijson,
    values_by_orjson,
)
from capmerge.proof.signs import exact_signs_of

Parser = Literal["ijson", "orjson"]

_PIECE_BYTES, _SMALL_BYTES = 1 << 16, 1 << 12
_DECODE = JSONDecoder().raw_decode
_SPACE = re.compile(r"[ \t\n\r]*")


class Reading(NamedTuple):
    """What a piece of a block holds."""

    pairs: list[Pair]
    """The records in their order. A line of JSONL without a key gives "" and a `Stray`."""
    doubled: Collection[int] = ()
    """The numbers of the records in which a field occurs more than once."""
    by_json: int = 0
    """How many records the standard library had to read in place of the other parser."""
    broken_at: int | None = None
    """The offset in the block of the first record that is not whole; None if all are."""


class Member(NamedTuple):
    """A record as the standard library reads it, with its bytes [start, end) in the data.

    In JSON these are the bytes of `"key": value`, in JSONL those of a line.
    """

    start: int
    end: int
    value: Any
    """The pair of key and value, or the value of the line."""


class BlockReader:
    """Reads blocks of one file, in pieces that fit into the processor's cache.

    `name` is that of the file, and with `whole` a block is one piece.
    """

    def __init__(self, name: str, layout: FileLayout, parser: Parser, *, whole: bool) -> None:
        self._name, self._layout, self._whole = name, layout, whole
        self._kind: Kind = layout.kind
        self._values_of = values_by_ijson if parser == "ijson" else values_by_orjson

    def read(self, data: bytes, block: Block) -> Iterator[Reading]:
        """Yield the records of a block piece by piece, up to one that is not whole.

        Raises `DataError` where the cutter's cuts do not fit together.
        """
        start, small_until, is_empty = 0, 0, True
        while start < len(data):
            # Only a parser knows where a record of a walked block ends.
            size = len(data) if self._whole or block.is_whole else _PIECE_BYTES
            if start < small_until:
                size = _SMALL_BYTES
            cut = None if size == len(data) else self._layout.find_cut(data, start + size)
            end, following = cut or (len(data), len(data))
            if following > end:
                check_between(self._name, self._kind, block.start + end, data[end:following])
            last = block.last and end == len(data)

            values = self._at_once(data[start:end], last=last)
            if values is not None:
                yield Reading(values)
                is_empty = is_empty and not values
            elif size > _SMALL_BYTES and not block.is_whole:
                # Smaller pieces show where the records are that have to be read one by one.
                small_until = end
                continue
            else:
                is_empty = False
                broken_at = yield from self._walked(data, start, end, last=last)
                if broken_at is not None and end < len(data):
                    # The guess of the end was wrong. To try the next guesses would take the square
                    # of their number, so the rest of the block is not cut.
                    following = len(data)
                    values = self._at_once(data[broken_at:], last=block.last)
                    if values is not None:
                        yield Reading(values)
                        broken_at = None
                    else:
                        broken_at = yield from self._walked(
                            data, broken_at, end=following, last=block.last
                        )
                if broken_at is not None:
                    yield Reading([], broken_at=broken_at)
                    return
            start = following
        # Only an empty file has no key. Here a comma would stand before the closing brace.
        if is_empty and self._kind == "json" and block.start != self._layout.first:
            yield Reading([], broken_at=0)

    def _at_once(self, piece: bytes, *, last: bool) -> Values | None:
        """Return the pairs of a piece; None if some may have to be read by the standard library."""
        values = self._values_of(text_of(piece, self._kind, last=last), self._kind)
        if values is None or self._kind == "json":
            return values
        return [pair_of(value) for value in values]

    def _walked(
        self, data: bytes, start: int, end: int, *, last: bool
    ) -> Generator[Reading, None, int | None]:
        """Yield the records in the bytes [start, end) of a block, whose borders a parser finds.

        Returns the offset of a record that is not whole.
        """
        members, broken_at = walk(data[start:end], self._kind, last=last)
        for first, until in _groups(members):
            group = members[first:until]
            piece = data[start + group[0].start : start + group[-1].end]
            values = self._at_once(piece, last=False)
            if values is not None:
                yield Reading(values)
                continue
            for member in group:
                record = data[start + member.start : start + member.end]
                values = self._at_once(record, last=False)
                if values is not None:
                    yield Reading(values)
                    continue
                is_doubled = has_doubled_field(data[start:end], member, self._kind)
                pair = member.value if self._kind == "json" else pair_of(member.value)
                yield Reading([pair], (0,) if is_doubled else (), 1)
        return None if broken_at is None else start + broken_at


def _groups(members: list[Member]) -> Iterator[tuple[int, int]]:
    """Yield the numbers [first, until) of members that fit into a piece together."""
    first = 0
    for number, member in enumerate(members):
        if number > first and member.end - members[first].start > _SMALL_BYTES:
            yield first, number
            first = number
    if members:
        yield first, len(members)


def walk(data: bytes, kind: Kind, *, last: bool) -> tuple[list[Member], int | None]:
    """Return the records in `data` as Python's json reads them, and where one is not whole.

    `data` begins at a record; `last` says that it reaches to the end of the file. A record is not
    whole where the data end within it, where it is not valid JSON, and where it is nested deeper
    than every command allows. The offset is None if there is no such record.
    """
    return _walk_members(data, last=last) if kind == "json" else _walk_lines(data)


def has_doubled_field(data: bytes, member: Member, kind: Kind) -> bool:
    """Return whether the record of a `member` of `data` has a field more than once."""
    strings, _, _ = count_strings([member.value], kind)
    return exact_signs_of(data[member.start : member.end]).quotes != 2 * strings


def _walk_members(data: bytes, *, last: bool) -> tuple[list[Member], int | None]:
    try:
        text, is_whole = data.decode("utf-8"), True
    except UnicodeDecodeError as error:
        text, is_whole = data[: error.start].decode("utf-8"), False
    members: list[Member] = []
    if last and text[:1] == "}" and _is_blank_from(text, 1):
        return members, None
    place = offset = 0  # `place` counts characters, `offset` bytes
    while True:
        # The key, the colon and the value.
        try:
            if text[place : place + 1] != '"':
                return members, offset
            key, key_end = _DECODE(text, place)
            colon = _skip(text, key_end)
            if text[colon : colon + 1] != ":":
                return members, offset
            value, end = _DECODE(text, _skip(text, colon + 1))
        except (ValueError, RecursionError):
            return members, offset
        if _nests_too_deep(text[place:end], value):
            return members, offset

        # A comma leads to the next member.
        length = len(text[place:end].encode())
        after = _skip(text, end)
        found = text[after : after + 1]
        is_end = _is_blank_from(text, after + 1) if last and found == "}" else not (last or found)
        if is_end and is_whole:
            return [*members, Member(offset, offset + length, (key, value))], None
        if found != ",":
            return members, offset
        members.append(Member(offset, offset + length, (key, value)))
        following = _skip(text, after + 1)
        offset += length + len(text[end:following].encode())
        place = following


def _walk_lines(data: bytes) -> tuple[list[Member], int | None]:
    members: list[Member] = []
    offset = 0
    for line in data.split(b"\n"):
        if line.strip(b" \t\r"):
            try:
                text = line.decode("utf-8")
                value = json.loads(text)
            except (ValueError, RecursionError):
                return members, offset
            if _nests_too_deep(text, value):
                return members, offset
            members.append(Member(offset, offset + len(line), value))
        offset += len(line) + 1
    return members, None


def _skip(text: str, place: int) -> int:
    """Return the offset of the first character from `place` on that is not JSON white space."""
    space = _SPACE.match(text, place)
    return space.end() if space else place


def _is_blank_from(text: str, place: int) -> bool:
    return _skip(text, place) == len(text)


def _nests_too_deep(text: str, value: Any) -> bool:
    if text.count("{") + text.count("[") <= MAX_NESTING:
        return False
    _, depth, _ = count_strings([value], "jsonl")
    return depth > MAX_NESTING
