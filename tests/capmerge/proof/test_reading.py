import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.errors import DataError
from capmerge.files.source import BytesSource
from capmerge.metadata.blocks import Block, read_layout
from capmerge.proof import reading
from capmerge.proof.reading import BlockReader


def read(data, parser):
    """All records of a file that is one block, and what else was found."""
    layout = read_layout(BytesSource("m", data, 0))
    block = Block(layout.first, len(data), len(data), last=True)
    reader = BlockReader("m", layout, parser, whole=False)
    parts = list(reader.read(data[layout.first :], block))
    pairs = [pair for part in parts for pair in part.pairs]
    broken = [part.broken_at for part in parts if part.broken_at is not None]
    return (
        pairs,
        sum(len(part.doubled) for part in parts),
        sum(part.by_json for part in parts),
        broken,
    )


# A record's text, and whether the standard library has to read it in ijson's place.
VALUES = {
    "plain": ('{"a": "b", "c": [1, 2.5, true, null, {"d": []}]}', False),
    "empty": ("{}", False),
    "no object": ('"text"', False),
    "escapes": (r'{"a": "\u00e9\/\b\f\n\r\t\"\\", "\\\"": "\""}', False),
    "surrogate pair": (r'{"a": "\ud83d\ude00 \uD83D\uDE00"}', False),
    "lone first half": (r'{"a": "\ud83d"}', True),
    "lone first half before a letter": (r'{"a": "\ud83dx"}', True),
    "lone first half before an escape": (r'{"a": "\ud83d\u0041"}', True),
    "lone first half in capitals": (r'{"a": "\uD83D\n"}', True),
    "two first halves": (r'{"a": "\ud83d\ud83d"}', True),
    "lone second half": (r'{"a": "\ude00"}', True),
    "lone half in a key": (r'{"\ud83d": 1}', True),
    "half behind a backslash": (r'{"a": "\\\ud83d"}', True),
    "pair behind a backslash": (r'{"a": "\\ud83d\ude00"}', True),
    "no half but a backslash": (r'{"a": "\\ud83d"}', False),
    "NaN": ('{"a": NaN}', True),
    "Infinity": ('{"a": [Infinity, -Infinity]}', True),
    "a float past 1e308": ('{"a": 1e400}', True),
    "a tiny float": ('{"a": 1e-400, "b": -0.0, "c": 0.1}', False),
    "a large float": ('{"a": 1e300}', False),
    "the largest integer": ('{"a": 9223372036854775807}', False),
    "2^63": ('{"a": 9223372036854775808}', True),
    "-2^63": ('{"a": -9223372036854775808}', True),
    "a long integer": ('{"a": {"b": [-10000000000000000000000001]}}', True),
    "numbers": ('{"a": [-0, 1E5, 1e-2, 12345678901234567890.0]}', False),
    "a field twice": ('{"a": 1, "b": "c", "a": "d"}', True),
    "a nested field twice": ('{"a": {"b": 1, "b": 2}}', True),
    "empty names": ('{"": {"": [{"": 1}]}, "a.b": {"item": 2}}', False),
    "NUL": (r'{"a\u0000b": "\u0000"}', False),
    "separators": ('{"a": "\u2028\x7f,}{"}', False),
    "deep nesting": ('{"a": ' + "[" * 899 + "]" * 899 + "}", False),
}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("parser", ["ijson", "orjson"])
def test_every_value_is_read_as_json_reads_it(name, parser):
    """Whatever a parser cannot represent comes out as from `json.load`, and is counted."""
    text, needs_json = VALUES[name]
    around = '{"k": {"caption": "c"}, "x": %s, "l": {"tags": "t"}}' % text  # noqa: UP031
    pairs, doubled, by_json, broken = read(around.encode(), parser)
    assert repr(pairs) == repr(list(json.loads(around).items()))
    assert broken == []
    assert doubled == ("twice" in name)
    if parser == "ijson":
        assert by_json == needs_json


@pytest.mark.parametrize("parser", ["ijson", "orjson"])
def test_every_line_is_read_as_json_reads_it(parser):
    """The lines of JSONL are read as those values are, with blank lines and white space around."""
    values = [text for text, _ in VALUES.values() if text[0] == "{" and text != "{}"]
    lines = [f'{{"image_path": "k{n}", {text[1:]}' for n, text in enumerate(values)]
    data = "\n \t\r\n".join(f" {line}\r" for line in lines).encode()
    pairs, doubled, by_json, broken = read(data, parser)
    records = [json.loads(line) for line in lines]
    assert repr(pairs) == repr([(record.pop("image_path"), record) for record in records])
    assert (doubled, broken) == (2, [])
    if parser == "ijson":
        assert by_json == sum(needs for text, needs in VALUES.values() if text in values)


