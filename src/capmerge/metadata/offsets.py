"""Decodes the records of a block and tells the byte offsets of each.

As in `cuts`, a cut is guessed from the bytes and proven by decoding: a record starts where the
one before it was proven to end, and if `{` + its bytes + `}` is one JSON object, its end is right
too. `pieces.iter_block` proves only where a piece of many records ends, and that is all that a
rewrite needs; here the end of every single record needs a proof, because its offsets are written to
an index.
"""

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator
from typing import NamedTuple

from capmerge.errors import DataError
from capmerge.files.source import BytesSource
from capmerge.metadata.blocks import BLOCK_BYTES, PIECE_BYTES, Block, FileLayout, Kind
from capmerge.metadata.borders import Border, BorderCounter
from capmerge.metadata.codec import NotJsonError, Pair, count_strings, decode, decode_members
from capmerge.metadata.format import FRAMINGS, WRITTEN
from capmerge.metadata.pieces import MiscutError
from capmerge.metadata.quotes import has_no_more_strings
from capmerge.metadata.walk import walk

FindCut = Callable[[int], tuple[int, int] | None]
"""The end of the record that starts at an offset, and the next start; None if it is the last."""
_SPACE = b" \t\n\r"


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
    whole = data.rstrip(_SPACE)
    if block.last:
        if whole[-1:] != b"}":
            raise MiscutError(block.start)
        whole = whole[:-1].rstrip(_SPACE)
    # Find the cuts of a batch and prove them all at once. They are guessed until a guess is wrong,
    # and from then on counted. Where that fails, too, a parser walks over the records.
    walkable = BytesSource(name, whole + b"}", block.start)
    guessing, start = not block.is_whole, 0
    find_cut = _guesses(layout, whole) if guessing else _counted_cuts(whole, start)
    while start < len(whole):
        spans, batch_end = _next_spans(find_cut, start, len(whole))
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
        elif guessing:
            guessing, find_cut = False, _counted_cuts(whole, start)
        else:
            following = yield from _iter_walked(
                walkable, layout, block.start + start, block.start + batch_end
            )
            start = following - block.start


def _next_spans(find_cut: FindCut, start: int, end: int) -> tuple[list[tuple[int, int]], int]:
    """The [start, end) of each record in the next `PIECE_BYTES`, and the following start."""
    spans, target = [], min(start + PIECE_BYTES, end)
    while start < target:
        cut, following = find_cut(start) or (end, end)
        spans.append((start, cut))
        start = following
    return spans, start


def _guesses(layout: FileLayout, whole: bytes) -> FindCut:
    """A function that guesses the end of the record at an offset in `whole`."""
    return lambda start: layout.find_cut(whole, start)


def _counted_cuts(whole: bytes, start: int) -> FindCut:
    """A function that knows the end of each record in `whole` from `start` on, by counting."""
    counter, borders = BorderCounter(start), list[Border]()
    while counter.place < len(whole):
        borders += counter.feed(whole[counter.place : counter.place + BLOCK_BYTES])
    starts = [border.next_start for border in borders]

    def find_cut(start: int) -> tuple[int, int] | None:
        number = bisect_right(starts, start)
        if number == len(starts):
            return None
        end, following = borders[number]
        if whole[end + 1 : following].strip(_SPACE):
            return None
        while whole[end - 1] in _SPACE:
            end -= 1
        return end, following

    return find_cut


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
