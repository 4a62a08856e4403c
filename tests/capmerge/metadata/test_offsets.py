import json

import pytest
from builders.blocks import INDENTED, LAYOUTS, RECORDS, Watched, small

from capmerge.errors import DataError
from capmerge.metadata import offsets as spans
from capmerge.metadata.blocks import read_layout
from capmerge.metadata.codec import Records
from capmerge.metadata.cuts import next_block, walked_block
from capmerge.metadata.encoding import encode
from capmerge.metadata.offsets import iter_placed, spans_written
from capmerge.metadata.pieces import MiscutError
from capmerge.metadata.walk import walk


def placed_in(data):
    """Every record of a source with its offsets, as a worker finds them block by block."""
    source = Watched(data)
    layout = read_layout(source)
    block, found = next_block(source, layout, layout.first), []
    while True:
        try:
            for placed in iter_placed(
                "m.json", layout, block, source.window(block.start, block.end - block.start)
            ):
                found.append(placed)  # noqa: PERF402  # records before an error are valid
        except MiscutError as error:
            block = walked_block(source, layout, error.offset)
            continue
        if block.last:
            return found
        block = next_block(source, layout, block.next_start)


@pytest.mark.parametrize("piece_bytes", [1, 300, 1 << 16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_records_are_placed_in_any_layout(layout, piece_bytes, monkeypatch):
    """The offsets of every record are those of a walk, in any layout and for any sizes."""
    small(monkeypatch, 1000)
    monkeypatch.setattr(spans, "PIECE_BYTES", piece_bytes)
    data = LAYOUTS[layout]
    found = placed_in(data)
    assert repr([placed.pair for placed in found]) == repr(list(RECORDS.items()))
    source = Watched(data)
    start = read_layout(source)
    walked = [(record.start, record.value_end) for record in walk(source, start, start.first)]
    assert [(placed.start, placed.end) for placed in found] == walked


@pytest.mark.parametrize("separators", [(",", ":"), (", ", ": ")])
def test_a_cut_inside_a_list_is_seen(separators):
    """A boundary between the objects of a list is no cut, though both halves could be parsed."""
    records = {
        f"k{number}": {"list": [{"a": {}, "b": {"c": 1}, "d": {}}, {"e": {}, "f": {}}], "n": {}}
        for number in range(20)
    }
    assert [
        placed.pair for placed in placed_in(json.dumps(records, separators=separators).encode())
    ] == list(records.items())


@pytest.mark.parametrize(("records", "objects"), [(1, 3000), (60, 100)])
@pytest.mark.parametrize("layout", [{}, {"separators": (",", ":")}, {"indent": 2}])
def test_each_byte_is_decoded_a_few_times(monkeypatch, records, objects, layout):
    """The work does not grow with the square of the objects in a record."""
    decoded = 0

    def counting(decode):
        def counted(data, *arguments, **named):
            nonlocal decoded
            decoded += sum(map(len, data)) if isinstance(data, list) else len(data)
            return decode(data, *arguments, **named)

        return counted

    for name in ("decode", "decode_listed"):
        monkeypatch.setattr(spans, name, counting(getattr(spans, name)))
    wide = {
        f"k{number}": {"tags": "t", "objects": {f"o{i}": {"x": {"y": i}} for i in range(objects)}}
        for number in range(records)
    }
    data = json.dumps(wide, **layout).encode()
    assert [placed.pair for placed in placed_in(data)] == list(wide.items())
    assert decoded < 4 * len(data)


def test_lines_are_placed():
    """A record of a JSONL file is its line; a blank line and the end of the file are no records."""
    lines = [json.dumps({"image_path": key, **record}) for key, record in RECORDS.items()]
    data = ("\n \n".join(lines)).encode()
    found = placed_in(data)
    assert [placed.pair for placed in found] == list(RECORDS.items())
    assert [data[placed.start : placed.end].decode() for placed in found] == lines


@pytest.mark.parametrize(
    "data", [INDENTED[:-40], INDENTED + b"}", b'{\n  "a": {"x": 1}\n  "b": {}\n}', b'{"a": {]}}']
)
def test_what_is_no_json_is_an_error(data):
    """A file that is cut off or broken anywhere ends in a `DataError`."""
    with pytest.raises(DataError):
        placed_in(data)


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("exact", [frozenset(), frozenset({0, 2})])
def test_what_a_rewrite_writes_is_placed_without_parsing(kind, exact):
    """The spans of records in encoded output hold exactly the bytes of each record."""
    pairs = list(RECORDS.items())
    body = bytes(encode(Records(pairs, exact), kind))
    places = spans_written(body, kind, len(pairs))
    read = [
        json.loads(body[start:end] if kind == "jsonl" else b"{" + body[start:end] + b"}")
        for start, end in places
    ]
    expected = [
        {"image_path": key, **record} if kind == "jsonl" else {key: record} for key, record in pairs
    ]
    assert read == expected
    assert spans_written(b"", kind, 0) == []
