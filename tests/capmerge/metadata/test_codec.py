import json
from contextlib import nullcontext

import pytest
from builders.blocks import set_sizes
from builders.json_values import TEXT, VALUES, read, written
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.files.source import BytesSource
from capmerge.metadata.blocks import read_layout
from capmerge.metadata.codec import NotJsonError, Stray, decode
from capmerge.metadata.pieces import iter_pairs, iter_source, place_of
from capmerge.metadata.scan import MAX_NESTING, InvalidError, scan_line, scan_member


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Set the sizes so that a piece has only a few records, and every test has several pieces."""
    set_sizes(monkeypatch, block_bytes=512, piece_bytes=128)


class _Kept(BytesSource):
    """Bytes with the `release` of a file."""

    def __init__(self, data):
        super().__init__("s", data, 0)

    def release(self, before):
        """Do nothing, because the bytes stay in memory."""


@given(
    st.dictionaries(TEXT, st.dictionaries(TEXT, VALUES, max_size=3), max_size=5),
    st.booleans(),
    st.sampled_from([None, 0, 2, "\t"]),
)
@settings(max_examples=300, deadline=None)
def test_nothing_is_lost(records, ascii_only, indent):
    """Any object that Python's json can write comes back as json.load reads it."""
    source = json.dumps(records, indent=indent, ensure_ascii=ascii_only).encode(
        "utf-8", "surrogatepass" if ascii_only else "replace"
    )
    assert read(written(source)) == read(source)


@pytest.mark.parametrize(
    "value",
    [
        *(
            "9223372036854775807",
            "9223372036854775808",
            "18446744073709551615",
            "18446744073709551616",
            "9" * 400,
        ),
        *(
            "-9223372036854775808",
            "-9223372036854775809",
            "123456789012345678901234567890",
            "-123456789012345678901234567890",
        ),
        *(
            "-0",
            "-0.0",
            "0.0",
            "1.0",
            "0.1",
            "1e16",
            "123456789.0e3",
            "12345678901234567890.5",
            "179769313486231570000000000000000000000",
        ),
        *(
            "1e300",
            "1E+300",
            "1e-300",
            "5e-324",
            "1e-400",
            "2.2250738585072011e-308",
            "1e400",
            "-1e400",
            "NaN",
            "Infinity",
            "-Infinity",
        ),
        *(
            "true",
            "null",
            '""',
            "[]",
            "{}",
            "[1, 1.0, true, null]",
            '{"": {"": [[], [[]], {}]}}',
            '{"a": 1, "a": 2.0}',
        ),
        *(
            r'"\ud800"',
            r'"\udfff\ud800"',
            r'"a\ud83d b"',
            r'"\ud83d\ude00"',
            '"😀"',
            r'"\\ud800"',
            r'{"\ud800": 1, "b": 2}',
        ),
        *(r'"\u0000\u001f\u007f"', '"\x7f"', r'"\u2028\u2029"', r'"\/"', r'"C:\\new\\x"'),
    ],
)
def test_hostile_values(value):
    """A value that some JSON library changes comes back as json.load reads it, at any depth."""
    record = f'{{"a": {value}, "b": [{value}], "c": {{"d": {value}}}}}'
    source = f'{{"k": {record}, "bare": {value}, "list": [[{value}]]}}'.encode()
    assert read(written(source)) == read(source)
    line = f'{{"image_path": "k", "a": {value}, "b": [[{value}]]}}'.encode()
    assert read(written(line, "jsonl")) == read(line)


@pytest.mark.parametrize(
    "source",
    [
        '{"k": {"a": 1}, "k": {"b": 2}}',
        '{"k": {"a": 1}, "x": {}, "k": {"b": 2}}',
        '{"": {"a": 1}, "": 2}',
        '{"a\\\\b": {}, "a\\\\\\\\b": {}, "a/b": {}, "a\\/b": {"c": 1}}',
        '{"\\u0061": {"x": 1}, "a": {"x": 2}}',
        '{"\\ud800": {"x": 1}, "\\ud800": {"x": 2}}',
    ],
)
def test_keys_are_read_as_json_load_reads_them(source):
    """Repeated, empty and escaped keys are read as by json.load; backslashes are kept."""
    assert read(written(source.encode())) == read(source)


