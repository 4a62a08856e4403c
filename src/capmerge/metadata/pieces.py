"""A source decoded piece by piece."""

from collections.abc import Iterator
from typing import NamedTuple

from capmerge.files.source import BytesSource, Source
from capmerge.metadata.blocks import (
    Block,
    FileLayout,
    WalkedRecord,
    iter_pieces,
    next_block,
    walk,
    walked_block,
)
from capmerge.metadata.codec import NotJsonError, Pair, Records, decode, encode
from capmerge.metadata.format import FRAMINGS


class MiscutError(Exception):
    """A block's bytes from `offset` on are not whole records: its end was guessed wrong, or the source is broken."""

    def __init__(self, offset: int) -> None:
        super().__init__(offset)
        self.offset = offset


class Piece(NamedTuple):
    """A part of a source, decoded."""

    start: int
    """Offset of `data` in the source."""
    data: memoryview
    last: bool
    """Whether `data` reaches the end of the source."""
    records: Records


def iter_block(
    data: bytes, layout: FileLayout, block: Block, *, whole: bool = False
) -> Iterator[Piece]:
    """The decoded pieces of one block, or the `whole` as one.

    Raises `MiscutError` where the bytes are not whole records; the pieces before it stand.
    """
    for start, piece, last in iter_pieces(data, layout, block, whole=whole):
        try:
            records = decode(piece, layout.kind, last=last)
        except NotJsonError as error:
            raise MiscutError(block.start + start) from error
        yield Piece(block.start + start, piece, last, records)


def iter_source(source: Source, layout: FileLayout, *, keep: bool = False) -> Iterator[Piece]:
    """The whole source, decoded piece by piece in one process; `keep` leaves a pipe's bytes to be read again.

    Raises `DataError` with the place where the source is not valid.
    """
    block = next_block(source, layout, layout.first)
    while True:
        try:
            yield from iter_block(
                source.window(block.start, block.end - block.start), layout, block
            )
        except MiscutError as error:
            block = walked_block(source, layout, error.offset)
            continue
        if block.last:
            return
        if not keep:
            source.release(block.next_start)
        block = next_block(source, layout, block.next_start)


def iter_pairs(source: Source, layout: FileLayout) -> Iterator[tuple[Piece, int, Pair]]:
    """Every pair of the source, a repeated key each time it stands there; with its piece, and its number in it."""
    # A parsed object keeps only the last of two equal keys. A piece that is encoded back to its own
    # bytes held no such pair; any other (of another layout, too) is walked, member by member, and
    # each member decoded as an object of its own.
    indent = len(FRAMINGS["json"].indent)  # a piece begins behind it, at a key's quote
    for found in iter_source(source, layout):
        piece = found
        if layout.kind == "json" and not bytes(piece.data).startswith(
            bytes(encode(piece.records, "json"))[indent:]
        ):
            pairs: list[Pair] = []
            for walked in _walk_piece(source.name, layout, piece):
                pairs += decode(
                    piece.data[walked.start - piece.start : walked.value_end - piece.start],
                    "json",
                    last=False,
                ).pairs
            piece = piece._replace(records=Records(pairs, piece.records.exact))
        for number, pair in enumerate(piece.records.pairs):
            yield piece, number, pair


def place_of(name: str, layout: FileLayout, piece: Piece, number: int) -> int:
    """The offset in the source of a piece's record `number`, which only a walk can tell."""
    walked = _walk_piece(name, layout, piece)
    key = list(piece.records.pairs)[number][0]
    if layout.kind == "jsonl" or len(walked) == len(piece.records.pairs):
        return walked[number].start
    return next(
        record.start for record in reversed(walked) if record.key == key
    )  # of equal keys, the last one counts


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
