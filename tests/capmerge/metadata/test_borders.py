"""Borders of records that are found by counting braces, and how much work that is."""

import json
import random

import pytest
from builders.blocks import set_sizes
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.files.source import BytesSource
from capmerge.metadata.blocks import FileLayout, read_layout
from capmerge.metadata.borders import BorderCounter
from capmerge.metadata.cuts import CAREFUL_BLOCKS, counted_block, next_block
from capmerge.metadata.offsets import iter_placed
from capmerge.metadata.pieces import MiscutError, iter_block, recut
from capmerge.metadata.walk import walk

TEXTS = st.text(st.sampled_from('\\"{}[],: \n\ta\u00e9'), max_size=12)
VALUES = st.recursive(
    TEXTS | st.integers() | st.none(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


class Watched(BytesSource):
    """Bytes that count how often and how far they are read."""

    def __init__(self, data):
        super().__init__("m.json", data, 0)
        self.read = 0
        self.path, self.total_bytes = None, len(data)

    def window(self, start, size):
        """The bytes, which are counted."""
        window = super().window(start, size)
        self.read += len(window)
        return window

    def release(self, before):
        """A file is never released."""


def nested(count, objects):
    """A file of one line, in whose records every object looks like the end of the record."""
    record = {"objects": {f"o{n}": {"label": '},"a": {', "box": [n]} for n in range(objects)}}
    return json.dumps({f"k{n}": record for n in range(count)}).encode()


def work_through(data):
    """Decode a file block by block; return its keys, and how often a block was cut wrong."""
    source = Watched(data)
    layout = read_layout(source)
    block, keys, miscuts = next_block(source, layout, layout.first), [], 0
    while True:
        try:
            for piece in iter_block(data[block.start : block.end], layout, block):
                keys += piece.records.keys()
        except MiscutError as error:
            miscuts += 1
            block = recut(source, layout, block, error)
            continue
        if block.last:
            return keys, miscuts, source.read
        block = next_block(source, layout, block.next_start, block.careful)


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(TEXTS, VALUES, min_size=1, max_size=6),
    st.sampled_from([None, 0, 2]),
    st.booleans(),
    st.integers(2, 40),
)
def test_counting_finds_the_borders_of_a_parser(members, indent, ascii_only, part_bytes):
    """Whatever strings hold, and wherever the parts end, every border is found and no other."""
    data = json.dumps(members, indent=indent, ensure_ascii=ascii_only).encode()
    source = BytesSource("m.json", data, 0)
    layout = read_layout(source)
    expected = [record.next_start for record in walk(source, layout, layout.first)][:-1]
    counter, found = BorderCounter(layout.first), []
    while counter.place < len(data):
        found += counter.feed(data[counter.place : counter.place + part_bytes])
    assert [border.next_start for border in found] == expected
    for comma, following in found:
        assert data[comma : following + 1].split() in ([b",", b'"'], [b',"'])
    assert (counter.depth, counter.in_string) == (-1, False)


@pytest.mark.parametrize("objects", [20, 3000])
def test_work_on_a_deceptive_file_is_linear(objects, monkeypatch):
    """A few blocks are cut wrong, however many borders deceive, and each byte is read a few times.

    A file of twice the size is read twice as much.
    """
    set_sizes(monkeypatch, block_bytes=1 << 16, piece_bytes=1 << 13)
    reads = []
    for factor in (1, 2):
        data = nested(factor * 240_000 // objects, objects)
        keys, miscuts, read = work_through(data)
        assert keys == [*json.loads(data)]
        assert miscuts <= len(data) / (1 << 16) / CAREFUL_BLOCKS + 2
        reads.append(read / len(data))
    assert max(reads) < 3.5
    assert reads[1] == pytest.approx(reads[0], rel=0.2)


def test_records_of_many_objects_are_placed_without_guesses(monkeypatch):
    """Where a block was counted, an index takes the place of each record from counting, too."""
    data = nested(80, 1500)
    source = Watched(data)
    layout = read_layout(source)
    guesses = []
    monkeypatch.setattr(FileLayout, "find_cut", lambda *given: guesses.append(given))
    block = counted_block(source, layout, layout.first)
    keys = []
    while True:
        for start, end, (key, record) in iter_placed(
            "m.json", layout, block, data[block.start : block.end]
        ):
            assert json.loads(b"{" + data[start:end] + b"}") == {key: record}
            keys.append(key)
        if block.last:
            break
        block = next_block(source, layout, block.next_start, block.careful)
    assert keys == [*json.loads(data)]
    assert guesses == []


def test_what_stands_between_records_is_not_overlooked():
    """A block is not cut where letters stand between two records; the error has their place."""
    rng = random.Random(0)
    data = bytearray(nested(600, 100))
    layout = read_layout(BytesSource("m.json", bytes(data), 0))
    counter = BorderCounter(layout.first)
    border = rng.choice([*counter.feed(bytes(data[layout.first :]))][-50:])
    data[border.comma + 1 : border.comma + 1] = b" x"
    with pytest.raises(Exception, match='found "x", expected the quoted key') as found:
        work_through(bytes(data))
    assert f"{border.comma + 2:,}" in str(found.value)
