r"""Cuts a metadata file in any layout into blocks of whole records, in bounded memory.

A block is cut where the bytes look like the end of one record and the start of the next. That is a
guess; decoding the block is its proof: a block starts at a record's key, and if `{` + block + `}`
is one JSON object, the parser was between two records at its end, so the next block starts at a
key too. A guess that fails is replaced by counting braces (`borders`), which nested objects do not
deceive, and if that fails, too, by walking the records with a real parser (`walk`), which also
finds the byte offset of an error. Cuts depend on the bytes alone, never on who reads them or how
fast.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from capmerge.errors import DataError
from capmerge.files.source import Window
from capmerge.metadata.borders import BorderCounter
from capmerge.metadata.scan import (
    DECODE,
    IMAGE_PATH,
    InvalidError,
    UnfinishedError,
    scan_line,
    scan_member,
)

Kind = Literal["json", "jsonl"]
Cut = Literal["guessed", "counted", "walked"]
"""How the end of a block was found; a parser that walked there cannot be wrong."""

BLOCK_BYTES = 1 << 20
"""The size of a block, which is handed to a worker at once.

So few messages are sent that the parent is mostly idle: they take 0.05 s of its time per GB."""
PIECE_BYTES = 1 << 16
"""The size of a piece, which is decoded at once.

The objects of a piece stay in the processor's cache, and its output in memory that the allocator
already holds: with 128 KiB, page faults took a fifth of the workers' time, and 4 MiB pieces ran at
half the speed."""
MAX_RECORD_BYTES = 64 << 20

CAREFUL_BLOCKS = 32
"""How many blocks are cut by counting after a wrong guess, before the next guess."""
_LOOK_AHEAD_BYTES = (16 << 10, 256 << 10, 4 << 20)
_SPACE = b" \t\n\r"
_SPACE_BYTES = re.compile(rb"[ \t\n\r]*")
_ANY_RECORD_END = re.compile(
    rb'\}([ \t\n\r]*+,[ \t\n\r]*+)"[^"\\]*+(?:\\.[^"\\]*+)*+"[ \t\n\r]*+:[ \t\n\r]*+\{'
)


@dataclass(frozen=True, slots=True)
class FileLayout:
    """The way in which records follow each other in one source."""

    kind: Kind
    first: int
    """The offset of the first record's key, or of the `}` of an empty object.

    For JSONL it is the offset of the first line."""
    separator: bytes
    """The bytes between two records of an indented file; b"" when they are not known.

    They reach from the `}` of one record to the quote of the next key."""
    max_record_bytes: int = MAX_RECORD_BYTES

    def find_cut(self, window: bytes, start: int) -> tuple[int, int] | None:
        """The likely end of the first record that ends at or after `start`, and the next start.

        Returns None when nothing in the window looks like the end of a record.
        """
        if self.kind == "jsonl":
            end = window.find(b"\n", start)
            return (end, end + 1) if end >= 0 else None
        if self.separator:
            # A JSON string cannot contain a raw line break, so only a nested object can be mistaken
            # for the end of a record here.
            end = window.find(self.separator, start)
            return (end + 1, end + len(self.separator) - 1) if end >= 0 else None
        match = _ANY_RECORD_END.search(window, start)
        return (match.start() + 1, match.end(1)) if match else None


@dataclass(frozen=True, slots=True)
class Block:
    """The bytes [start, end) of whole records; the next block starts at `next_start`."""

    start: int
    end: int
    next_start: int
    last: bool
    """True for a block that reaches the end of the source, including the object's closing brace."""
    cut: Cut = "guessed"
    careful: int = 0
    """How many of the blocks behind this one are to be cut by counting, too."""

    @property
    def is_whole(self) -> bool:
        """True for a block in which nothing may be guessed, so that it is decoded at once."""
        return self.cut != "guessed"