@pytest.mark.parametrize("between", [0, 1, 5, 50])
@pytest.mark.parametrize("odd", ["1", "NaN", "123456789012345678901234567890"])
def test_a_repeated_key_reads_back_as_in_the_source(between, odd):
    """The last value of equal keys, near or far apart, counts, at the position of the first key."""
    members = [f'"k{i}": {{"tags": "tag number {i}"}}' for i in range(between)]
    source = "{" + ", ".join(['"k": {"a": 1}', *members, '"x": {}', f'"k": {{"b": {odd}}}']) + "}"
    assert read(written(source.encode())) == read(source)


@pytest.mark.parametrize("depth", [10, 200, 254, 300])
def test_nested_values(depth):
    """Values nested deeper than orjson writes are kept."""
    source = (
        '{"k": {"a": '
        + "[" * depth
        + "]" * depth
        + ', "b": '
        + '{"x":' * depth
        + "1.5"
        + "}" * depth
        + "}}"
    )
    assert read(written(source.encode())) == read(source)


@pytest.mark.parametrize("opening", ["[", '{"x":'])
def test_values_nested_as_deep_as_json_reads(opening):
    """Values that json.load still reads are kept."""
    source = '{"k": {"a": ' + opening * 600 + "1" + ("]" if opening == "[" else "}") * 600 + "}}"
    assert json.loads(written(source.encode())) == json.loads(source)


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_values_nested_past_any_parser(kind):
    """Values nested deeper than any parser reads are the source's error, not a crash."""
    nested = "[" * 200_000 + "]" * 200_000
    data = f'"k": {nested}' if kind == "json" else f'{{"image_path": "k", "a": {nested}}}'
    with pytest.raises(NotJsonError):
        decode(data.encode(), kind, last=kind == "jsonl")


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("value", ["1", '"\\ud800"', "NaN"])
@pytest.mark.parametrize("opening", ["[", '{"x":'])
def test_the_limit_of_nesting(opening, value, kind):
    """A record may have 900 objects and lists inside each other, in any way of reading it."""
    for depth, fits in ((MAX_NESTING, True), (MAX_NESTING + 1, False)):
        inner = depth - 1  # the record itself is the first
        nested = opening * inner + value + ("]" if opening == "[" else "}") * inner
        name = "k" if kind == "json" else "image_path"
        record = (
            f'"k": {{"a": {nested}}}' if kind == "json" else f'{{"{name}": "k", "a": {nested}}}'
        )
        with nullcontext() if fits else pytest.raises(NotJsonError):
            assert len(decode(record.encode(), kind, last=False).pairs) == 1
        with nullcontext() if fits else pytest.raises(InvalidError, match="nested deeper"):
            if kind == "json":
                scan_member(record + "}", 0, at_end=True, first=True)
            else:
                scan_line(record, 0, at_end=True)


def test_jsonl_to_json():
    """A line's image_path becomes the key; blank lines, CRLF and spaces around it are skipped."""
    source = (
        b'\n{"caption": "c", "image_path": "a", "x": 1}\r\n\n \t{"image_path": "b"} \r\n\r\n'
        b'{"image_path": "a", "y": 18446744073709551616}'
    )
    assert read(written(source)) == read(
        b'{"a": {"caption": "c", "x": 1}, "b": {}, "a": {"y": 18446744073709551616}}'
    )
    keys = [pair[0] for _, _, pair in iter_pairs(_Kept(source), read_layout(_Kept(source)))]
    assert keys == ["a", "b", "a"]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"[1]", "is not an object"),
        (b'"text"', "is not an object"),
        (b"null", "is not an object"),
        (b"{}", 'has no "image_path" string'),
        (b'{"image_path": 1}', 'has no "image_path" string'),
        (b'{"image_path": null, "caption": "c"}', 'has no "image_path" string'),
    ],
)
def test_a_line_that_is_no_record(line, problem):
    """A valid line of JSONL without a key is given unchanged, with the reason."""
    ((key, stray),) = decode(line, "jsonl", last=True).pairs
    assert key == ""
    assert isinstance(stray, Stray)
    assert problem in stray.problem
    assert stray.value == json.loads(line)


