"""`convert` writes the same records in any format, and every command reads them there."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from builders.metadata import LAYOUTS, as_indent_2, as_jsonl, make_records, run, run_shell
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.commands.convert import ConvertOptions, choose_format, convert
from capmerge.metadata.opened import open_metadata

FORMATS = ["json", "jsonl", "json.gz", "jsonl.gz", "json.zst", "jsonl.zst", "parquet"]
RECORDS = make_records(40)
NAMES = st.sampled_from(["caption", "tags", "train_resolution", "image_size", "capmerge", "", "x"])
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(1 << 70), 1 << 70)
    | st.floats()
    | st.text(st.characters(), max_size=6)
    | st.sampled_from(["}, {", '"},\n"', "\\", "\ud83d", "1girl, solo"])
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(NAMES, SCALARS, max_size=3)
OBJECTS = st.dictionaries(NAMES, VALUES, max_size=5)
KEYS = st.sampled_from(["a", "b", "", "\udcff", "a/ü.png"]) | st.text(st.characters(), max_size=4)


def names(folder: Path) -> list[str]:
    """The names of all files in a folder."""
    return sorted(path.name for path in folder.iterdir())


def converted(source: Path, target: Path, jobs: int = 1):
    """The counts of a conversion in this process."""
    with open_metadata(str(source)) as opened:
        return convert(opened, ConvertOptions(target, choose_format(None, target), jobs))


def members(pairs) -> str:
    """A JSON object with these members, equal keys included."""
    return f"{{{', '.join(f'{json.dumps(key)}: {json.dumps(value)}' for key, value in pairs)}}}"


@settings(max_examples=60)
@given(
    st.lists(st.tuples(KEYS, OBJECTS | VALUES), max_size=8),
    st.lists(st.sampled_from(FORMATS), max_size=3),
)
def test_any_way_through_the_formats_loses_nothing(tmp_path_factory, pairs, way):
    """JSON comes back to the byte: integers of any size, NaN, lone surrogates, equal keys, order.

    Where JSON lines are on the way, the records are objects: others are refused.
    """
    folder = tmp_path_factory.mktemp("way")
    if any("jsonl" in name for name in way):
        pairs = [(key, value if isinstance(value, dict) else {"x": value}) for key, value in pairs]
    (folder / "m.json").write_text(members(pairs))
    converted(folder / "m.json", folder / "expected.json")
    source = folder / "m.json"
    for number, name in enumerate([*way, "json"]):
        target = folder / f"{number}.{name}"
        done = converted(source, target)
        assert done.records == len(pairs)
        source = target
    assert source.read_bytes() == (folder / "expected.json").read_bytes()
    # And what the first conversion wrote is what was given, value by value.
    read = json.loads(source.read_bytes(), object_pairs_hook=lambda found: found)
    wanted = json.loads(members(pairs), object_pairs_hook=lambda found: found)
    assert json.dumps(read) == json.dumps(wanted)


@pytest.mark.parametrize(
    ("layout", "name"),
    [*(("compact", name) for name in FORMATS), *((layout, "parquet") for layout in LAYOUTS)],
)
def test_the_command_in_every_format(tmp_path, layout, name):
    """Any layout becomes any format and back, with the number of records told."""
    (tmp_path / "m").write_bytes(LAYOUTS[layout](RECORDS))
    told = run("convert", "m", "-o", f"out.{name}", cwd=tmp_path).out.decode()
    assert told.splitlines()[0].split() == ["records", str(len(RECORDS))]
    run("convert", f"out.{name}", "-o", "back.json", "--quiet", cwd=tmp_path)
    back = json.loads((tmp_path / "back.json").read_bytes())
    assert json.dumps(back) == json.dumps(RECORDS)
    standard = run("convert", "m", "-o", "-", "--format", name, cwd=tmp_path).out
    assert standard == (tmp_path / f"out.{name}").read_bytes()


def test_equal_keys_and_doubled_fields_are_told(tmp_path):
    """Equal keys are all kept; of a doubled field the last counts, and both are told."""
    text = '{"a": {"tags": "1"}, "a": {"tags": "2"}, "b": {"tags": "3", "tags": "4", "n": 1}}'
    (tmp_path / "m.json").write_text(text)
    told = run("convert", "m.json", "-o", "m.parquet", cwd=tmp_path).out.decode()
    assert "1 record has a key that occurs again further on" in told
    assert "1 record has the same field more than once" in told
    run("convert", "m.parquet", "-o", "m.jsonl", cwd=tmp_path)
    lines = [json.loads(line) for line in (tmp_path / "m.jsonl").read_bytes().splitlines()]
    assert lines == [
        {"image_path": "a", "tags": "1"},
        {"image_path": "a", "tags": "2"},
        {"image_path": "b", "tags": "4", "n": 1},
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"a": {}, "b": 5}', 'byte 10, record "b": the record is no object'),
        ('{"a": {"image_path": "x"}}', 'byte 1, record "a": the record has a field "image_path"'),
        ('{"image_path": "a"}\n{"tags": "x"}\n', 'byte 20: the line has no "image_path"'),
        ('{"a": {}, "b": {"x": }}', "byte 21"),
        ("[]", "the top level is an array"),
    ],
)
def test_what_json_lines_cannot_hold_is_an_error(tmp_path, text, message):
    """A record that is no object, or has a field image_path, is named; nothing is written."""
    (tmp_path / "m.json").write_text(text)
    error = run("convert", "m.json", "-o", "out.jsonl", cwd=tmp_path, fails=1).err
    assert message in error
    assert names(tmp_path) == ["m.json"]
    if 'image_path": "x' in text or "5" in text:
        run("convert", "m.json", "-o", "out.parquet", cwd=tmp_path)
        run("convert", "out.parquet", "-o", "out.json", cwd=tmp_path)
        assert json.loads((tmp_path / "out.json").read_bytes()) == json.loads(text)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["-o", "out"], "found no ending that tells the format"),
        (["-o", "-"], "found no ending that tells the format"),
        (["-o", "x.parquet", "--format", "json"], "Name the output *.json"),
        (["-o", "x.json", "--format", "parquet"], "Name the output *.parquet"),
        (["-o", "x.json.zst", "--format", "parquet"], "Name the output *.parquet"),
        (["-o", "x.json", "--format", "jsonl.zst"], "Name the output *.jsonl.zst"),
        (["-o", "m.json"], "the output is the source itself"),
        (["-o", "old.json"], "Use --force"),
    ],
)
def test_outputs_that_are_refused(tmp_path, arguments, message):
    """The message says what the name or the option should be."""
    (tmp_path / "m.json").write_bytes(as_indent_2(RECORDS))
    (tmp_path / "old.json").write_text("old")
    assert message in run("convert", "m.json", *arguments, cwd=tmp_path, fails=2).err
    assert names(tmp_path) == ["m.json", "old.json"]
    assert (tmp_path / "old.json").read_text() == "old"


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Metadata of several blocks, with records that look like others, as JSON and as Parquet."""
    folder = tmp_path_factory.mktemp("large")
    records = {}
    for number, (key, record) in enumerate(make_records(6000).items()):
        nested = {f"x{n}": {"caption": key} for n in (1, 2)}
        records[f"{key}/{number}"] = {**record, "nested": nested}
    (folder / "m0.json").write_bytes(as_indent_2(records))
    run("convert", "m0.json", "-o", "m.json", cwd=folder)  # raw UTF-8
    run("convert", "m.json", "-o", "m.parquet", "-j", "1", cwd=folder)
    assert (folder / "m.json").stat().st_size > 3 << 20
    return folder


