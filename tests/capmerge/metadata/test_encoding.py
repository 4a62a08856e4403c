"""Records are written without loss, laid out as Python lays them out."""

import json
import re

import pytest
from builders.blocks import set_sizes
from builders.json_values import TAMED, TEXT, VALUES, read, written
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.captions.merge import Merger
from capmerge.captions.templates import MergeOptions
from capmerge.metadata.codec import Records, decode
from capmerge.metadata.encoding import encode, to_json


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Set the sizes so that a piece has only a few records, and every test has several pieces."""
    set_sizes(monkeypatch, block_bytes=512, piece_bytes=128)


@given(st.dictionaries(TEXT, TAMED, max_size=5))
@settings(max_examples=200, deadline=None)
def test_json_is_laid_out_as_json_dump_does(records):
    r"""JSON is laid out as by json.dump(indent=2, ensure_ascii=False), but for lone surrogates."""
    source = json.dumps(records).encode()
    text = json.dumps(json.loads(source), indent=2, ensure_ascii=False)
    expected = re.sub("[\ud800-\udfff]", lambda char: f"\\u{ord(char[0]):04x}", text)
    assert written(source) == expected.encode("utf-8")


@pytest.mark.parametrize("odd", ["", ', "n": NaN', ', "n": "\\ud800"'])
def test_jsonl_lines(odd):
    """JSONL has one line per record in raw UTF-8, image_path first, from both ways of writing."""
    source = f'{{"b/\\u00e9": {{"caption": "x\\ny\\u2028"{odd}}}, "a": {{}}}}'.encode()
    lines = written(source, "jsonl").decode().split("\n")
    assert lines[2] == ""
    assert [list(json.loads(line)) for line in lines[:2]] == [
        ["image_path", "caption", *(["n"] if odd else [])],
        ["image_path"],
    ]
    records = {record.pop("image_path"): record for record in map(json.loads, lines[:2])}
    assert repr(records) == read(source)
    assert "é" in lines[0]


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_no_records_are_no_bytes(kind):
    """No bytes are written when there are no records."""
    assert encode(Records([]), kind) == b""


def test_equal_keys_of_one_piece_of_jsonl_are_all_written():
    """Two lines with the same key become two members, in their order."""
    body = bytes(encode(Records([("k", {"a": 1}), ("k", {"b": 2})]), "json"))
    assert body == b'  "k": {\n    "a": 1\n  },\n  "k": {\n    "b": 2\n  }'


@pytest.mark.parametrize(
    ("heavy", "light", "expected"),
    [(10**9, 1, [2 * 10**9, 1, 1]), (999999999, 999999998, [999999999, 499999999, 499999999])],
)
def test_large_weights_are_written(heavy, light, expected):
    """Field weights are exact whole numbers however large, in records that are otherwise plain."""
    records = decode(b'"k": {"tags": "t", "caption": "c1\\nc2"}', "json", last=False)
    merger = Merger(
        MergeOptions(lines=(f"{{tags}}={heavy}", f"{{caption}}={light}"), weights="field")
    )
    assert merger.merge_all(records.values()) == []
    assert (
        json.loads(b"{" + bytes(encode(records, "json")) + b"}")["k"]["capmerge_weights"]
        == expected
    )


@given(VALUES)
@settings(max_examples=100, deadline=None)
def test_to_json_is_one_line_that_reads_back(value):
    """The line of a rejected record is valid UTF-8, which json reads back to the same value."""
    value = json.loads(json.dumps(value))
    line = to_json(value)
    assert "\n" not in line
    assert repr(json.loads(line.encode("utf-8"))) == repr(value)
