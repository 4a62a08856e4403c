"""Decodes a source piece by piece, and finds the byte offset of each record on demand.

This module proves the cuts that `cuts` guesses: a piece whose bytes `codec` decodes was cut
right.
"""

from collections.abc import Iterator
from typing import NamedTuple

from capmerge.errors import DataError
from capmerge.files.source import BytesSource, Source
from capmerge.metadata.blocks import Block, FileLayout, iter_pieces
from capmerge.metadata.codec import NotJsonError, Pair, Records, decode
from capmerge.metadata.cuts import counted_block, next_block, walked_block
from capmerge.metadata.walk import WalkedRecord, walk


class MiscutError(Exception):
    """The bytes of a block from `offset` on are not whole records.

    Either the end of the block was guessed wrong, or the source is broken.
    """

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


def recut(source: Source, layout: FileLayout, block: Block, miscut: MiscutError) -> Block:
    """The block that begins where the bytes of `block` are not whole records, cut more carefully.

    Its end is counted if that of `block` was guessed, and else found by a parser.

    Raises `DataError` where the source is not valid, and when a parser had cut `block` already: it
    would find the same cut again and again.
    """
    if block.cut == "walked":
        raise DataError(
            source.name,
            miscut.offset,
            None,
            "found bytes that cannot be decoded, where a JSON parser found whole records before.",
            "Run again when nothing writes to the file.",
        )
    counted = counted_block(source, layout, miscut.offset) if block.cut == "guessed" else None
    if counted and counted.end - counted.start <= layout.max_record_bytes:
        return counted
    return walked_block(source, layout, miscut.offset, block.careful)


class Piece(NamedTuple):
    """A decoded part of a source."""

    start: int
    """The offset of `data` in the source."""
    data: memoryview
    last: bool
    """True when `data` reaches the end of the source."""
    records: Records


def iter_block(
    data: bytes, layout: FileLayout, block: Block, piece_bytes: int | None = None
) -> Iterator[Piece]:
    """The decoded pieces of one block, each of about `piece_bytes`.

    Raises `MiscutError` where the bytes are not whole records; the pieces before it are valid.
    """
    for start, piece, last in iter_pieces(data, layout, block, piece_bytes):
        try:
            records = decode(piece, layout.kind, last=last)
        except NotJsonError as error:
            raise MiscutError(block.start + start) from error
        yield Piece(block.start + start, piece, last, records)


def iter_source(source: Source, layout: FileLayout, *, keep: bool = False) -> Iterator[Piece]:
    """The whole source, decoded piece by piece in one process.

    With `keep`, the bytes of a pipe are kept so that they can be read again.

    Raises `DataError` with the offset where the source is not valid.
    """
    block = next_block(source, layout, layout.first)
    while True:
        try:
            yield from iter_block(
                source.window(block.start, block.end - block.start), layout, block
            )
        except MiscutError as error:
            block = recut(source, layout, block, error)
            continue
        if block.last:
            return
        if not keep:
            source.release(block.next_start)
        block = next_block(source, layout, block.next_start, block.careful)


def iter_pairs(source: Source, layout: FileLayout) -> Iterator[tuple[Piece, int, Pair]]:
    """Every pair of the source, with its piece and its number in that piece.

    A repeated key is given as often as it occurs in the source.
    """
    for piece in iter_source(source, layout):
        for number, pair in enumerate(piece.records.pairs):
            yield piece, number, pair


def place_of(name: str, layout: FileLayout, piece: Piece, number: int) -> int:
    """The offset in the source of record `number` of a piece, found by a walk over the piece."""
    return _walk_piece(name, layout, piece)[number].start


def _walk_piece(name: str, layout: FileLayout, piece: Piece) -> list[WalkedRecord]:
    """The records of a piece as a parser finds them."""
    whole = bytes(piece.data) if piece.last or layout.kind == "jsonl" else bytes(piece.data) + b"}"
    walked = walk(BytesSource(name, whole, piece.start), layout, piece.start)
    if layout.kind == "json":
        return [record for record in walked if record.key is not None]
    return [
        record
        for record in walked
        if whole[record.start - piece.start : record.end - piece.start].strip()
    ]