def test_any_number_of_workers_gives_the_same_bytes(large, tmp_path):
    """Parquet, and what is made of Parquet, do not depend on the workers or on how it is read."""
    for jobs in ("1", "3"):
        for source in ("m.json", "m.parquet"):
            out = tmp_path / f"{source}{jobs}.json"
            run("convert", source, "-o", out, "-j", jobs, cwd=large)
            assert out.read_bytes() == (large / "m.json").read_bytes()
            run(
                "rewrite",
                source,
                "-o",
                tmp_path / f"{source}{jobs}.out.json",
                "-j",
                jobs,
                cwd=large,
            )
    outputs = {path.read_bytes() for path in tmp_path.glob("*.out.json")}
    assert len(outputs) == 1
    run("convert", "m.json", "-o", tmp_path / "3.parquet", "-j", "3", cwd=large)
    assert (tmp_path / "3.parquet").read_bytes() == (large / "m.parquet").read_bytes()


def test_every_command_reads_parquet(large, tmp_path):
    """rewrite, verify, stats and preview take Parquet as they take JSON, and tell the same."""
    out = tmp_path / "out.json"
    run("rewrite", large / "m.parquet", "-o", out, "--stats", "--index")
    told = run("verify", large / "m.parquet", out, "-j", "2").out
    assert told == run("verify", large / "m.json", out).out
    documents = []
    for name in ("m.json", "m.parquet"):
        run("stats", large / name, "-o", tmp_path / f"{name}.stats.json")
        document = json.loads((tmp_path / f"{name}.stats.json").read_bytes())
        del document["source"], document["duplicates"]["largest"]
        documents.append(document)
    assert documents[0] == documents[1]
    for way in (["-n", "2"], ["--random", "2"], ["--longest", "2"]):
        shown = [
            run("preview", large / name, *way, "--quiet").out.decode()
            for name in ("m.json", "m.parquet")
        ]
        assert shown[0].replace("m.json", "") == shown[1].replace("m.parquet", "")


