"""The records of a block, decoded, each with the place of its bytes.

As in `blocks`, a cut is guessed from the bytes and proven by decoding: a record starts where the
one before it was proven to end, and if `{` + its bytes + `}` is one JSON object, its end is right
too. `codec.iter_block` proves only where a piece of many records ends, and that is all that a
rewrite needs; here every record's own end needs a proof, because its place is written to an index.
"""

from collections.abc import Iterator
from typing import NamedTuple

from capmerge.files.source import BytesSource
from capmerge.metadata.blocks import PIECE_BYTES, Block, FileLayout, Kind, walk
from capmerge.metadata.codec import NotJsonError, Pair, decode, decode_members
from capmerge.metadata.format import FRAMINGS, WRITTEN
from capmerge.metadata.pieces import MiscutError


class Placed(NamedTuple):
    """A record and its bytes [start, end) in the source: its member of the top-level object, or its line."""

    start: int
    end: int
    pair: Pair


def iter_placed(name: str, layout: FileLayout, block: Block, data: bytes) -> Iterator[Placed]:
    """The records of a block with their places; `data` are the block's bytes, `name` is the source's.

    Raises `MiscutError` where the bytes are not whole records; what was given before it stands.
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
    whole = data
    if block.last:
        whole = data.rstrip(b" \t\n\r")
        if whole[-1:] != b"}":
            raise MiscutError(block.start)
        whole = whole[:-1].rstrip(b" \t\n\r")
    start = 0
    while start < len(whole):
        spans, batch_end = _seeming_spans(layout, whole, start)
        objects = decode_members([whole[first:end] for first, end in spans])
        if objects is not None:
            for (first, end), members in zip(spans, objects, strict=True):
                if len(members) == 1:
                    yield Placed(block.start + first, block.start + end, *members.items())
                else:
                    yield from _iter_walked(name, layout, block.start + first, whole[first:end])
            start = batch_end
        while (
            start < batch_end
        ):  # one of the cuts stands inside a record, or only the standard library reads them
            end, following, pairs = _proven(layout, whole, start, block.start)
            if len(pairs) == 1:
                yield Placed(block.start + start, block.start + end, pairs[0])
            else:
                yield from _iter_walked(name, layout, block.start + start, whole[start:end])
            start = following


def _seeming_spans(
    layout: FileLayout, whole: bytes, start: int
) -> tuple[list[tuple[int, int]], int]:
    """[start, end) of what look like the records of the next `PIECE_BYTES`, and where the record behind them begins."""
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
    """The end of the record at `start`, the beginning of the next one, and the record, or several where no cut was seen between them."""
    cut = layout.find_cut(whole, start)
    while True:
        end, following = cut or (len(whole), len(whole))
        try:
            return end, following, _decoded(whole[start:end], layout.kind, block_start + start)
        except MiscutError:
            if cut is None:
                raise
        cut = layout.find_cut(whole, end)  # what looked like the record's end stood inside it


def _iter_walked(name: str, layout: FileLayout, offset: int, data: bytes) -> Iterator[Placed]:
    """Several records between which no cut was seen, or none: valid JSON, as decoding has shown."""
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
    """[start, end) of each of the `count` records in what `codec.encode` made of them.

    This is no guess: the separator's line break is followed by the indent of a record, and inside a
    record every line break is followed by a deeper one.
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
