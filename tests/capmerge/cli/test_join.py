"""Files are joined whole and field by field, in bounded memory and without a change to a value."""

import gzip
import json

import pytest
from builders.metadata import (
    LAYOUTS,
    as_indent_2,
    as_jsonl,
    make_records,
    read_jsonl,
    run,
    run_shell,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capmerge.commands.join import JoinOptions, join
from capmerge.errors import DataError
from capmerge.files.source import open_source
from capmerge.metadata import key_links

MANY = make_records(2500, nested=True)
"""Several blocks of records with all kinds of values."""


def write(path, records, layout="indent=2"):
    """The path of a new file with these records."""
    path.write_bytes(LAYOUTS[layout](records))
    return path


def parts_of(records, count):
    """The records in turn in `count` dicts."""
    items = list(records.items())
    return [dict(items[number::count]) for number in range(count)]


def counts(done):
    """The table that a command printed."""
    rows = (line.rsplit(maxsplit=1) for line in done.out.decode().splitlines())
    return {row[0].strip(): row[1] for row in rows if len(row) == 2}


def loaded(path):
    """The records of a file, with types and orders told apart."""
    if ".jsonl" in path.name:
        return repr([(line.pop("image_path"), line) for line in read_jsonl(path)])
    return repr(list(json.loads(path.read_bytes()).items()))


@pytest.mark.parametrize("out", ["out.json", "out.jsonl", "out.json.gz"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_records_of_all_files_come_in_their_order(tmp_path, layout, out):
    """Each value is as it was, in any layout and format, with the same bytes for any -j."""
    first, second = parts_of(MANY, 2)
    files = [
        write(tmp_path / "a.json", first, layout),
        write(tmp_path / "b.json", second, "indent=4"),
    ]
    written = []
    for jobs in ("1", "3"):
        run("join", "-o", tmp_path / out, *files, "--force", "-j", jobs)
        written.append((tmp_path / out).read_bytes())
    assert written[0] == written[1]
    if out.endswith(".gz"):
        (tmp_path / "out.json").write_bytes(gzip.decompress(written[0]))
        out = "out.json"
    assert loaded(tmp_path / out) == repr(list({**first, **second}.items()))


def test_sources_of_any_kind_are_joined(tmp_path):
    """A gzip file, JSON lines, a pipe and a plain file give one file."""
    parts = parts_of(MANY, 4)
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(as_indent_2(parts[0])))
    write(tmp_path / "b.jsonl", parts[1], "jsonl")
    write(tmp_path / "d.json", parts[3], "compact")
    done = run(
        "join", "-o", "out.json", "a.json.gz", "b.jsonl", "-", "d.json",
        cwd=tmp_path, stdin=as_jsonl(parts[2]),
    )  # fmt: skip
    assert loaded(tmp_path / "out.json") == repr([*(i for part in parts for i in part.items())])
    assert counts(done)["written"] == "2,500"
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "a.json.gz", "b.jsonl", "d.json", "out.json",
    ]  # fmt: skip


def test_prefixes_tell_keys_apart(tmp_path):
    """Equal keys of two data sets stay apart by prefixes, in JSON and in JSON lines."""
    records = {'a"\\é\ud83d': {"tags": "x"}, "": {"tags": "y"}, "1": 7}
    write(tmp_path / "a=b.json", records)
    write(tmp_path / "c.jsonl", {"1": {"tags": "z"}}, "jsonl")
    for out in ("out.json", "again.json"):
        run(
            "join", "-o", out, "a=b.json", "c.jsonl",
            "--key-prefix", 'dan="/=a=b.json', "--key-prefix", "é/=c.jsonl", cwd=tmp_path,
        )  # fmt: skip
    expected = {'dan="/' + key: record for key, record in records.items()}
    assert loaded(tmp_path / "out.json") == repr([*expected.items(), ("é/1", {"tags": "z"})])


def test_files_are_meant_as_they_were_named(tmp_path):
    """A prefix and a field belong to a file by any path of it, and to standard input by -."""
    write(tmp_path / "a.json", {"k": {"tags": "t", "caption": "old"}})
    run(
        "join", "-o", "out.json", "./a.json", "-", "--fields", "caption=-", "--fields",
        "tags=./a.json", "--key-prefix", "x/=./a.json", "--key-prefix", "x/=-",
        cwd=tmp_path, stdin=b'{"k": {"caption": "new", "tags": "old"}}',
    )  # fmt: skip
    assert loaded(tmp_path / "out.json") == repr([("x/k", {"tags": "t", "caption": "new"})])


def test_equal_records_are_written_once(tmp_path):
    """A record that several files or lines hold is no conflict, however it is spelled."""
    (tmp_path / "a.json").write_text(
        '{"k": {"a": 1, "b": [2, NaN]}, "l": 1, "\\u006b": {"b":[2,NaN],"a":1}}'
    )
    write(tmp_path / "b.jsonl", {"k": {"b": [2, float("nan")], "a": 1}}, "jsonl")
    done = run("join", "-o", "out.json", "a.json", "b.jsonl", cwd=tmp_path)
    assert (tmp_path / "out.json").read_text() == '{\n  "k": {"a": 1, "b": [2, NaN]},\n  "l": 1\n}'
    assert counts(done)["equal, written once"] == "2"


@pytest.mark.parametrize("other", ["1.0", "true", '"1"', "[1]", "{}"])
def test_records_that_differ_are_a_conflict(tmp_path, other):
    """By default a conflict ends the run; first and last keep one, in the place of the first."""
    (tmp_path / "a.json").write_text('{"k": 1, "l": 2}')
    (tmp_path / "b.json").write_text('{"x": 3, "k": ' + other + "}")
    done = run("join", "-o", "out.json", "a.json", "b.json", cwd=tmp_path, fails=1)
    assert 'b.json, byte 9, record "k": another record of a.json, at byte 1' in done.err
    assert not (tmp_path / "out.json").exists()
    for choice, kept in (("first", "1"), ("last", other)):
        run(
            "join",
            "-o",
            "out.json",
            "a.json",
            "b.json",
            "--on-conflict",
            choice,
            "--force",
            cwd=tmp_path,
        )
        assert (tmp_path / "out.json").read_text() == (
            '{\n  "k": ' + kept + ',\n  "l": 2,\n  "x": 3\n}'
        )


def test_equal_keys_of_one_file_are_as_json_reads_them(tmp_path):
    """With `last`, a join gives what json.load makes of a file with equal keys."""
    text = '{"k": 1, "l": 2, "k": 3, "m": 4, "\\u006b": 5}'
    (tmp_path / "a.json").write_text(text)
    assert (
        "another record, at byte 1, has the same key"
        in run("join", "-o", "out.json", "a.json", cwd=tmp_path, fails=1).err
    )
    done = run("join", "-o", "out.json", "a.json", "--on-conflict", "last", cwd=tmp_path)
    assert loaded(tmp_path / "out.json") == repr(list(json.loads(text).items()))
    assert counts(done)["given way to others"] == "2"


FIELDS = ("--fields", "tags=a.json", "--fields", "caption=b.json")


@pytest.mark.parametrize("jobs", ["1", "3"])
def test_fields_are_joined_by_key_in_any_order(tmp_path, jobs):
    """Fields come from their files, all others from any; what is missing is told and listed."""
    tagged = {
        key: {name: value for name, value in record.items() if name != "caption"}
        | {"caption": "old"}
        for key, record in list(MANY.items())[:-3]
    }
    captions = {
        key: {"tags": "old", "rating": number, "caption": record["caption"]}
        for number, (key, record) in reversed(list(enumerate(MANY.items())))
        if "caption" in record
    }
    write(tmp_path / "a.json", tagged)
    write(tmp_path / "b.json", captions, "jsonl")
    done = run(
        "join", "-o", "out.json", "a.json", "b.json", *FIELDS, "--missing", "m.jsonl", "-j", jobs,
        cwd=tmp_path,
    )  # fmt: skip
    expected, missing = {}, []
    for key in [*tagged, *(key for key in captions if key not in tagged)]:
        left, right = tagged.get(key, {}), captions.get(key, {})
        expected[key] = {name: value for name, value in left.items() if name != "caption"} | {
            name: value for name, value in right.items() if name != "tags"
        }
        lacks = [name for name, one in (("tags", left), ("caption", right)) if not one.get(name)]
        if lacks:
            missing.append({"key": key, "missing": lacks})
    assert loaded(tmp_path / "out.json") == repr(list(expected.items()))
    assert read_jsonl(tmp_path / "m.jsonl") == missing
    for name in ("tags", "caption"):
        lacking = sum(name in one["missing"] for one in missing)
        assert counts(done)[f"without {name}"] == str(lacking)
    absent = sum(key not in tagged for key in expected)
    assert f"note: {absent} of the records without tags have no record" in done.out.decode()


def test_other_fields_that_differ_are_a_conflict(tmp_path):
    """A field that no option gives to a file must be the same in all, or one of them is chosen."""
    write(tmp_path / "a.json", {"k": {"tags": "t", "rating": "s"}})
    write(tmp_path / "b.json", {"k": {"caption": "c", "rating": "e"}})
    words = ("join", "-o", "out.json", "a.json", "b.json", *FIELDS)
    done = run(*words, cwd=tmp_path, fails=1)
    assert 'the field "rating" is "e", but "s" in a.json.' in done.err
    assert "--fields rating=a.json" in done.err
    for extra, rating in (
        (("--on-conflict", "first"), "s"),
        (("--on-conflict", "last"), "e"),
        (("--fields", "rating=b.json"), "e"),
    ):
        run(*words, *extra, "--force", cwd=tmp_path)
        assert json.loads((tmp_path / "out.json").read_text())["k"]["rating"] == rating


def test_a_record_that_is_no_object_has_no_fields(tmp_path):
    """Such a record is an error where fields are joined, with its place."""
    write(tmp_path / "a.json", {"k": {"tags": "t"}})
    (tmp_path / "b.json").write_text('{"j": {}, "k": [1]}')
    done = run("join", "-o", "out.json", "a.json", "b.json", *FIELDS, cwd=tmp_path, fails=1)
    assert 'b.json, byte 10, record "k": the record is not an object' in done.err


@pytest.fixture
def rewritten(tmp_path):
    """A folder with metadata and their rewrite, whose records have fields of all kinds."""
    write(tmp_path / "meta.json", {"a": {"tags": "t, u", "caption": "c {d}."}, "b": {"tags": "v"}})
    run(
        "rewrite", "meta.json", "-o", "marked.json", "--weights", "field",
        "--line", "{tags}, {caption}=3", "--line", "{caption}", cwd=tmp_path,
    )  # fmt: skip
    write(tmp_path / "sizes.json", {"b": {"train_resolution": [64, 64]}, "a": {"caption": "old"}})
    return tmp_path


def test_the_mark_comes_with_the_caption(rewritten):
    """All fields of a rewrite travel with the caption, and stay behind all other fields."""
    run(
        "join", "-o", "out.json", "sizes.json", "marked.json", "--fields", "caption=marked.json",
        cwd=rewritten,
    )  # fmt: skip
    marked = json.loads((rewritten / "marked.json").read_text())
    out = json.loads((rewritten / "out.json").read_text())
    assert out == {"b": {"train_resolution": [64, 64], **marked["b"]}, "a": marked["a"]}
    assert list(out["b"])[-1] == "capmerge"
    # A second rewrite stops, as at the file itself.
    done = run("rewrite", "out.json", "-o", "again.json", cwd=rewritten, fails=1)
    assert "the record is rewritten already" in done.err


def test_the_mark_goes_with_its_caption(rewritten):
    """A record whose caption comes from an original file is not marked."""
    run(
        "join", "-o", "out.json", "marked.json", "meta.json", "--fields", "caption=meta.json",
        "--fields", "tags=meta.json", cwd=rewritten,
    )  # fmt: skip
    assert json.loads((rewritten / "out.json").read_text()) == {
        "a": {"tags": "t, u", "caption": "c {d}."},
        "b": {"tags": "v"},
    }


@pytest.mark.parametrize(
    "fields", [["tags=meta.json", "caption=marked.json"], ["caption=marked.json"]]
)
def test_tags_never_get_into_a_rewritten_record(rewritten, fields):
    """sd-scripts would add the tags to every line, so it is an error, with any --on-conflict."""
    options = [word for field in fields for word in ("--fields", field)]
    for choice in ("error", "first", "last"):
        done = run(
            "join", "-o", "out.json", "meta.json", "marked.json", *options, "--on-conflict", choice,
            cwd=rewritten, fails=1,
        )  # fmt: skip
        assert "meta.json, byte" in done.err
        assert "found tags for a record that is rewritten already" in done.err


def test_equal_captions_differ_if_one_is_rewritten(tmp_path):
    """The mark is never lost because another file has the same caption without it."""
    write(tmp_path / "a.json", {"k": {"caption": "{{x}}", "tags": "t"}})
    write(tmp_path / "b.json", {"k": {"caption": "{{x}}", "capmerge": "c"}})
    words = ("join", "-o", "out.json", "a.json", "b.json", "--fields", "rating=b.json")
    assert (
        'the field "caption" is {"caption": "{{x}}", "capmerge": "c"}, but'
        in run(*words, cwd=tmp_path, fails=1).err
    )


def test_whole_marked_records_keep_their_mark(rewritten):
    """A join of whole records copies rewritten ones, also with a prefix for `danbooru/1.npz`."""
    run(
        "join", "-o", "out.json", "marked.json", "--key-prefix", "danbooru/=marked.json",
        cwd=rewritten,
    )  # fmt: skip
    marked = json.loads((rewritten / "marked.json").read_text())
    out = json.loads((rewritten / "out.json").read_text())
    assert out == {f"danbooru/{key}": record for key, record in marked.items()}
    (rewritten / "latents" / "danbooru").mkdir(parents=True)
    (rewritten / "latents" / "danbooru" / "a.npz").write_bytes(b"")
    run("filter", "out.json", "-o", "kept.json", "--latents", "latents", cwd=rewritten)
    assert json.loads((rewritten / "kept.json").read_text()) == {"danbooru/a": marked["a"]}
    assert (
        "rewritten already"
        in run("rewrite", "kept.json", "-o", "x.json", cwd=rewritten, fails=1).err
    )


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2)
    ),
    max_leaves=4,
)
KEYS = st.text('ab\ud83d\n"', max_size=2)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    files=st.lists(st.dictionaries(KEYS, VALUES, max_size=5), min_size=1, max_size=3),
    choice=st.sampled_from(["error", "first", "last"]),
    parts=st.integers(1, 3),
)
def test_a_join_is_that_of_dicts(tmp_path, monkeypatch, files, choice, parts):
    """Any values and keys come out as dicts give them, however the keys are divided."""
    monkeypatch.setattr(key_links, "_KEYS_AT_ONCE", max(1, sum(map(len, files)) // parts))
    expected: dict = {}
    conflict = False
    for records in files:
        for key, value in records.items():
            text = json.dumps(value, sort_keys=True)
            conflict |= key in expected and json.dumps(expected[key], sort_keys=True) != text
            if key not in expected or choice == "last":
                expected[key] = value
    paths = [tmp_path / f"{number}.json" for number in range(len(files))]
    for path, records in zip(paths, files, strict=True):
        path.write_text(json.dumps(records, indent=2))
    sources = [open_source(str(path)) for path in paths]
    options = JoinOptions(tmp_path / "out.json", on_conflict=choice, force=True)
    try:
        if conflict and choice == "error":
            with pytest.raises(DataError, match="has the same key and differs"):
                join(sources, options)
        else:
            join(sources, options)
            assert loaded(tmp_path / "out.json") == repr(list(expected.items()))
    finally:
        for source in sources:
            source.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--missing", "m.jsonl"], "Give --fields too"),
        (["--fields", "tags=c.json"], "FILE is one of the files to join: a.json, b.json"),
        (["--fields", "tags"], "expected TEXT=FILE"),
        (["--fields", "tags=a.json", "--fields", "tags=b.json"], "tags is given twice"),
        (["--fields", "capmerge=a.json"], "come with the caption"),
        (["--key-prefix", "x=a.json", "--key-prefix", "y=a.json"], "a.json is given twice"),
        (["a.json"], "the file is given twice"),
        (["--fields", "tags=a.json", "--missing", "out.json"], "have one name"),
        (["-o", "-"], "`capmerge convert FILE -o -"),
        (["-o", "out.parquet"], "found the ending of Parquet"),
        (["--fields", "tags=a.json", "--missing", "a.json", "--force"], "the source itself"),
    ],
)  # fmt: skip
def test_options_that_cannot_be_meant_are_refused(tmp_path, options, message):
    """Each mistake of the command line has a message that says what to do."""
    write(tmp_path / "a.json", {})
    write(tmp_path / "b.json", {})
    done = run("join", "-o", "out.json", "a.json", "b.json", *options, cwd=tmp_path, fails=2)
    assert message in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_lines_hold_objects_with_a_key_of_their_own(tmp_path):
    """What a line of JSONL cannot hold is refused where JSON becomes JSON lines."""
    for value, message in (
        ("1", "is not an object"),
        ('{"image_path": 1}', 'found a field "image_path"'),
    ):
        (tmp_path / "a.json").write_text('{"k": ' + value + "}")
        assert message in run("join", "-o", "out.jsonl", "a.json", cwd=tmp_path, fails=1).err


