"""The blocks of a file, taken from the cutter and checked to cover it without gap or overlap.

`metadata.cuts` guesses where a block may end; a rewrite believes it as soon as the block can be
decoded. Here every border is checked against the bytes of the file by code of its own: between two
blocks there is one comma, or one line break of JSONL, and nothing but white space around it. With
that, and with `reading` proving that each block holds whole records, no record can be lost or read
twice at a border.
"""

from capmerge.errors import DataError
from capmerge.files.source import Source
from capmerge.metadata.blocks import Block, FileLayout, Kind
from capmerge.metadata.cuts import next_block
from capmerge.metadata.pieces import MiscutError, recut

_WHITE_SPACE = b" \t\n\r"
_BOM = b"\xef\xbb\xbf"
_WINDOW_BYTES = 64 << 10
_A_BUG = (
    "This is a bug of capmerge, and files that it wrote may lack records: please report it with "
    "the bytes around that place."
)


class Borders:
    """The blocks of one file, one after the other."""

    def __init__(self, source: Source, layout: FileLayout) -> None:
        self._source, self._layout = source, layout
        self._start: int | None = layout.first
        self._cut: Block | DataError | None = None
        self._careful = 0  # blocks that the cutter does not guess
        opening = self._without_space(0, layout.first).removeprefix(_BOM)
        if opening != (b"{" if layout.kind == "json" else b""):
            raise wrong_border(source.name, 0, opening)

    def go_to(self, start: int) -> None:
        """Go on at `start`, where a record begins."""
        self._start, self._cut = start, None

    def take(self) -> Block | DataError | None:
        """Return the next block; None after the last, and the error where the file is not valid.

        The error is not raised, because the blocks before it come first. Raises `DataError` where
        the cutter's blocks do not fit together.
        """
        if self._start is None:
            return None
        block = self._cut or self._next(self._start)
        self._cut = None
        if isinstance(block, DataError):
            self._start = None
        else:
            self._check(block, self._start)
            self._start = None if block.last else block.next_start
            self._careful = block.careful
        return block

    def recut(self, block: Block, offset: int) -> None:
        """Go on at `offset`, where the bytes of `block` are not whole records: a parser cuts."""
        self._start = offset
        try:
            self._cut = recut(self._source, self._layout, block, MiscutError(offset))
        except DataError as error:
            self._cut = error

    def _next(self, start: int) -> Block | DataError:
        try:
            return next_block(self._source, self._layout, start, self._careful)
        except DataError as error:
            return error

    def _check(self, block: Block, start: int) -> None:
        """Raise `DataError` unless `block` begins at `start` and ends where the next one begins."""
        if block.start != start or not start <= block.end <= block.next_start:
            raise wrong_border(self._source.name, start, self._source.window(start, 40))
        if block.last:
            beyond = self._source.window(block.end, 40)
            if beyond:
                raise wrong_border(self._source.name, block.end, beyond)
        else:
            between = (
                self._source.window(block.end, block.next_start - block.end)
                if self._layout.kind == "jsonl"
                else self._without_space(block.end, block.next_start)
            )
            check_between(self._source.name, self._layout.kind, block.end, between)

    def _without_space(self, start: int, end: int) -> bytes:
        """The first bytes of [start, end) that are not white space, more than can be right."""
        found = b""
        while start < end and len(found) <= 40:
            window = self._source.window(start, min(_WINDOW_BYTES, end - start))
            if not window:
                break
            found += window.translate(None, _WHITE_SPACE)
            start += len(window)
        return found


def check_between(name: str, kind: Kind, offset: int, between: bytes) -> None:
    """Raise `DataError` unless `between`, the bytes at `offset`, separates two records."""
    separates = (
        between == b"\n" if kind == "jsonl" else between.translate(None, _WHITE_SPACE) == b","
    )
    if not separates:
        raise wrong_border(name, offset, between)


def wrong_border(name: str, offset: int, found: bytes) -> DataError:
    """Return the error for `found`, the bytes at a border that is none."""
    shown = repr(found[:40].decode("utf-8", "backslashreplace"))
    problem = (
        f"found {shown} at a border of the blocks that the file was cut into, which do not cover "
        "it whole and only once."
    )
    return DataError(name, offset, None, problem, _A_BUG)