def test_verify_reads_a_converted_output(tmp_path):
    """An output that was converted is proven too, as the source may be."""
    (tmp_path / "m.json").write_bytes(as_jsonl(RECORDS))
    run("rewrite", "m.json", "-o", "o.json", cwd=tmp_path)
    run("convert", "o.json", "-o", "o.parquet", cwd=tmp_path)
    told = run("verify", "m.json", "o.parquet", "--layout", "lines", cwd=tmp_path).out
    assert told.startswith(f"verified: {len(RECORDS)} records".encode())


def test_a_difference_in_parquet_names_the_row(tmp_path):
    """What verify and a rewrite find wrong with a record of Parquet is told by its row."""
    records = {f"k{n}": {"tags": str(n), "caption": "c"} for n in range(3000)}
    (tmp_path / "m.json").write_bytes(as_indent_2(records))
    run("rewrite", "m.json", "-o", "o.json", cwd=tmp_path)
    records["k2500"]["tags"] = 5
    (tmp_path / "m.json").write_bytes(as_indent_2(records))
    run("convert", "m.json", "-o", "m.parquet", cwd=tmp_path)
    for jobs in ("1", "2"):
        error = run("rewrite", "m.parquet", "-o", "x.json", "-j", jobs, cwd=tmp_path, fails=1).err
        assert error.startswith('capmerge: m.parquet, row 2,501, record "k2500": ')
    rewritten = json.loads((tmp_path / "o.json").read_bytes())
    rewritten["k2000"]["caption"] += "!"
    (tmp_path / "o.json").write_bytes(as_indent_2(rewritten))
    run("convert", "o.json", "-o", "o.parquet", cwd=tmp_path)
    records["k2500"]["tags"] = "2500"
    (tmp_path / "m.json").write_bytes(as_indent_2(records))
    error = run("verify", "m.json", "o.parquet", "--layout", "lines", cwd=tmp_path, fails=1).err
    assert error.startswith('capmerge: o.parquet, row 2,001, record "k2000": ')


def table(path: Path, columns: dict, **options):
    """A Parquet file of another program."""
    pq.write_table(pa.table(columns), path, **options)
    return path