def test_a_line_that_is_no_record_ends_the_run(tmp_path):
    """A stray line has no key to join by; it is told with its place."""
    (tmp_path / "a.jsonl").write_text('{"image_path": "k"}\n\n[1]\n')
    done = run("join", "-o", "out.jsonl", "a.jsonl", cwd=tmp_path, fails=1)
    assert "a.jsonl, byte 21: the line is not an object" in done.err


def test_nothing_is_left_of_a_run_that_is_killed(tmp_path):
    """The next run takes over what a killed one left, and no output is half there."""
    write(tmp_path / "a.json", MANY)
    run_shell('cd "$1"; CAPMERGE join -o out.json a.json & sleep 0.6; kill -9 $!; wait', tmp_path)
    assert not (tmp_path / "out.json").exists() or loaded(tmp_path / "out.json")
    run("join", "-o", "out.json", "a.json", "--force", cwd=tmp_path)
    assert loaded(tmp_path / "out.json") == repr(list(MANY.items()))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "out.json"]


def test_more_files_than_a_process_may_open(tmp_path):
    """The limit that a shell sets is raised."""
    records = make_records(60)
    write(tmp_path / "m.json", records)
    done = run_shell(
        "ulimit -S -n 64; CAPMERGE split m.json -n 60 --by hash -o parts --quiet && "
        "CAPMERGE join -o all.json parts/*.json --quiet",
        cwd=tmp_path,
    )
    assert done.code == 0, done.err
    assert sorted(json.loads((tmp_path / "all.json").read_bytes())) == sorted(records)
