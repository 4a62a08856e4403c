import io
import itertools
import json
import random
import tracemalloc

import pytest
from builders.blocks import INDENTED, LAYOUTS, RECORDS, Watched, set_sizes, small
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.errors import DataError
from capmerge.files.source import StreamSource
from capmerge.metadata import cuts
from capmerge.metadata.blocks import Block, iter_pieces, read_layout
from capmerge.metadata.cuts import next_block, walked_block
from capmerge.metadata.pieces import iter_pairs, iter_source
from capmerge.metadata.walk import walk


class Trickle(io.RawIOBase):
    """A pipe that gives a few bytes at a time."""

    def __init__(self, data):
        super().__init__()
        self._data, self._rng = io.BytesIO(data), random.Random(3)

    def read(self, size=-1):
        """At most `size` bytes, often fewer."""
        return self._data.read(self._rng.randint(1, min(size, 700)))


def pairs_of(data):
    """Every pair of a source, in order."""
    source = Watched(data)
    return [pair for _, _, pair in iter_pairs(source, read_layout(source))]


def error_of(data, **layout):
    """The error that is raised when a source is read to its end."""
    source = Watched(data)
    with pytest.raises(DataError) as error:
        for _ in iter_source(source, read_layout(source, **layout)):
            pass
    return error.value


@pytest.mark.parametrize("block_bytes", [64, 200, 1000, 4096, 1 << 20])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_is_read(layout, block_bytes, monkeypatch):
    """Blocks and pieces of any size hold every record of any layout, whole and in order."""
    small(monkeypatch, block_bytes)
    assert repr(pairs_of(LAYOUTS[layout])) == repr(list(RECORDS.items()))


@pytest.mark.parametrize("block_bytes", [64, 1000, 1 << 20])
@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\n\n", " \n \t\n"])
@pytest.mark.parametrize("end", ["", "\n"])
def test_jsonl_is_read(line_break, end, block_bytes, monkeypatch):
    """Every record of a JSONL file is read in order, with blank lines between them."""
    small(monkeypatch, block_bytes)
    lines = [
        json.dumps({"image_path": key, **record}, ensure_ascii=len(key) % 2 == 0)
        for key, record in RECORDS.items()
    ]
    data = (line_break.join(lines) + end).encode()
    assert read_layout(Watched(data)).kind == "jsonl"
    assert repr(pairs_of(data)) == repr(list(RECORDS.items()))


HOSTILE = st.recursive(
    st.sampled_from(
        ['},"', '},\n  "', '":{', ": {", "}", "{", '"', "\\", ",", "x" * 30, "é😀", 1, None]
    ),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(['"},"', "},", ":{", "", "k", "\\"]), inner, max_size=3)
    ),
    max_leaves=6,
)


MEMBERS = st.dictionaries(
    st.text(st.sampled_from('},":{\\\nab é'), max_size=6),
    st.dictionaries(st.sampled_from(["},", "a", '"']), HOSTILE, max_size=3),
    max_size=12,
)


@given(
    MEMBERS,
    st.sampled_from([None, 0, 2, 4]),
    st.sampled_from([(",", ":"), (", ", ": "), ("\n, ", " :\n"), (",\n", ":")]),
    st.integers(16, 300),
    st.integers(16, 100),
)
@settings(max_examples=300, deadline=None)
def test_no_text_deceives_the_cuts(members, indent, separators, block_bytes, piece_bytes):
    """Every record comes out whole, whatever its keys and texts look like."""
    texts = [
        json.dumps({key: record}, indent=indent, separators=separators)[1:-1].rstrip("\n")
        for key, record in members.items()
    ]
    data = ("{" + separators[0].join(texts) + "}").encode()
    with pytest.MonkeyPatch.context() as patch:
        small(patch, block_bytes, piece_bytes)
        assert read_layout(Watched(data)).kind == "json"
        assert repr(pairs_of(data)) == repr(list(members.items()))


def test_equal_keys_in_an_irregular_layout_are_seen():
    """A repeated key is given each time, whatever is between the records."""
    data = b'{\n  "a": {"n": 1}, "a": {"n": 2},\n  "b": {}\n}'
    assert pairs_of(data) == [("a", {"n": 1}), ("a", {"n": 2}), ("b", {})]