def read_layout(
    source: Window, max_record_bytes: int = MAX_RECORD_BYTES, *, may_be_empty: bool = False
) -> FileLayout:
    """The layout of an opened source, as its first bytes show it.

    A source is JSONL if its first line is a whole object with an `image_path`; otherwise it is
    JSON. With `may_be_empty`, a file without any bytes is JSONL without records.

    Raises `DataError` for an empty file, UTF-16, and a top level that is not an object.
    """
    # Refuse other encodings, and skip a byte order mark and white space.
    head = source.window(0, 64 << 10)
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(head) > 3 and b"\0" in head[:4]):
        raise DataError(
            source.name,
            0,
            None,
            "found UTF-16 or UTF-32, expected UTF-8.",
            "Convert it: iconv -f UTF-16 -t UTF-8 FILE > NEW.",
        )
    start = 3 if head[:3] == b"\xef\xbb\xbf" else 0
    start = _after_space(source, start)

    # Refuse what does not begin with an object.
    head = source.window(start, 16)
    if not head and may_be_empty:
        return FileLayout("jsonl", start, b"\n", max_record_bytes)
    if not head:
        raise DataError(
            source.name,
            start,
            None,
            "the file is empty, expected a JSON object.",
            "A file without records is written as {}.",
        )
    if head[:1] != b"{":
        names = {b"[": "an array", b'"': "a string"}
        found = names.get(head[:1], f"{head[:12].decode('utf-8', 'backslashreplace')!r}")
        raise DataError(
            source.name,
            start,
            None,
            f"the top level is {found}, expected an object that maps image keys to records.",
            "Give the path of such a file, or of a JSONL file.",
        )

    # Tell JSONL from JSON. White space with a line break before the first key of JSON is expected
    # between any two records, too.
    if _first_line_is_record(source, start, max_record_bytes):
        return FileLayout("jsonl", start, b"\n", max_record_bytes)
    first = _after_space(source, start + 1)
    between = source.window(start + 1, min(first - start - 1, 1 << 10))
    return FileLayout(
        "json", first, b"}," + between + b'"' if b"\n" in between else b"", max_record_bytes
    )


def _after_space(source: Window, place: int) -> int:
    """The offset of the first byte at or after `place` that is not JSON white space."""
    while window := source.window(place, 64 << 10):
        space = _SPACE_BYTES.match(window)
        assert space is not None  # the pattern matches the empty text
        place += space.end()
        if space.end() < len(window):
            break
    return place


def _first_line_is_record(source: Window, start: int, max_record_bytes: int) -> bool:
    """True when the line at `start` is one object whose `image_path` is a string."""
    size = 64 << 10
    while True:
        window = source.window(start, size)
        end = window.find(b"\n")
        if end >= 0 or len(window) < size:
            line = window[:end] if end >= 0 else window
            break
        # A line this long is JSONL only if its first fields say so: a record of a one-line JSON
        # file is an object.
        named = f'"{IMAGE_PATH}"'.encode() in window
        if size >= 1 << 20 and not named and _ANY_RECORD_END.search(window):
            return False
        if size > max_record_bytes:
            return False
        size *= 4
    text = line.decode("utf-8", "replace")
    try:
        record, end = DECODE(text)
    except (ValueError, RecursionError):
        return False
    return (
        isinstance(record, dict)
        and isinstance(record.get(IMAGE_PATH), str)
        and not text[end:].strip()
    )


def next_block(source: Window, layout: FileLayout, start: int, careful: int = 0) -> Block:
    """The block that starts at `start`, which is the offset of a record's key.

    It is about `BLOCK_BYTES` long, and its end is guessed from a few KiB, or counted if the block
    before it has a number of `careful` blocks.

    Raises `DataError` where only a parser can go on and the source is not valid.
    """
    block = None if careful else _guessed_block(source, layout, start)
    block = block or counted_block(source, layout, start, careful - 1)
    # A record that is too long can only be in a block that is longer than the longest record
    # allowed. The records of such a block are measured one by one.
    if block is None or block.end - start > layout.max_record_bytes:
        return walked_block(source, layout, start, max(0, careful - 1))
    return block


def _guessed_block(source: Window, layout: FileLayout, start: int) -> Block | None:
    target = start + BLOCK_BYTES
    for size in _LOOK_AHEAD_BYTES:
        window = source.window(target, size)
        cut = layout.find_cut(window, 0)
        if cut:
            return Block(start, target + cut[0], target + cut[1], last=False)
        if len(window) < size:
            end = target + len(window) if window else start + len(source.window(start, BLOCK_BYTES))
            return Block(start, end, end, last=True)
    return None


