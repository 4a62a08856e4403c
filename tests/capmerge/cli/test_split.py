"""Files are split into parts that hold every record, and joined again to what they were."""

import gzip
import json

import pytest
from builders.metadata import LAYOUTS, as_indent_2, as_jsonl, make_records, read_jsonl, run

from capmerge.metadata.parquet_reader import iter_parquet

MANY = make_records(2500, nested=True)
"""Several blocks of records with all kinds of values."""


def loaded(path):
    """The records of a file."""
    if path.suffix == ".parquet":
        return list(iter_parquet(path))
    if path.suffix == ".jsonl":
        return [(line.pop("image_path"), line) for line in read_jsonl(path)]
    return list(json.loads(path.read_bytes()).items())


def parts_in(folder):
    """The records of each part, with the parts in their order."""
    return [loaded(path) for path in sorted(folder.iterdir())]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("by", ["count", "bytes", "hash"])
def test_a_split_is_joined_again(tmp_path, by, layout):
    """Records and values come back exactly, and the order except by hash, with any -j."""
    source = tmp_path / "meta.json"
    source.write_bytes(LAYOUTS[layout](MANY))
    outputs = []
    for jobs in ("1", "3"):
        run("split", source, "-n", "4", "-o", tmp_path / "parts", "--by", by, "--force", "-j", jobs)
        files = sorted((tmp_path / "parts").iterdir())
        outputs.append([file.read_bytes() for file in files])
    assert outputs[0] == outputs[1]
    ending = "jsonl" if layout == "jsonl" else "json"
    assert [file.name for file in files] == [f"part-0000{number}.{ending}" for number in range(4)]
    run("join", "-o", tmp_path / "out.json", *files)
    joined, expected = loaded(tmp_path / "out.json"), list(MANY.items())
    if by == "hash":
        joined.sort()
        numbers = {key: number for number, key in enumerate(MANY)}
        for part in parts_in(tmp_path / "parts"):
            places = [numbers[key] for key, _ in part]
            assert places == sorted(places)
            assert 400 < len(places) < 850
    assert repr(joined) == repr(expected)
    if by == "count":
        assert [len(part) for part in parts_in(tmp_path / "parts")] == [625] * 4
    if by == "bytes":
        sizes = [len(data) for data in outputs[0]]
        assert max(sizes) - min(sizes) < 3000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["meta.json", "out.json", "parts"]


@pytest.mark.parametrize("ending", ["json", "jsonl", "parquet"])
@pytest.mark.parametrize("layout", ["indent=2", "jsonl"])
def test_parts_have_the_format_that_is_asked_for(tmp_path, layout, ending):
    """Any format of the source becomes any of the parts, by count and by hash, without loss."""
    (tmp_path / "meta").write_bytes(LAYOUTS[layout](MANY))
    for by in ("count", "hash"):
        run("split", "meta", "-n", "3", "-o", by, "--by", by, "--format", ending, cwd=tmp_path)
        found = parts_in(tmp_path / by)
        assert len(found) == 3
        records = sorted((pair for part in found for pair in part), key=lambda pair: pair[0])
        assert repr(records) == repr(list(MANY.items()))
    assert [len(part) for part in parts_in(tmp_path / "count")] == [834, 833, 833]


@pytest.mark.parametrize("by", ["count", "bytes", "hash"])
def test_what_is_read_once_is_split_too(tmp_path, by):
    """A pipe and a gzip file give the parts of the plain file."""
    (tmp_path / "meta.json").write_bytes(as_indent_2(MANY))
    (tmp_path / "meta.json.gz").write_bytes(gzip.compress(as_indent_2(MANY)))
    words = ("-n", "5", "--by", by)
    run("split", "meta.json", "-o", "plain", *words, cwd=tmp_path)
    run("split", "meta.json.gz", "-o", "zipped", *words, cwd=tmp_path)
    run("split", "-", "-o", "piped", *words, cwd=tmp_path, stdin=as_indent_2(MANY))
    plain, zipped, piped = (
        [path.read_bytes() for path in sorted((tmp_path / name).iterdir())]
        for name in ("plain", "zipped", "piped")
    )
    assert plain == zipped == piped