@pytest.mark.parametrize("block_bytes", [64, 500, 4096])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_cuts_depend_on_the_bytes_alone(layout, block_bytes, monkeypatch):
    """A slow pipe and bytes in memory are cut at the same offsets."""
    small(monkeypatch, block_bytes)
    data = LAYOUTS[layout]

    def cuts(source):
        return [
            (piece.start, len(piece.data), piece.last)
            for piece in iter_source(source, read_layout(source))
        ]

    found = cuts(Watched(data))
    assert found == cuts(StreamSource("m.json", Trickle(data)))
    assert found[-1][2]
    assert not any(last for _, _, last in found[:-1])


@pytest.mark.parametrize("indent", [0, 1, 2, 4, "\t"])
@pytest.mark.parametrize("line_break", [b"\n", b"\r\n", b""], ids=["LF", "CRLF", "one line"])
def test_plain_files_are_cut_by_sight(indent, line_break, monkeypatch):
    """If no record contains an object, no cut needs a parser, and pieces are near their size."""
    small(monkeypatch, 4096, 1024, (1024,))
    monkeypatch.setattr(cuts, "walk", None)
    flat = {
        key: {name: value for name, value in record.items() if not isinstance(value, dict)}
        for key, record in RECORDS.items()
    }
    data = json.dumps(flat, indent=indent).encode().replace(b"\n", line_break)
    source = Watched(data)
    pieces = list(iter_source(source, read_layout(source)))
    assert [key for piece in pieces for key, _ in piece.records.pairs] == list(RECORDS)
    assert max(len(piece.data) for piece in pieces) < 2 * 1024
    assert len(pieces) >= len(data) // 2048


@pytest.mark.parametrize("data", [b"{}", b"{ }", b" \n{\r\n\t}\n ", b"\xef\xbb\xbf{}"])
def test_an_empty_object_has_no_records(data):
    """An empty object is a file without records, in any layout."""
    assert pairs_of(data) == []
    source = Watched(data)
    layout = read_layout(source)
    (end,) = walk(source, layout, layout.first)
    assert (end.key, end.last, end.next_start) == (None, True, len(data))


K = '"key 1": {"caption": "one"}'
LONG = '"long": {"caption": "' + "x" * 3000 + '"}'


