"""Finds where a block ends: guessed by sight, counted, or walked by a parser.

A block is cut where the bytes look like the end of one record and the start of the next. That is a
guess; decoding the block is its proof: a block starts at a record's key, and if `{` + block + `}`
is one JSON object, the parser was between two records at its end, so the next block starts at a
key too. A guess that fails is replaced by counting braces (`borders`), which nested objects do not
deceive, and if that fails, too, by walking the records with a real parser (`walk`), which also
finds the byte offset of an error. Cuts depend on the bytes alone, never on who reads them or how
fast.
"""

from capmerge.files.source import Window
from capmerge.metadata.blocks import BLOCK_BYTES, PIECE_BYTES, Block, FileLayout
from capmerge.metadata.borders import BorderCounter
from capmerge.metadata.walk import walk

CAREFUL_BLOCKS = 32
"""How many blocks are cut by counting after a wrong guess, before the next guess."""
_LOOK_AHEAD_BYTES = (16 << 10, 256 << 10, 4 << 20)
_SPACE = b" \t\n\r"


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