@pytest.mark.parametrize("by", ["count", "bytes", "hash"])
@pytest.mark.parametrize("records", [{}, {"k": {"tags": "t"}}, {"k": 1, "": [], "\ud83d": None}])
def test_more_parts_than_records(tmp_path, by, records):
    """Parts without records are files without records, and can be joined."""
    (tmp_path / "meta.json").write_text(json.dumps(records))
    done = run("split", "meta.json", "-n", "7", "-o", "parts", "--by", by, cwd=tmp_path)
    files = sorted((tmp_path / "parts").iterdir())
    assert len(files) == 7
    assert f"all parts {len(records)}" in " ".join(done.out.decode().split())
    run("join", "-o", "out.json", *files, cwd=tmp_path)
    assert json.loads((tmp_path / "out.json").read_text()) == records


def test_empty_parts_of_lines_are_joined(tmp_path):
    """A part of JSON lines without records is an empty file."""
    (tmp_path / "meta.jsonl").write_bytes(as_jsonl({"k": {"tags": "t"}}))
    run("split", "meta.jsonl", "-n", "3", "-o", "parts", cwd=tmp_path)
    files = sorted((tmp_path / "parts").iterdir())
    assert [file.stat().st_size > 0 for file in files] == [True, False, False]
    run("join", "-o", "out.jsonl", *files, cwd=tmp_path)
    assert (tmp_path / "out.jsonl").read_bytes() == (tmp_path / "meta.jsonl").read_bytes()


def test_equal_keys_are_in_one_part_by_hash(tmp_path):
    """A key has one part in every file, so both records of an equal key are there, in order."""
    (tmp_path / "meta.json").write_text('{"k": 1, "l": 2, "\\u006b": 3}')
    run("split", "meta.json", "-n", "9", "-o", "parts", "--by", "hash", cwd=tmp_path)
    texts = [path.read_text() for path in (tmp_path / "parts").iterdir()]
    assert [text for text in texts if '"k"' in text] == ['{\n  "k": 1,\n  "\\u006b": 3\n}']


def test_only_a_split_is_replaced(tmp_path):
    """A folder with anything else in it stays as it is, also with --force."""
    (tmp_path / "meta.json").write_text('{"k": 1}')
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("keep")
    words = ("split", "meta.json", "-n", "2")
    for name, message in (
        ("mine", "holds notes.txt"),
        ("meta.json", "found a file"),
        ("no/x", "no folder"),
    ):
        assert message in run(*words, "-o", name, "--force", cwd=tmp_path, fails=2).err
    run(*words, "-o", "parts", cwd=tmp_path)
    assert "an earlier split" in run(*words, "-o", "parts", cwd=tmp_path, fails=2).err
    run("split", "meta.json", "-n", "1", "-o", "parts", "--force", cwd=tmp_path)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["part-00000.json"]
    own = ("split", "parts/part-00000.json", "-n", "2", "-o", "parts", "--force")
    assert "the source is in this folder" in run(*own, cwd=tmp_path, fails=2).err


def test_an_error_leaves_no_folder(tmp_path):
    """A broken source is told with its place, and nothing appears beside it."""
    (tmp_path / "meta.json").write_bytes(as_indent_2(MANY)[:-300])
    for by in ("count", "bytes", "hash"):
        done = run(
            "split", "meta.json", "-n", "2", "-o", "parts", "--by", by, cwd=tmp_path, fails=1
        )
        assert "the file ends" in done.err
    assert [path.name for path in tmp_path.iterdir()] == ["meta.json"]


def test_a_split_by_hash_has_a_limit(tmp_path):
    """All of its files are open at once, which a message says."""
    (tmp_path / "meta.json").write_text("{}")
    done = run("split", "meta.json", "-n", "501", "-o", "p", "--by", "hash", cwd=tmp_path, fails=2)
    assert "at most 500 parts" in done.err