@pytest.mark.parametrize("before", ["", LONG + ", "], ids=["first", "after a long record"])
@pytest.mark.parametrize(
    ("text", "at", "key", "phrase"),
    [
        # truncated
        (f'{{%{K}, "b": {{"caption": "tw', "END", "b", "the file ends inside a record."),
        (f'{{%{K}, "b": {{"caption": "two"', "END", "b", "the file ends inside a record."),
        (
            f'{{%{K}, "b": {{"caption": "two"}}',
            "END",
            "b",
            "the file ends before its top-level object does",
        ),
        (f'{{%{K}, "b": ', "END", "b", "the file ends inside a record."),
        (f'{{%{K}, "b"', "END", "b", "the file ends before its top-level object does"),
        (f'{{%{K}, "b', "END", None, "the file ends inside a record."),
        (f"{{%{K}, ", "END", None, "the file ends before its top-level object does"),
        (f"{{%{K}", "END", "key 1", "the file ends before its top-level object does"),
        (f"{{%{K}\n", "END", "key 1", "the file ends before its top-level object does"),
        # garbage in the middle
        (f'{{%{K}, "b": {{"caption": §x}}, "c": {{}}}}', "§", "b", 'found "§"'),
        (f'{{%{K}, "b": {{"caption": "x" § "tags": "t"}}, "c": {{}}}}', "§", "b", 'found "§"'),
        (f'{{%{K}, §, "c": {{}}}}', "§", None, 'found "§", expected the quoted key of a record.'),
        (
            f'{{%{K} §, "c": {{}}}}',
            "§",
            "key 1",
            'found "§", expected a comma or } after the record.',
        ),
        (
            f'{{%{K}, "b": {{"caption": "x\n"}}, "c": {{}}}}',
            "\n",
            "b",
            'found "\\n" inside a string',
        ),
        (
            f'{{%{K}, "b": {{"caption": "x\0"}}, "c": {{}}}}',
            "\0",
            "b",
            'found "\\u0000" inside a string',
        ),
        (f'{{%{K}, "b": {{"a": "x", "b": §1}}, "c": {{}}}}', "§", "b", 'found "§"'),
        # trailing comma, missing comma, colon and brace
        (f"{{%{K}, }}", "}", None, "found } after a comma, expected the quoted key of a record."),
        (f"{{%{K},\n}}\n", "\n}", None, "found } after a comma"),
        (
            f'{{%{K} "b": {{}}}}',
            ' "b"',
            "key 1",
            'found "\\"", expected a comma or } after the record.',
        ),
        (
            f'{{%{K}, "b" {{"q": 1}}, "c": {{}}}}',
            '{"q"',
            "b",
            'found "{", expected a colon after the key.',
        ),
        (
            f'{{%{K}, "b": {{"caption": "x", "c": {{}}}}',
            "END",
            "b",
            "the file ends before its top-level object does",
        ),
        (f'{{%{K}, "b": {{"tags": "t" "caption": "c"}}}}', ' "caption": "c"', "b", 'found "\\""'),
        # text after the end
        (
            f"{{%{K}}} §",
            "§",
            None,
            'found "§" after the end of the top-level object, expected the end of the file.',
        ),
        (f"{{%{K}}}, {{}}", ", {}", None, 'found "," after the end'),
        (f"{{%{K}}}}}", "}}", None, 'found "}" after the end'),
        (f"{{%{K}}}\n{{}}", "{}", None, 'found "{" after the end'),
        # what Python's own parser cannot read
        (
            f'{{%{K}, "b": {{"n": {"9" * 5000}}}}}',
            '"n"',
            "b",
            "found a number that Python's json cannot read",
        ),
        (
            f'{{%{K}, "b": {{"n": {"[" * 5000}}}}}',
            '"n"',
            "b",
            "the record is nested deeper than a JSON parser can follow.",
        ),
    ],
)
def test_broken_files_are_refused_at_their_place(text, at, key, phrase, before, monkeypatch):
    """Every kind of damage is reported with its byte, the record's key and what was expected."""
    small(monkeypatch, 256)
    data = text.replace("%", before, 1).encode()
    error = error_of(data)
    assert phrase in error.problem
    assert error.key == key
    if at == "END":
        assert error.offset == len(data)
        assert "cut off" in error.next_step
    elif at == '"n"':
        assert error.offset == data.index(b'{"n"')
    else:
        place = data.rindex(at.encode()) + len(at) - len(at.lstrip(" \n" if at.strip() else ""))
        assert error.offset == place + (at == "}}")


@pytest.mark.parametrize("byte", [b"\xff", b"\xc3(", b"\xed\xa0\x80", b"\x80"])
@pytest.mark.parametrize("block_bytes", [64, 4096])
def test_invalid_utf8_is_refused_at_its_byte(byte, block_bytes, monkeypatch):
    """A byte that is not UTF-8 is reported with its value, its offset and its record, if known."""
    small(monkeypatch, block_bytes)
    text = "{" + ", ".join(f'"k{i}": {{"caption": "é text {i}"}}' for i in range(20)) + "}"
    data = text.encode().replace(b"text 11", b"te" + byte + b"xt")
    error = error_of(data)
    assert error.offset == data.index(b"te" + byte) + 2
    assert f"found the byte 0x{byte[0]:02x}, expected UTF-8." in error.problem
    assert error.key in (None, "k11")


@pytest.mark.parametrize(
    ("data", "offset", "phrase"),
    [
        (b"", 0, "the file is empty"),
        (b" \n\t ", 4, "the file is empty"),
        (b"\xef\xbb\xbf", 3, "the file is empty"),
        (b"[]", 0, "the top level is an array, expected an object"),
        (b' \n[{"a": 1}]', 2, "the top level is an array"),
        (b'"text"', 0, "the top level is a string"),
        (b"12", 0, "the top level is '12', expected an object"),
        (b"null", 0, "the top level is 'null'"),
        (b"<html>", 0, "the top level is '<html>'"),
        (b"}", 0, "the top level is '}'"),
        (b"\xff\xff{}", 0, "the top level is '\\\\xff\\\\xff{}'"),
        ('{"a": {}}'.encode("utf-16"), 0, "UTF-16"),
        ('{"a": {}}'.encode("utf-16-le"), 0, "UTF-16"),
        ('{"a": {}}'.encode("utf-16-be"), 0, "UTF-16"),
        ('{"a": {}}'.encode("utf-32"), 0, "UTF-32"),
    ],
)
def test_files_of_another_kind_are_refused(data, offset, phrase):
    """An empty file, another top level and another encoding are refused at the start."""
    with pytest.raises(DataError) as error:
        read_layout(Watched(data))
    assert error.value.offset == offset
    assert phrase in error.value.problem
    assert error.value.next_step