def counted_block(
    source: Window, layout: FileLayout, start: int, careful: int = CAREFUL_BLOCKS
) -> Block | None:
    """The block that starts at `start`, whose end is found by counting braces.

    Returns None where that is of no use: for JSONL, whose lines end at line breaks, for a block
    longer than the longest record allowed, and where something else than white space stands between
    two records.
    """
    if layout.kind == "jsonl":
        return None
    borders, careful = BorderCounter(start), max(0, careful)
    size = BLOCK_BYTES
    while borders.place - start <= layout.max_record_bytes + BLOCK_BYTES:
        window = source.window(borders.place, size)
        # The last record of the block ends soon, or is a long one.
        size = PIECE_BYTES if size == BLOCK_BYTES else min(2 * size, BLOCK_BYTES // 2)
        if not window:
            return Block(start, borders.place, borders.place, last=True, cut="counted")
        for comma, next_start in borders.feed(window, start + BLOCK_BYTES):
            if source.window(comma + 1, next_start - comma - 1).strip(_SPACE):
                return None
            return Block(start, comma, next_start, last=False, cut="counted", careful=careful)
    return None


def walked_block(source: Window, layout: FileLayout, start: int, careful: int = 0) -> Block:
    """The block that starts at `start`, whose end is found by a parser.

    Raises `DataError` with the offset of the first byte that is not valid.
    """
    for record in walk(source, layout, start):
        if record.last or record.end - start >= BLOCK_BYTES:
            return Block(start, record.end, record.next_start, record.last, "walked", careful)
    raise AssertionError("walk() ends with a last record")


def iter_pieces(
    data: bytes, layout: FileLayout, block: Block, *, whole: bool = False
) -> Iterator[tuple[int, memoryview, bool]]:
    """The pieces of a block's bytes, each of about `PIECE_BYTES`.

    Yields the offset of each piece in the block, its bytes, and whether it reaches the end of the
    source. With `whole`, the block is one piece.
    """
    view = memoryview(data)
    start = 0
    while True:
        cut = None if block.is_whole or whole else layout.find_cut(data, start + PIECE_BYTES)
        if cut is None:
            yield start, view[start:], block.last
            return
        yield start, view[start : cut[0]], False
        start = cut[1]


@dataclass(frozen=True, slots=True)
class WalkedRecord:
    """One record as a parser found it; its offsets count the bytes of the source."""

    key: str | None
    """None for the end of an empty object, and for a JSONL line that is blank or not a record."""
    start: int
    value_end: int
    end: int
    """`value_end`, or the end of the source when the record is the last."""
    next_start: int
    last: bool


def walk(source: Window, layout: FileLayout, start: int) -> Iterator[WalkedRecord]:
    """The records from `start` on, one by one, as Python's own json scanner reads them.

    It reads any layout, and nothing is lost.

    Raises `DataError` at the first byte that is not valid, and for a record longer than
    `layout.max_record_bytes`.
    """
    # Records are scanned in a window of the source. When the window ends inside a record, the next
    # window starts at that record, and doubles until the record fits into it.
    as_json = layout.kind == "json"
    size = PIECE_BYTES
    while True:
        window = source.window(start, size)
        at_end = len(window) < size
        text, broken_utf8 = _decode_utf8(window, at_end=at_end)
        # The next record starts at `place` in characters of the text, at `offset` in bytes of the
        # source.
        place, offset, key = 0, start, None
        try:
            while True:
                whole = at_end and not broken_utf8
                if as_json:
                    key, end, next_place, last = scan_member(
                        text, place, at_end=whole, first=offset == layout.first
                    )
                else:
                    key, end, next_place, last = scan_line(text, place, at_end=whole)
                end_offset = offset + len(text[place:end].encode())
                if end_offset - offset > layout.max_record_bytes:
                    raise _too_long(source, layout, offset, key)
                next_offset = end_offset + len(text[end:next_place].encode())
                yield WalkedRecord(
                    key, offset, end_offset, next_offset if last else end_offset, next_offset, last
                )
                if last:
                    return
                place, offset = next_place, next_offset
        except InvalidError as error:
            where = offset + len(text[place : error.place].encode())
            raise DataError(source.name, where, error.key, error.problem, error.next_step) from None
        except UnfinishedError as error:
            if broken_utf8:
                where = offset + len(text[place:].encode())
                raise DataError(
                    source.name,
                    where,
                    error.key,
                    f"found {broken_utf8}, expected UTF-8.",
                    "Save the file as UTF-8.",
                ) from None
            if len(window) > layout.max_record_bytes and offset == start:
                raise _too_long(source, layout, offset, error.key) from None
        size = size * 2 if offset == start else PIECE_BYTES
        start = offset


def _too_long(source: Window, layout: FileLayout, offset: int, key: str | None) -> DataError:
    problem = f"the record is longer than {layout.max_record_bytes:,} bytes."
    next_step = "If that length is intended, raise --max-record."
    return DataError(source.name, offset, key, problem, next_step)


def _decode_utf8(window: bytes, *, at_end: bool) -> tuple[str, str]:
    """The text of a window up to the first byte that is not UTF-8, and a name for that byte.

    The name is "" when all of the window is UTF-8.
    """
    try:
        return window.decode("utf-8"), ""
    except UnicodeDecodeError as error:
        cut_by_window = (
            not at_end and len(window) - error.start < 4 and "unexpected end" in error.reason
        )
        broken = "" if cut_by_window else f"the byte 0x{window[error.start]:02x}"
        return window[: error.start].decode("utf-8"), broken
