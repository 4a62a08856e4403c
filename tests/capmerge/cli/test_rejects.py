import json
import re

from builders.commands import UNMERGEABLE, assert_safe
from builders.metadata import as_indent_2, assert_rewritten, read_jsonl, run


def test_a_record_that_cannot_be_merged_stops_the_run(unmergeable):
    """By default the first such record is an error with place and next step; no file is written."""
    error = run("rewrite", unmergeable, fails=1).err
    offset = unmergeable.read_bytes().index(b'"b"')
    assert error == (
        f'capmerge: {unmergeable}, byte {offset}, record "b": "caption" is a list, '
        "expected a string. "
        "Use --lists to read a list of strings as alternatives or tags, or use --on-error skip to "
        "leave such records out and list them.\n"
    )
    assert [path.name for path in unmergeable.parent.iterdir()] == [unmergeable.name]


def test_skipped_records_are_listed_whole(unmergeable):
    """--on-error skip lists these in OUT.rejects.jsonl with key, reason and record."""
    out = unmergeable.with_name("out.json")
    table = run("rewrite", unmergeable, "-o", out, "--on-error", "skip").out.decode()
    assert_rewritten({key: UNMERGEABLE[key] for key in ("a", "d")}, json.loads(out.read_bytes()))
    assert read_jsonl(unmergeable.with_name("out.json.rejects.jsonl")) == [
        {
            "key": "b",
            "reason": '"caption" is a list, expected a string.',
            "record": UNMERGEABLE["b"],
        },
        {"key": "c", "reason": "the record is a number, expected an object.", "record": 7},
    ]
    assert "2 records could not be merged" in table
    run("verify", unmergeable, out)


def test_what_cannot_be_merged(tmp_path):
    """Each kind of record that cannot be merged is listed with its problem."""
    kinds = {
        '"caption" is a list': {"caption": ["a"]},
        '"caption" is an object': {"caption": {"a": 1}},
        '"caption" is a number': {"caption": 5},
        '"caption" is true or false': {"caption": True},
        '"tags" is a list': {"tags": ["a"], "caption": "x"},
        '"tags" is a number': {"tags": 1.5},
        "the record is a list": [],
        "the record is a string": "text",
        "the record is null": None,
        '"capmerge_tags"': {"caption": "x", "capmerge_tags": []},
        '"capmerge_weights"': {"caption": "x", "capmerge_weights": []},
    }
    path, out = tmp_path / "m.json", tmp_path / "o.json"
    path.write_bytes(as_indent_2({"first": {"caption": "x"}, **kinds, "last": {"tags": "y"}}))
    run("rewrite", path, "-o", out, "--on-error", "skip")
    assert list(json.loads(out.read_bytes())) == ["first", "last"]
    for (reason, record), entry in zip(
        kinds.items(), read_jsonl(tmp_path / "o.json.rejects.jsonl"), strict=True
    ):
        assert entry["key"] == reason
        assert reason in entry["reason"]
        assert entry["record"] == record


def test_strays_among_json_lines(tmp_path):
    """A line of JSONL that is no object or has no image_path stops the run, or is listed whole."""
    path, out = tmp_path / "m.jsonl", tmp_path / "o.jsonl"
    strays = [{"caption": "no key"}, [1, "x"], 7, None, {"image_path": 5, "caption": "x"}]
    lines = [
        json.dumps({"image_path": "a", "caption": "x"}),
        *map(json.dumps, strays),
        json.dumps({"image_path": "b", "tags": "y"}),
    ]
    path.write_text("\n".join(lines))
    error = run("rewrite", path, "-o", out, fails=1).err
    assert f"m.jsonl, byte {len(lines[0]) + 1}: " in error
    assert '"image_path"' in error
    run("rewrite", path, "-o", out, "--on-error", "skip")
    assert [record["image_path"] for record in read_jsonl(out)] == ["a", "b"]
    rejects = read_jsonl(tmp_path / "o.jsonl.rejects.jsonl")
    assert [entry["record"] for entry in rejects] == strays
    assert all(entry["key"] == "" and entry["reason"] for entry in rejects)
    run("verify", path, out)


def test_rejects_of_standard_output_go_to_standard_error(unmergeable):
    """With `-o -` there is no file for rejects: each is a line on standard error."""
    done = run("rewrite", unmergeable, "-o", "-", "--on-error", "skip", "--quiet")
    assert list(json.loads(done.out)) == ["a", "d"]
    assert done.err.count('"reason"') == 2
    assert [path.name for path in unmergeable.parent.iterdir()] == [unmergeable.name]


def test_rejects_on_standard_error_are_json_lines(unmergeable):
    """Each line on standard error is JSON of the reject, and no character acts on a terminal."""
    done = run("rewrite", unmergeable, "-o", "-", "--on-error", "skip", "--quiet")
    assert_safe(done.err)
    assert [json.loads(line)["record"] for line in done.err.splitlines()] == [
        UNMERGEABLE["b"],
        UNMERGEABLE["c"],
    ]


def test_a_rewritten_source_is_refused(source):
    """A rewritten file is refused, with --on-error skip too, as its braces would be doubled."""
    once, twice = source.with_name("once.json"), source.with_name("twice.json")
    run("rewrite", source, "-o", once)
    for options in ([], ["--on-error", "skip"]):
        error = run("rewrite", once, "-o", twice, *options, fails=1).err
        assert 'byte 4, record "danbooru/1"' in error
        assert "rewritten already" in error
        assert "--allow-rewritten" in error
    assert not twice.exists()


def test_allow_rewritten_passes_records_through(source):
    """--allow-rewritten leaves marked records as they are, rewrites the others, and counts both."""
    once, mixed, twice = (source.with_name(f"{name}.json") for name in ("once", "mixed", "twice"))
    run("rewrite", source, "-o", once)
    run("rewrite", once, "-o", twice, "--allow-rewritten", "--layout", "concat")
    assert twice.read_bytes() == once.read_bytes()
    records = json.loads(once.read_bytes())
    mixed.write_bytes(as_indent_2({**records, "new": {"tags": "a", "caption": "b"}}))
    done = run("rewrite", mixed, "-o", twice, "--allow-rewritten", "--force")
    assert json.loads(twice.read_bytes()) == {
        **records,
        "new": {"caption": "a\nb", "capmerge": "tc"},
    }
    assert re.search(r"passed through +3\b", done.out.decode())
    assert re.search(r"already rewritten.* 3\b", run("verify", mixed, twice).out.decode())
