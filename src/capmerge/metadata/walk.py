"""Walks the records of a source one by one with Python's own JSON scanner, in bounded memory.

It reads any layout, guesses nothing, and finds the exact place of an error. It is slow, so it goes
only where cutting by sight or by counting fails.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from capmerge.errors import DataError
from capmerge.files.source import Window
from capmerge.metadata.blocks import PIECE_BYTES, FileLayout
from capmerge.metadata.scan import InvalidError, UnfinishedError, scan_line, scan_member


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
