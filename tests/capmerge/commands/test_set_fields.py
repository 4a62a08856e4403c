"""`capmerge.set_fields` changes the fields it is asked to, and nothing else."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

import capmerge
from capmerge.errors import DataError, UsageError

SOURCE = (
    '{"a": {"tags": "x", "train_resolution": [1, 2], "big": 123456789012345678901234567890,'
    ' "odd": NaN, "lone": "\\ud83d"},\n "": {"nested": {"k": [1, {"l": null}]}},'
    ' "a": {"caption": "\u00e9", "caption": "last"}, "no object": ["x", 5], "b": {}}'
)
"""Records with equal keys, an empty key, and values that orjson would change or refuse."""


def sizes(number, _key):
    """The fields to set of all records but those with an even number."""
    return {"train_resolution": [number, 64], "image_size": [7, 8]} if number % 2 == 0 else None


def pairs_of(text):
    """All members of all objects in a JSON text, also those with equal keys."""
    return json.loads(text, object_pairs_hook=list)


@pytest.mark.parametrize("ending", [".json", ".json.gz"])
def test_only_the_fields_change(tmp_path, ending):
    """Every value, the order, equal keys and odd records are kept; a field keeps its place."""
    source, target = tmp_path / "s.json", tmp_path / f"t{ending}"
    source.write_text(SOURCE, encoding="utf-8")
    assert capmerge.set_fields(source, target, sizes) == 5
    data = target.read_bytes()
    written = pairs_of((gzip.decompress(data) if ending.endswith("gz") else data).decode())
    assert [key for key, _ in written] == ["a", "", "a", "no object", "b"]
    (_, first), (_, second), (_, third), (_, fourth), (_, fifth) = written
    assert " ".join(name for name, _ in first) == "tags train_resolution big odd lone image_size"
    assert dict(first)["train_resolution"] == [0, 64]
    assert dict(first)["big"] == 123456789012345678901234567890
    assert dict(first)["odd"] != dict(first)["odd"]
    assert dict(first)["lone"] == "\ud83d"
    assert second == [("nested", [("k", [1, [("l", None)]])])]
    assert third == [("caption", "last"), ("train_resolution", [2, 64]), ("image_size", [7, 8])]
    assert (fourth, dict(fifth)["train_resolution"]) == (["x", 5], [4, 64])


def test_json_lines_stay_lines(tmp_path):
    """Records of JSON lines are set by their number, blank lines do not count."""
    source, target = tmp_path / "s.jsonl", tmp_path / "t.jsonl"
    source.write_text('{"image_path": "a", "x": 1}\n\n{"image_path": "b"}\n{"image_path": "c"}\n')
    assert capmerge.set_fields(source, target, sizes) == 3
    lines = [json.loads(line) for line in target.read_text().splitlines()]
    assert lines == [
        {"image_path": "a", "x": 1, "train_resolution": [0, 64], "image_size": [7, 8]},
        {"image_path": "b"},
        {"image_path": "c", "train_resolution": [2, 64], "image_size": [7, 8]},
    ]


def test_a_large_file_goes_through(tmp_path):
    """A file of many blocks has all records in order, with the numbers that `iter_records` has."""
    source, target = tmp_path / "s.json", tmp_path / "t.json"
    records = {f"k{number}": {"caption": "x" * 100, "n": number} for number in range(30_000)}
    source.write_text(json.dumps(records, indent=4))
    seen = []
    written = capmerge.set_fields(
        source, target, lambda number, key: seen.append(key) or {"m": number}
    )
    assert written == len(seen) == 30_000
    for number, (key, record) in enumerate(capmerge.iter_records(target)):
        assert (key, record) == (f"k{number}", records[key] | {"m": number})


RECORDS = st.dictionaries(
    st.text(max_size=5),
    st.dictionaries(st.text(max_size=5), st.none() | st.integers() | st.floats() | st.text()),
    max_size=5,
)


@given(records=RECORDS)
def test_any_record_comes_through(tmp_path_factory, records):
    """With no field to set, the records are those of the source, for any values."""
    folder = tmp_path_factory.mktemp("f")
    (folder / "s.json").write_text(json.dumps(records), encoding="utf-8")
    capmerge.set_fields(folder / "s.json", folder / "t.json", lambda *_: None)
    found = json.loads((folder / "t.json").read_text(encoding="utf-8"))
    assert json.dumps(found) == json.dumps(records)


def test_mistakes_leave_nothing(tmp_path):
    """Another kind of target, one that exists, and damage are errors; no file is changed."""
    source, target = tmp_path / "s.json", tmp_path / "t.json"
    source.write_text(SOURCE)
    with pytest.raises(UsageError, match=r"is JSON, expected an output of that kind"):
        capmerge.set_fields(source, tmp_path / "t.jsonl", sizes)
    with pytest.raises(UsageError, match="never written to"):
        capmerge.set_fields(source, source, sizes, force=True)
    target.write_text("mine")
    with pytest.raises(UsageError, match="--force"):
        capmerge.set_fields(source, target, sizes)
    source.write_text(SOURCE[:-20])
    with pytest.raises(DataError, match=r"s\.json, byte"):
        capmerge.set_fields(source, target, sizes, force=True)
    (tmp_path / "s.jsonl").write_text('{"image_path": "a"}\n[1]\n')
    with pytest.raises(DataError, match="byte 20"):
        capmerge.set_fields(tmp_path / "s.jsonl", tmp_path / "t.jsonl", sizes)
    assert target.read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} == {"s.json", "s.jsonl", "t.json"}