def test_tables_of_other_programs(tmp_path):
    """Every column is a field, of any type that JSON has; what is null is not there."""
    path = table(
        tmp_path / "m.parquet",
        {
            "image_path": pa.array(["a", "b", "c"]).dictionary_encode(),
            "tags": pa.array(["x", None, "ü"], pa.large_string()),
            "score": pa.array([0.5, float("nan"), None], pa.float32()),
            "size": pa.array([[1, 2], None, []], pa.list_(pa.uint64())),
            "image_size": pa.array([[1, None], [3], None], pa.list_(pa.int64())),
            "nested": [{"a": 1, "b": None}, None, {"a": 2, "b": ["x"]}],
            "ok": [True, None, False],
            "other_fields": [None, "kept", None],
        },
    )
    run("convert", path, "-o", tmp_path / "m.json")
    expected = {
        "a": {"tags": "x", "score": 0.5, "size": [1, 2], "image_size": [1, None]}
        | {"nested": {"a": 1, "b": None}, "ok": True},
        "b": {"score": float("nan"), "image_size": [3], "other_fields": "kept"},
        "c": {"tags": "ü", "size": [], "nested": {"a": 2, "b": ["x"]}, "ok": False},
    }
    assert json.dumps(json.loads((tmp_path / "m.json").read_bytes())) == json.dumps(expected)
    run("rewrite", path, "-o", tmp_path / "out.json")
    run("verify", path, tmp_path / "out.json")


def test_a_table_changed_by_another_program(tmp_path):
    """Columns may be dropped, added and set in another order; the rest is still understood."""
    (tmp_path / "m.json").write_text(
        '{"a": {"x": 1, "tags": "t", "caption": "c"}, "b": {"caption": "d"}, "c": 5}'
    )
    run("convert", "m.json", "-o", "m.parquet", cwd=tmp_path)
    read = pq.read_table(tmp_path / "m.parquet")
    changed = read.drop_columns(["tags", "capmerge"]).append_column("n", pa.array([1, 2, None]))
    pq.write_table(changed, tmp_path / "n.parquet")
    run("convert", "n.parquet", "-o", "n.json", cwd=tmp_path)
    found = json.loads((tmp_path / "n.json").read_bytes())
    assert json.dumps(found) == json.dumps(
        {"a": {"x": 1, "caption": "c", "n": 1}, "b": {"caption": "d", "n": 2}, "c": 5}
    )
    run("rewrite", "n.parquet", "-o", "o.json", "--on-error", "skip", cwd=tmp_path)
    run("verify", "n.parquet", "o.json", cwd=tmp_path)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"file_name": ["a"], "text": ["x"]}, 'no column "image_path" of strings among'),
        ({"image_path": [1]}, 'no column "image_path" of strings among'),
        ({"image_path": [None, None]}, 'no column "image_path" of strings among'),
        ({"image_path": ["a", None]}, 'row 2: the column "image_path" is null'),
        ({"image_path": ["a"], "png": [b"x"]}, '"png" is of the type binary'),
        ({"image_path": ["a"], "at": pa.array([1], pa.timestamp("ms"))}, "timestamp[ms]"),
        ({"image_path": ["a"], "l": pa.array([[b""]])}, '"l" is of the type list'),
    ],
)
def test_tables_that_are_no_metadata(tmp_path, columns, message):
    """The message names the column, or the row, and what to do about it."""
    table(tmp_path / "m.parquet", columns)
    for command in (["convert"], ["rewrite"]):
        error = run(*command, "m.parquet", "-o", "o.json", cwd=tmp_path, fails=1).err
        assert error.startswith("capmerge: m.parquet: ")
        assert message in error
    assert names(tmp_path) == ["m.parquet"]
    run("rewrite", "-", "-o", "o.json", stdin=b"{}", cwd=tmp_path)
    error = run("verify", "m.parquet", "o.json", cwd=tmp_path, fails=1).err
    assert error.startswith("capmerge: m.parquet")