@pytest.mark.parametrize(
    "data",
    [
        *(
            b'"a": {}, ',
            b'"a": {}, "b"',
            b'"a": {"b": {}',
            b'"a": {}}, {"b": {}',
            b'"a": {}}',
            b'"a": {} "b": {}',
            b"a: {}",
        ),
        *(
            b'"a": nan',
            b'"a": 01',
            b'"a": "\n"',
            b'"a": "\xff"',
            b'"a": "\xed\xa0\x80"',
            b'"a": ' + b"9" * 5000,
        ),
    ],
)
def test_bytes_that_are_no_whole_records(data):
    """Bytes that are not whole records are never taken for some."""
    with pytest.raises(NotJsonError):
        decode(data, "json", last=False)


@pytest.mark.parametrize(
    "data",
    [
        b'{"image_path": "a"} {"image_path": "b"}',
        b'{"image_path": "a"',
        b"x",
        b'{"image_path": "\xff"}',
    ],
)
def test_lines_that_are_no_json(data):
    """A line that is not one JSON value is never taken for a record."""
    with pytest.raises(NotJsonError):
        decode(b'{"image_path": "ok"}\n' + data, "jsonl", last=True)


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_the_place_of_each_record(kind):
    """Every record's offset is that of its key, or of its line."""
    records = {f"k{i}": {"caption": "é" * i, "n": [{"x": i}]} for i in range(40)}
    if kind == "json":
        source = json.dumps(records, indent=2, ensure_ascii=False).encode()
        expected = [source.index(f'"{key}"'.encode()) for key in records]
    else:
        lines = [
            json.dumps({"image_path": key, **record}, ensure_ascii=False) + "\n\n"
            for key, record in records.items()
        ]
        source = "".join(lines).encode()
        expected = [source.index(line.encode()) for line in lines]
    layout = read_layout(BytesSource("s", source, 0))
    pieces = iter_source(BytesSource("s", source, 0), layout, keep=True)
    assert [
        place_of("s", layout, piece, number)
        for piece in pieces
        for number in range(len(piece.records.pairs))
    ] == expected


def test_the_places_of_equal_keys():
    """Each record of a repeated key has its own offset."""
    source = b'{"k": {"a": 1}, "x": {}, "k": {"a": 2}}'
    layout = read_layout(BytesSource("s", source, 0))
    (piece,) = iter_source(BytesSource("s", source, 0), layout, keep=True)
    assert [place_of("s", layout, piece, number) for number in range(3)] == [
        source.index(b'"k"'),
        source.index(b'"x"'),
        source.rindex(b'"k"'),
    ]


def test_iter_pairs_sees_every_equal_key():
    """A repeated key, in one piece or in two, is given as often as it is in the source."""
    members = [
        '"k": {"a": 0}',
        '"k": {"a": 1}',
        *(f'"x{i}": {{"tags": "some tags to fill a piece"}}' for i in range(20)),
        '"k": {"a": 2}',
    ]
    source = ("{\n  " + ",\n  ".join(members) + "\n}").encode()
    layout = read_layout(BytesSource("s", source, 0))
    pairs = [pair for _, _, pair in iter_pairs(_Kept(source), layout)]
    assert [key for key, _ in pairs] == ["k", "k", *(f"x{i}" for i in range(20)), "k"]
    assert [record["a"] for key, record in pairs if key == "k"] == [0, 1, 2]
