"""Decodes the records of a block and tells the byte offsets of each.

As in `blocks`, a cut is guessed from the bytes and proven by decoding: a record starts where the
one before it was proven to end, and if `{` + its bytes + `}` is one JSON object, its end is right
too. `pieces.iter_block` proves only where a piece of many records ends, and that is all that a
rewrite needs; here the end of every single record needs a proof, because its offsets are written to
an index.
"""

from collections.abc import Iterator
from typing import NamedTuple

from capmerge.files.source import BytesSource
from capmerge.metadata.blocks import PIECE_BYTES, Block, FileLayout, Kind, walk
from capmerge.metadata.codec import NotJsonError, Pair, decode, decode_members
from capmerge.metadata.format import FRAMINGS, WRITTEN
from capmerge.metadata.pieces import MiscutError


class Placed(NamedTuple):
    """A record and its bytes [start, end) in the source.

    These are its member of the top-level object, or its line of JSONL.
    """

    start: int
    end: int
    pair: Pair


def iter_placed(name: str, layout: FileLayout, block: Block, data: bytes) -> Iterator[Placed]:
    """The records of a block with their offsets.

    `data` are the bytes of the block, and `name` is the name of the source.

    Raises `MiscutError` where the bytes are not whole records; the records before it are valid.
    """
    if layout.kind == "jsonl":
        return _iter_lines(layout, block, data)
    return _iter_members(name, layout, block, data)


def _iter_lines(layout: FileLayout, block: Block, data: bytes) -> Iterator[Placed]:
    start = 0
    while start < len(data):
        end, following = layout.find_cut(data, start) or (len(data), len(data))
        line = data[start:end]
        if line.strip(b" \t\r"):
            yield Placed(
                block.start + start,
                block.start + end,
                _decoded(line, layout.kind, block.start + start)[0],
            )
        start = following


def _iter_members(name: str, layout: FileLayout, block: Block, data: bytes) -> Iterator[Placed]:
    # The last block also holds the closing brace of the top-level object.
    whole = data
    if block.last:
        whole = data.rstrip(b" \t\n\r")
        if whole[-1:] != b"}":
            raise MiscutError(block.start)
        whole = whole[:-1].rstrip(b" \t\n\r")
    # Guess the cuts of a batch and prove them all at once. If that fails, prove them one by one.
    start = 0
    while start < len(whole):
        spans, batch_end = _likely_spans(layout, whole, start)
        objects = decode_members([whole[first:end] for first, end in spans])
        if objects is not None:
            for (first, end), members in zip(spans, objects, strict=True):
                if len(members) == 1:
                    yield Placed(block.start + first, block.start + end, *members.items())
                else:
                    yield from _iter_walked(name, layout, block.start + first, whole[first:end])
            start = batch_end
        # Either a cut of this batch is inside a record, or only the standard library can read it.
        while start < batch_end:
            end, following, pairs = _proven(layout, whole, start, block.start)
            if len(pairs) == 1:
                yield Placed(block.start + start, block.start + end, pairs[0])
            else:
                yield from _iter_walked(name, layout, block.start + start, whole[start:end])
            start = following


def _likely_spans(
    layout: FileLayout, whole: bytes, start: int
) -> tuple[list[tuple[int, int]], int]:
    """The likely [start, end) of each record in the next `PIECE_BYTES`, and the following start."""
    spans, target = [], start + PIECE_BYTES
    while start < target:
        end, following = layout.find_cut(whole, start) or (len(whole), len(whole))
        spans.append((start, end))
        start = following
        if start == len(whole):
            break
    return spans, start


def _proven(
    layout: FileLayout, whole: bytes, start: int, block_start: int
) -> tuple[int, int, list[Pair]]:
    """The end of the record at `start`, the beginning of the next one, and the decoded record.

    There are several records where no cut was seen between them.
    """
    cut = layout.find_cut(whole, start)
    while True:
        end, following = cut or (len(whole), len(whole))
        try:
            return end, following, _decoded(whole[start:end], layout.kind, block_start + start)
        except MiscutError:
            if cut is None:
                raise
        cut = layout.find_cut(whole, end)  # what looked like the record's end was inside it


def _iter_walked(name: str, layout: FileLayout, offset: int, data: bytes) -> Iterator[Placed]:
    """The records in `data`, which is valid JSON, but in which no cut was seen.

    There may be several of them, or none.
    """
    for record in walk(BytesSource(name, data + b"}", offset), layout, offset):
        if record.key is not None:
            member = data[record.start - offset : record.value_end - offset]
            yield Placed(
                record.start, record.value_end, _decoded(member, layout.kind, record.start)[0]
            )


def _decoded(data: bytes, kind: Kind, offset: int) -> list[Pair]:
    try:
        return [*decode(data, kind, last=False).pairs]
    except NotJsonError as error:
        raise MiscutError(offset) from error


def spans_written(body: bytes | memoryview, kind: Kind, count: int) -> list[tuple[int, int]]:
    """The offsets [start, end) of each of the `count` records that `codec.encode` wrote to `body`.

    This is not a guess: the separator's line break is followed by the indent of a record, and
    inside a record every line break is followed by a deeper indent.
    """
    data, layout = bytes(body), WRITTEN[kind]
    start = len(FRAMINGS[kind].indent)
    spans: list[tuple[int, int]] = []
    while len(spans) < count - 1:
        cut = layout.find_cut(data, start)
        assert cut is not None  # it is what encode() puts between two records
        spans.append((start, cut[0]))
        start = cut[1]
    return [*spans, (start, len(data))] if count else []
