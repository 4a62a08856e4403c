"""Decodes the records of a block and tells the byte offsets of each.

As in `blocks`, a cut is guessed from the bytes and proven by decoding: a record starts where the
one before it was proven to end, and if `{` + its bytes + `}` is one JSON object, its end is right
too. `pieces.iter_block` proves only where a piece of many records ends, and that is all that a
rewrite needs; here the end of every single record needs a proof, because its offsets are written to
an index.
"""

from collections.abc import Generator, Iterator
from typing import NamedTuple

from capmerge.errors import DataError
from capmerge.files.source import BytesSource
from capmerge.metadata.blocks import PIECE_BYTES, Block, FileLayout, Kind, walk
from capmerge.metadata.codec import NotJsonError, Pair, count_strings, decode, decode_members
from capmerge.metadata.format import FRAMINGS, WRITTEN
from capmerge.metadata.members import has_no_more_strings
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
    # Guess the cuts of a batch and prove them all at once. Where that fails, or where a record has
    # no cut that can be seen, a parser walks over the records. Guessing on would try every object
    # inside a record in turn, which takes the square of their number.
    walkable = BytesSource(name, whole + b"}", block.start)
    start = 0
    while start < len(whole):
        spans, batch_end = _likely_spans(layout, whole, start)
        objects = decode_members([whole[first:end] for first, end in spans])
        # An object may also be two members, where no cut was seen between them. If they have equal
        # keys, it has lost one of them.
        if (
            objects is not None
            and all(len(members) == 1 for members in objects)
            and has_no_more_strings(whole[start:batch_end], count_strings(objects))
        ):
            for (first, end), members in zip(spans, objects, strict=True):
                yield Placed(block.start + first, block.start + end, *members.items())
            start = batch_end
        else:
            following = yield from _iter_walked(
                walkable, layout, block.start + start, block.start + batch_end
            )
            start = following - block.start


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


def _iter_walked(
    source: BytesSource, layout: FileLayout, start: int, end: int
) -> Generator[Placed, None, int]:
    """The records from `start` on, up to the first that ends at `end` or behind it.

    A parser finds where each of them ends. Returns where the next record starts.
    """
    try:
        for record in walk(source, layout, start):
            if record.key is not None:
                member = source.window(record.start, record.value_end - record.start)
                (pair,) = _decoded(member, layout.kind, record.start)
                yield Placed(record.start, record.value_end, pair)
            start = record.next_start
            if start >= end:
                break
    except DataError as error:  # the end of the block is inside a record, or the source is broken
        raise MiscutError(start) from error
    return start


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
