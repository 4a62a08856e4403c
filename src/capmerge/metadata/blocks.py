"""A metadata file as blocks of whole records: how its records follow each other, and its pieces.

`cuts` finds where the blocks end.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from capmerge.errors import DataError
from capmerge.files.source import Window
from capmerge.metadata.scan import (
    DECODE,
    IMAGE_PATH,
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

_NAME_OF_LINES = re.compile(r"\.jsonl(\.gz|\.zst)?$", re.IGNORECASE)
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
    JSON. A file without any bytes is JSONL without records if its name says so, or with
    `may_be_empty`.

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
    if not head and (may_be_empty or _NAME_OF_LINES.search(source.name)):
        return FileLayout("jsonl", start, b"\n", max_record_bytes)
    if not head:
        raise DataError(
            source.name,
            start,
            None,
            "the file is empty, expected a JSON object.",
            "A file without records is written as {}.",
        )
    if head[:4] == b"PAR1":
        raise DataError(
            source.name,
            0,
            None,
            "found Parquet in a pipe or a compressed file, but it is read from its end.",
            "Write it to a plain file first.",
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
    """The offset of the first byte at or after `place` that is not JSON white space.

    Raises `DataError` for more of it than a record may have bytes: a small compressed file can
    become so much, and a stream keeps it in memory.
    """
    start = place
    while window := source.window(place, 64 << 10):
        space = _SPACE_BYTES.match(window)
        assert space is not None  # the pattern matches the empty text
        place += space.end()
        if space.end() < len(window):
            break
        if place - start > MAX_RECORD_BYTES:
            raise DataError(
                source.name,
                place,
                None,
                f"found nothing but white space in {place - start:,} bytes, expected JSON.",
                "Write or download the file again.",
            )
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


def iter_pieces(
    data: bytes, layout: FileLayout, block: Block, piece_bytes: int | None = None
) -> Iterator[tuple[int, memoryview, bool]]:
    """The pieces of a block's bytes, each of about `piece_bytes`, or else `PIECE_BYTES`.

    Yields the offset of each piece in the block, its bytes, and whether it reaches the end of the
    source.
    """
    view = memoryview(data)
    start, size = 0, piece_bytes or PIECE_BYTES
    while True:
        cut = None if block.is_whole else layout.find_cut(data, start + size)
        if cut is None:
            yield start, view[start:], block.last
            return
        yield start, view[start : cut[0]], False
        start = cut[1]
