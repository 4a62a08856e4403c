"""Decodes the records of a block and tells the byte offsets of each.

As in `cuts`, a cut is guessed from the bytes and proven by decoding: a record starts where the
one before it was proven to end, and if `{` + its bytes + `}` is one JSON object, its end is right
too. `pieces.iter_block` proves only where a piece of many records ends, and that is all that a
rewrite needs; here the end of every single record needs a proof, because its offsets are written to
an index.
"""

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator
from itertools import accumulate
from typing import NamedTuple

from capmerge.errors import DataError
from capmerge.files.source import BytesSource
from capmerge.metadata.blocks import BLOCK_BYTES, PIECE_BYTES, Block, FileLayout, Kind
from capmerge.metadata.borders import Border, BorderCounter
from capmerge.metadata.codec import NotJsonError, Pair, decode, decode_listed, decode_listed_exactly
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


class PlacedRecords(NamedTuple):
    """Consecutive records, column by column, and their bytes as in `Placed`."""

    starts: list[int]
    ends: list[int]
    pairs: list[Pair]


def iter_placed(name: str, layout: FileLayout, block: Block, data: bytes) -> Iterator[Placed]:
    """The records of a block with their offsets, one by one; see `iter_batches`."""
    for batch in iter_batches(name, layout, block, data):
        yield from map(Placed, *batch)


def iter_batches(
    name: str, layout: FileLayout, block: Block, data: bytes
) -> Iterator[PlacedRecords]:
    """The records of a block with their offsets, some at a time.

    `data` are the bytes of the block, and `name` is the name of the source.

    Raises `MiscutError` where the bytes are not whole records; the records before it are valid.
    """
    if layout.kind == "jsonl":
        return _iter_lines(layout, block, data)
    return _iter_members(name, layout, block, data)


def _iter_lines(layout: FileLayout, block: Block, data: bytes) -> Iterator[PlacedRecords]:
    start = 0
    while start < len(data):
        # The lines of a batch are decoded together. Each of them is proven alone: none of them can
        # hold a line break.
        first, starts, ends = start, list[int](), list[int]()
        while start < len(data) and start - first < PIECE_BYTES:
            end, following = layout.find_cut(data, start) or (len(data), len(data))
            if data[start:end].strip(b" \t\r"):
                starts.append(block.start + start)
                ends.append(block.start + end)
            start = following
        pairs = _decoded(data[first:start], layout.kind, block.start + first)
        yield PlacedRecords(starts, ends, pairs)


def _iter_members(
    name: str, layout: FileLayout, block: Block, data: bytes
) -> Iterator[PlacedRecords]:
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
        if guessing and layout.separator:
            spans, text, batch_end = _separated(layout.separator, whole, start)
        else:
            spans, batch_end = _next_spans(find_cut, start, len(whole))
            members = [whole[first:end] for first, end in zip(*spans, strict=True)]
            text = b"".join((b"[{", b"},{".join(members), b"}]"))
        count = len(spans[0])
        found = decode_listed(text, count) or decode_listed_exactly(text, count)
        # An object may also be two members, where no cut was seen between them. If they have equal
        # keys, it has lost one of them.
        if (
            found
            and len(pairs := [pair for one in found.objects for pair in one.items()]) == count
            and all(found.objects)
            and has_no_more_strings(text, found.strings)
        ):
            starts, ends = ([block.start + place for place in side] for side in spans)
            yield PlacedRecords(starts, ends, pairs)
            start = batch_end
        elif guessing:
            guessing, find_cut = False, _counted_cuts(whole, start)
        else:
            following = yield from _iter_walked(
                walkable, layout, block.start + start, block.start + batch_end
            )
            start = following - block.start


_Spans = tuple[list[int], list[int]]
"""Where some records start, and where they end."""


def _next_spans(find_cut: FindCut, start: int, end: int) -> tuple[_Spans, int]:
    """The records in the next `PIECE_BYTES`, and the following start."""
    starts, ends, target = list[int](), list[int](), min(start + PIECE_BYTES, end)
    while start < target:
        cut, following = find_cut(start) or (end, end)
        starts.append(start)
        ends.append(cut)
        start = following
    return (starts, ends), start


def _separated(separator: bytes, whole: bytes, start: int) -> tuple[_Spans, bytes, int]:
    """What `_next_spans` finds where records are separated by known bytes, guessed at once.

    Between them stands the text of the list that `decode_listed` takes.
    """
    place = whole.find(separator, start + PIECE_BYTES)
    end, following = (place + 1, place + len(separator) - 1) if place >= 0 else (len(whole),) * 2
    batch = whole[start:end]
    # Of each separator, the first byte belongs to the record before it, and the last to the next.
    step = len(separator)
    parts = batch.split(separator)
    behind = [*accumulate([len(part) + step for part in parts])]
    starts = [start, *[start + place - 1 for place in behind[:-1]]]
    ends = [*[start + place - step + 1 for place in behind[:-1]], end]
    text = b"".join((b"[{", b'}},{"'.join(parts), b"}]"))  # faster than to replace separators
    return (starts, ends), text, following


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
) -> Generator[PlacedRecords, None, int]:
    """The records from `start` on, up to the first that ends at `end` or behind it.

    A parser finds where each of them ends. Returns where the next record starts.
    """
    try:
        for record in walk(source, layout, start):
            if record.key is not None:
                member = source.window(record.start, record.value_end - record.start)
                (pair,) = _decoded(member, layout.kind, record.start)
                yield PlacedRecords([record.start], [record.value_end], [pair])
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
    """The offsets [start, end) of each of the `count` records that `encode` wrote to `body`.

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