def _marked(column: str, text: str):
    def spoil(path):
        read = pq.read_table(path)
        number = read.schema.names.index(column)
        values = [text, *read.column(column).to_pylist()[1:]]
        pq.write_table(read.set_column(number, column, pa.array(values)), path)

    return spoil


def _bytes(change):
    return lambda path: path.write_bytes(change(path.read_bytes()))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_bytes(lambda data: data[:-5]), "the Parquet data is broken"),
        (_bytes(lambda data: data[: len(data) // 2]), "the Parquet data is broken"),
        (_bytes(lambda data: data[:4]), "the Parquet data is broken"),
        (_bytes(lambda data: data[:40] + bytes(400) + data[440:]), "the Parquet data is broken"),
        (_bytes(lambda data: data + b"x"), "the Parquet data is broken"),
        (_marked("other_fields", "{"), 'the column "other_fields" holds no JSON'),
        (_marked("other_fields", "[1]"), 'the column "other_fields" holds no JSON object'),
        (_marked("other_fields", '{"a": 1}, "b": {"c": 2}'), "holds no JSON"),
        (_marked("other_fields", "[" * 5000), "holds no JSON"),
        (_marked("exact", "x"), 'the column "exact" holds no JSON'),
        (_marked("exact", "[]"), 'the column "exact" holds no JSON object'),
        (_marked("exact", '{"order": [1]}'), 'the column "exact" holds no order'),
        (_marked("exact", '{"key": 1}'), 'the column "image_path" is null'),
    ],
)
def test_damaged_parquet(tmp_path, spoil, message):
    """Damage is one clear error, wherever it is, and nothing is written."""
    (tmp_path / "m.json").write_bytes(as_indent_2(RECORDS))
    run("convert", "m.json", "-o", "m.parquet", cwd=tmp_path)
    run("rewrite", "m.json", "-o", "r.json", cwd=tmp_path)
    spoil(tmp_path / "m.parquet")
    before = names(tmp_path)
    error = run("convert", "m.parquet", "-o", "o.json", cwd=tmp_path, fails=1).err
    assert error.startswith("capmerge: m.parquet: ")
    assert message in error
    assert "again" in error
    assert names(tmp_path) == before
    error = run("verify", "m.parquet", "r.json", cwd=tmp_path, fails=1).err
    assert error.startswith("capmerge: ")


@pytest.mark.skipif(sys.platform == "win32", reason="the test is written for bash")
def test_parquet_needs_a_file(tmp_path):
    """A pipe and a compressed file have no end to begin at, and the message says so."""
    (tmp_path / "m.json").write_bytes(as_indent_2(RECORDS))
    run("convert", "m.json", "-o", "m.parquet", cwd=tmp_path)
    for script in (
        "CAPMERGE convert - -o o.json < m.parquet",
        "cat m.parquet | CAPMERGE rewrite - -o -",
        "gzip m.parquet; CAPMERGE convert m.parquet.gz -o o.json",
    ):
        done = run_shell(script, cwd=tmp_path)
        assert done.code == 1
        assert "found Parquet in a pipe or a compressed file" in done.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a disk that is full")
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_full_disk_is_one_message(large, jobs):
    """Parquet that cannot be written is an error without a word of the library."""
    script = f"CAPMERGE convert m.json -o - --format parquet -j {jobs} > /dev/full"
    done = run_shell(script, cwd=large)
    assert done.code == 1
    assert done.err.splitlines() == [
        "capmerge: standard output: cannot write (No space left on device)."
    ]


def test_a_missing_pyarrow_is_named(tmp_path):
    """Without the extra, Parquet is refused with the command that installs it."""
    (tmp_path / "m.json").write_bytes(as_indent_2(RECORDS))
    (tmp_path / "pyarrow").mkdir()
    (tmp_path / "pyarrow" / "__init__.py").write_text("raise ImportError('none here')")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "capmerge", "convert", "m.json", "-o", "m.parquet"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    assert "pip install 'capmerge[parquet]'" in done.stderr
    assert "Traceback" not in done.stderr