@pytest.mark.parametrize(
    "data",
    [
        b" " * 70_000 + b'{"a": {}}',
        b"{" + b"\n" * 70_000 + b'"a": 1, }',
        b"{" + b" " * 70_000 + b"}",
    ],
)
def test_long_white_space_at_the_start(data, monkeypatch):
    """White space before the first record may be of any length."""
    monkeypatch.setattr(cuts, "_guessed_block", lambda *_: None)
    source = Watched(data)
    layout = read_layout(source)
    assert data[layout.first : layout.first + 1] in b'"}'


@pytest.mark.parametrize(
    ("text", "at", "phrase"),
    [
        ('{"image_path": "a"}\n{"image_path": "b"\n', None, "record"),
        ('{"image_path": "a"}\n{"image_path": "b"} §\n', "§", 'found "§" after a value'),
        (
            '{"image_path": "a"}\n{"image_path": "b"}{"image_path": "c"}\n',
            '{"image_path": "c"}',
            "after a value",
        ),
        ('{"image_path": "a"}\n§\n{"image_path": "b"}', "§", 'found "§"'),
        ('{"image_path": "a"}\n{\n"image_path": "b"}', None, ""),
        ('{"image_path": "a"}\n{"image_path": "b", "caption": §}\n', "§", 'found "§"'),
    ],
)
@pytest.mark.parametrize("lines_before", [0, 50])
def test_broken_lines_of_jsonl_are_refused(text, at, phrase, lines_before, monkeypatch):
    """A line that is not one JSON value is reported with its byte."""
    small(monkeypatch, 128)
    data = ('{"image_path": "x", "caption": "some text"}\n' * lines_before + text).encode()
    error = error_of(data)
    assert phrase in error.problem
    if at:
        assert error.offset == data.index(at.encode())
    else:
        line_start = data.index(b"\n", data.index(b'"a"')) + 1
        assert line_start <= error.offset <= data.index(b"\n", line_start)


def test_a_line_cut_short_is_not_the_end_of_the_file():
    """A line in the middle of a JSONL file that ends inside its record is reported as such."""
    error = error_of(
        b'{"image_path": "a"}\n{"image_path": "b", "caption": "tw\n{"image_path": "c"}\n'
    )
    assert "the line ends" in error.problem


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (b'{"image_path": "a"}', "jsonl"),
        (b'{"image_path": "a"}\n', "jsonl"),
        (
            b'\xef\xbb\xbf\n\n \t{"caption": "c", "image_path": "a"} \r\n{"image_path": "b"}',
            "jsonl",
        ),
        (b'{"n": {"image_path": "x"}, "image_path": "a"}\nbroken', "jsonl"),
        (b'{"image_path": 1}', "json"),
        (b'{"image_path": {"image_path": "a"}}', "json"),
        (b'{"image_path": "a"\n}', "json"),
        (b'{"image_path": "a", "b": {}\n', "json"),
        (b'{"a": {"image_path": "x"}}', "json"),
        (b'{"a": {}} {"image_path": "a"}', "json"),
        (b"{", "json"),
        (b"{}", "json"),
        (b'{"image_path": "' + b"x" * 300_000 + b'"}\n', "jsonl"),
        (b'{"caption": "' + b"x" * 3_000_000 + b'", "image_path": "a"}\n', "jsonl"),
        (b"{" + b", ".join(b'"k%d": {"caption": "c"}' % i for i in range(100_000)) + b"}", "json"),
        (b'{"image_path": "\xff"}', "jsonl"),
    ],
    ids=lambda value: repr(value[:30]) if isinstance(value, bytes) else value,
)
def test_jsonl_is_told_by_its_first_line(data, kind):
    """A file is JSONL if its first line is a whole object with an image_path string."""
    assert read_layout(Watched(data)).kind == kind


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
def test_too_long_records_are_refused(kind, block_bytes, monkeypatch):
    """A record longer than allowed is refused with its offset and key; one at the limit is read."""
    small(monkeypatch, block_bytes)
    members = [f'"k{i}": {{"caption": "{"x" * i}"}}' for i in (30, 900, 40)]
    lines = [f'{{"image_path": "k{i}", "caption": "{"x" * i}"}}' for i in (30, 900, 40)]
    data = ("{" + ", ".join(members) + "}" if kind == "json" else "\n".join(lines)).encode()
    longest = (members if kind == "json" else lines)[1]
    set_sizes(monkeypatch, block_bytes=min(block_bytes, len(longest) - 1))
    error = error_of(data, max_record_bytes=len(longest) - 1)
    assert f"the record is longer than {len(longest) - 1:,} bytes." in error.problem
    assert error.offset == data.index(longest.encode())
    assert error.key in (None, "k900")
    assert "--max-record" in error.next_step
    source = Watched(data)
    pieces = iter_source(source, read_layout(source, len(longest)))
    assert sum(len(piece.records.pairs) for piece in pieces) == 3