@pytest.mark.parametrize("parser", ["ijson", "orjson"])
def test_records_with_equal_keys_are_all_read(parser):
    """Equal keys, next to each other or not, are all there; no field is told as doubled."""
    data = b'{"a": {"b": 1}, "a": {"b": 2}, "c": {}, "a": {"b": "d"}}'
    expected = [("a", {"b": 1}), ("a", {"b": 2}), ("c", {}), ("a", {"b": "d"})]
    assert read(data, parser) == (expected, 0, 0, [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
TEXT = st.text(st.characters() | st.characters(categories=["Cs"]), max_size=4)


@given(
    st.dictionaries(
        st.text(max_size=3), st.dictionaries(TEXT, JSON | TEXT, max_size=4), max_size=6
    ),
    st.sampled_from([None, 0, 2]),
    st.sampled_from(["ijson", "orjson"]),
)
@settings(max_examples=300, deadline=None)
def test_any_file_is_read_as_json_reads_it(records, indent, parser):
    """Files of any values give what `json.load` gives, in any layout."""
    data = json.dumps(records, indent=indent).encode()
    assert repr(read(data, parser)[0]) == repr(list(json.loads(data).items()))


@pytest.mark.parametrize(
    "record",
    [
        b'{"a": 1,}',
        b'{"a": [1,]}',
        b'{"a": 01}',
        b'{"a": +1}',
        b'{"a": .5}',
        b'{"a": 1.}',
        b'{"a": 0x10}',
        b'{"a": tru}',
        b'{/* c */ "a": 1}',
        b'{"a": 1 // c\n}',
        b"{'a': 1}",
        b"{a: 1}",
        b'{"a" 1}',
        b'{"a": 1 "b": 2}',
        b'{"a": 1}}',
        b'{"a": 1} {"b": 2}',
        b'{"a":\x0b1}',
        b'{"a":\x0c1}',
        b'{"a": "\x01"}',
        b'{"a": "\n"}',
        b'{"a": \x00}',
        b'{"a": "\\x"}',
        b'{"a": "\\u12"}',
        b'{"a": "\xff"}',
        b'{"a": "\xc0\x80"}',
        b'{"a": "\xed\xa0\x80"}',
        b'{"a": "\xf4\x90\x80\x80"}',
        b'{"a": "\xe2\x82"}',
        b'{"a": ' + b"[" * 901 + b"]" * 901 + b"}",
        b'{"a": ' + b'{"b": ' * 901 + b"1" + b"}" * 901 + b"}",
    ],
)
@pytest.mark.parametrize("parser", ["ijson", "orjson"])
def test_what_is_no_record_is_found(record, parser):
    """Reading stops at a record that is not valid, or nested deeper than any command allows."""
    start = b'{"k": {"tags": "t"}, '
    pairs, _, _, (broken,) = read(start + b'"x": ' + record + b', "l": {}}', parser)
    assert pairs == [("k", {"tags": "t"})]
    assert broken == len(start) - 1


@pytest.mark.parametrize(
    "lines",
    [
        b'{"image_path": "a",\n"b": 1}',
        b'{"image_path": "a"} {"image_path": "b"}\n',
        b'{"image_path": "a"}\n\n{"image_path": "b"}}\n',
        b'{"image_path": "a"}\n{"image_path": "b", "c": {}\n}\n',
        b'{"image_path": "a"}\n{"image_path": "b", "c": {}\n}{"image_path": "d"}\n',
    ],
)
def test_a_line_that_is_no_record_is_found(lines):
    """Each line of JSONL is one value, although ijson would read values over lines."""
    data = b'{"image_path": "first"}\n' + lines
    pairs, _, _, (broken,) = read(data, "ijson")
    assert pairs[0] == ("first", {})
    assert len(pairs) == data[:broken].count(b"image_path")


def test_deep_nesting_takes_little_memory():
    """Parser ijson would take gigabytes for 30,000 lists inside each other."""
    data = b'{"a": {}, "k": ' + b"[" * 30_000 + b"]" * 30_000 + b"}"
    tracemalloc.start()
    pairs, _, _, broken = read(data, "ijson")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (pairs, len(broken)) == ([("a", {})], 1)
    assert peak < 40e6


def test_a_file_that_ends_behind_a_comma_is_found(monkeypatch):
    """The closing brace alone is a block of an empty object only at the start of the file."""
    monkeypatch.setattr(reading, "_PIECE_BYTES", 4)
    layout = read_layout(BytesSource("m", b'{"a": {},\n}', 0))
    reader = BlockReader("m", layout, "ijson", whole=False)
    *_, part = reader.read(b"}", Block(10, 11, 11, last=True))
    assert part == ([], (), 0, 0)


@pytest.mark.parametrize("parser", ["ijson", "orjson"])
@pytest.mark.parametrize("piece_bytes", [10, 100, 1000])
def test_pieces_of_any_size_give_the_same_records(parser, piece_bytes, monkeypatch):
    """Pieces that end within records, in texts and nested objects, are read one by one."""
    monkeypatch.setattr(reading, "_PIECE_BYTES", piece_bytes)
    monkeypatch.setattr(reading, "_SMALL_BYTES", piece_bytes // 2)
    records = {
        f"k{n}": {
            "caption": 'x }, "y": {' * (n % 5),
            "nested": {"a": {"b": {}}, "},": {"c": [{}, {"d": n}]}, "e": {"f": "\ud83d"}},
            "tags": float("nan") if n % 7 == 3 else "t",
        }
        for n in range(40)
    }
    for indent in (None, 2):
        data = json.dumps(records, indent=indent).encode()
        assert repr(read(data, parser)[0]) == repr(list(json.loads(data).items()))


def test_a_wrong_cut_of_a_piece_is_an_error(monkeypatch):
    """A cut that leaves a record out between two pieces is told as such."""
    monkeypatch.setattr(reading, "_PIECE_BYTES", 4)
    data = json.dumps({f"k{n}": {"tags": "t"} for n in range(9)}, indent=2).encode()
    layout = read_layout(BytesSource("m", data, 0))
    right = type(layout).find_cut

    def losing(self, window, start):
        cut = right(self, window, start)
        later = cut and right(self, window, cut[1] + 1)
        return (cut[0], later[1]) if later else cut

    monkeypatch.setattr(type(layout), "find_cut", losing)
    with pytest.raises(DataError, match="bug of capmerge"):
        read(data, "ijson")