def test_an_endless_record_is_not_read_to_its_end(monkeypatch):
    """A string that never ends is given up soon after the longest record allowed."""
    small(monkeypatch, 1000)
    source = Watched(b'{"a": {}, "b": {"caption": "' + b"x" * 1_000_000)
    with pytest.raises(DataError, match="longer than 5,000 bytes") as error:
        for _ in iter_source(source, read_layout(source, 5000)):
            pass
    assert error.value.key == "b"
    assert source.read_to < 70_000  # the first look at the layout is 64 KiB


def test_blocks_are_found_without_reading_them(monkeypatch):
    """Finding the next block of an indented file reads only a few bytes after its target."""
    set_sizes(monkeypatch, block_bytes=2000, looks=(600, 1200))
    source = Watched(INDENTED)
    layout = read_layout(source)
    source.largest = 0
    block = next_block(source, layout, layout.first)
    assert not block.last
    assert block.cut == "guessed"
    assert 2000 <= block.end - block.start < 2600
    assert source.largest <= 600


def test_the_first_records_are_there_before_the_rest_is_read(monkeypatch):
    """The first records are available as soon as their block is read."""
    small(monkeypatch, 4096, 1024, (512, 2048))
    data = json.dumps({f"k{i}": {"caption": "c" * 50} for i in range(20_000)}, indent=2).encode()
    for text in (data, data.replace(b"\n", b"")):
        layout = read_layout(Watched(text))
        source = Watched(text)
        piece = next(iter_source(source, layout))
        assert len(piece.records.pairs) > 5
        assert source.read_to < 4096 + 1024
        for _ in iter_source(source, layout):
            pass
        assert source.largest < 4096 + 1024


def test_memory_does_not_grow_with_a_stream():
    """Reading a long pipe to its end holds only a few blocks of it in memory."""
    record = b'"caption": "' + b"x" * 500 + b'"'
    lines = b"\n".join(b'{"image_path": "k%d", %s}' % (i, record) for i in range(30_000))
    source = StreamSource("pipe", io.BytesIO(lines))
    layout = read_layout(source)
    tracemalloc.start()
    try:
        count = sum(len(piece.records.pairs) for piece in iter_source(source, layout))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 30_000
    assert peak < len(lines) / 2


def test_pieces_of_a_block_join_to_it(monkeypatch):
    """The pieces of a block join to it; a walked block, which cannot be wrong, is one piece."""
    small(monkeypatch, 4096, 200)
    layout = read_layout(Watched(INDENTED))
    block = next_block(Watched(INDENTED), layout, layout.first)
    data = INDENTED[block.start : block.end]
    pieces = list(iter_pieces(data, layout, block))
    assert len(pieces) > 5
    assert [bytes(piece) for _, piece, _ in pieces] == [
        data[start : start + len(piece)] for start, piece, _ in pieces
    ]
    assert all(
        set(data[a + len(piece) : b]) <= set(b" ,\n")
        for (a, piece, _), (b, _, _) in itertools.pairwise(pieces)
    )
    walked = walked_block(Watched(INDENTED), layout, layout.first)
    assert walked.cut == "walked"
    assert isinstance(walked, Block)
    ((start, piece, last),) = iter_pieces(INDENTED[walked.start : walked.end], layout, walked)
    assert (start, bytes(piece), last) == (0, INDENTED[walked.start : walked.end], False)
