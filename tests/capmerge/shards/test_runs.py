"""Runs over 16 shards: the outputs are those of one file, and a second run does what is missing."""

import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import zlib

import psutil
import pytest
from builders.metadata import COMMAND, as_indent_2, as_jsonl, make_records, run, wait_until
from builders.shards import (
    RECORDS,
    SHARDS,
    joined_outputs,
    make_shards,
    manifest,
    parts,
    shard_name,
)

from capmerge.files.compression import compress


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with shards, the same in one file, and what a rewrite makes of that."""
    folder = tmp_path_factory.mktemp("shards")
    make_shards(folder)
    run("rewrite", "joined.jsonl", "-o", "one.jsonl", "--stats", cwd=folder)
    return folder


@pytest.mark.parametrize(
    ("tasks", "jobs", "engine"),
    [(1, 1, "local"), (4, 2, "local"), (16, 3, "local"), (4, 2, "datatrove")],
)
def test_outputs_and_counts_are_those_of_one_file(folder, tmp_path, tasks, jobs, engine):
    """The bytes, the counts and the statistics are those of a rewrite of all shards in one file."""
    out = tmp_path / "out"
    words = ["--tasks", str(tasks), "-j", str(jobs), "--engine", engine]
    done = run("rewrite", folder / "shards", "-o", out, "--stats", *words)
    assert joined_outputs(out) == (folder / "one.jsonl").read_bytes()

    single = json.loads((folder / "one.jsonl.capmerge.json").read_bytes())
    found = manifest(out)
    assert found["counts"] == single["counts"]
    assert len(found["shards"]) == SHARDS
    for shard in found["shards"]:
        content = (out / shard["name"]).read_bytes()
        crc = f"{zlib.crc32(content):08x}"
        assert shard["output"] == {"bytes": len(content), "crc32": crc}

    expected = json.loads((folder / "one.stats.json").read_bytes())
    document = json.loads((out / "stats.json").read_bytes())
    assert document == expected | {"source": "shards"}
    assert b"rewritten" in done.out


def test_tasks_of_a_job_array_run_apart(folder, tmp_path):
    """Tasks that run at the same time, each by a command of its own, do what one run does."""
    out = tmp_path / "out"
    words = ["rewrite", str(folder / "shards"), "-o", str(out), "--quiet", "--tasks", "3"]
    tasks = [subprocess.Popen([*COMMAND, *words, "--only-task", str(task)]) for task in range(3)]
    assert [task.wait(60) for task in tasks] == [0, 0, 0]
    assert joined_outputs(out) == (folder / "one.jsonl").read_bytes()
    assert "counts" not in manifest(out)
    run(*words)
    single = json.loads((folder / "one.jsonl.capmerge.json").read_bytes())
    assert manifest(out)["counts"] == single["counts"]
    assert "number from 0 to N - 1" in run(*words, "--only-task", "3", fails=2).err


def test_names_and_formats_are_kept(tmp_path):
    """JSON and JSON lines, compressed or not, in folders below; each output opens as its source."""
    shards = tmp_path / "shards"
    (shards / "below").mkdir(parents=True)
    data = [as_indent_2(part) for part in parts()[:3]]
    (shards / "a.json").write_bytes(data[0])
    (shards / "below" / "b.json.gz").write_bytes(gzip.compress(data[1]))
    (shards / "c.jsonl.zst").write_bytes(compress(as_jsonl(parts()[2]), "zst"))
    (shards / "notes.txt").write_text("no shard")
    (shards / ".hidden.json").write_text("{")
    run("rewrite", shards, "-o", tmp_path / "out", "-j", "1")
    names = ["a.json", "below/b.json.gz", "c.jsonl.zst"]
    assert [shard["name"] for shard in manifest(tmp_path / "out")["shards"]] == names
    for name in names:
        target = tmp_path / name.rpartition("/")[2]
        run("rewrite", shards / name, "-o", target)
        assert (tmp_path / "out" / name).read_bytes() == target.read_bytes()


def test_parquet_stays_parquet(tmp_path):
    """A Parquet shard becomes a Parquet output with the records of a rewrite of the same file."""
    shards = tmp_path / "shards"
    shards.mkdir()
    part = parts()[1]
    part["/odd"] = {"caption": "a", "image_path": "a field of that name"}
    (tmp_path / "a.json").write_bytes(as_indent_2(part))
    run("convert", tmp_path / "a.json", "-o", shards / "a.parquet")
    run("rewrite", shards, "-o", tmp_path / "out", "-j", "1")
    run("rewrite", shards / "a.parquet", "-o", tmp_path / "one.json")
    run("convert", tmp_path / "out" / "a.parquet", "-o", tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_bytes())
    assert found == json.loads((tmp_path / "one.json").read_bytes())
    assert not list((tmp_path / "out").glob(".*scratch"))


def test_a_second_run_does_only_what_is_missing(folder, tmp_path):
    """Only outputs without a mark, or that have changed their size, are written again."""
    out = tmp_path / "out"
    command = ["rewrite", folder / "shards", "-o", out, "-j", "1"]
    run(*command)
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*.jsonl")}
    whole = joined_outputs(out)
    (out / shard_name(3)).unlink()
    (out / shard_name(5)).write_bytes(b"cut")
    (out / ".capmerge" / "done" / f"{shard_name(7)}.json").unlink()
    done = run(*command)
    assert "13 of 16 shards are done already" in done.err
    changed = [path.name for path, time in before.items() if path.stat().st_mtime_ns != time]
    assert sorted(changed) == [shard_name(3), shard_name(5), shard_name(7)]
    assert joined_outputs(out) == whole


def test_changed_options_and_sources_are_refused_by_name(tmp_path):
    """A second run with other options or shards names both; --force begins anew."""
    shards, out = make_shards(tmp_path), tmp_path / "out"
    run("rewrite", shards, "-o", out, "-j", "1", "--quiet")
    (shards / shard_name(2)).write_bytes(as_jsonl(make_records(3, seed=9)))
    other = ["rewrite", shards, "-o", out, "-j", "1", "--prefix", "new, ", "--quiet"]
    done = run(*other, fails=2)
    assert 'options changed (prefix was "" and is "new, ")' in done.err
    assert f"shards changed ({shard_name(2)} had bytes " in done.err
    (shards / shard_name(2)).unlink()
    assert f"{shard_name(2)} is missing" in run(*other, fails=2).err
    run(*other, "--force")
    assert joined_outputs(out).count(b"new, ") >= len(RECORDS) - 40
    # Another shard is no difference.
    (shards / shard_name(2)).write_bytes(as_jsonl(make_records(3, seed=9)))
    run(*other)
    assert len(manifest(out)["shards"]) == SHARDS


@pytest.mark.parametrize("engine", ["local", "datatrove"])
def test_a_broken_shard_fails_alone(tmp_path, engine):
    """Its place is named and the exit code is 1; the others are done, and then only it is."""
    shards, out = make_shards(tmp_path), tmp_path / "out"
    good = (shards / shard_name(6)).read_bytes()
    half = good.index(b"\n", len(good) // 2) + 1
    (shards / shard_name(6)).write_bytes(good[:half] + b'{"image_path": "x", "caption": ]\n')
    command = ["rewrite", shards, "-o", out, "--tasks", "4", "-j", "2", "--engine", engine]
    done = run(*command, fails=1)
    assert f"{shards / shard_name(6)}, byte {half + 31:,}" in done.err
    assert "1 shard of 16 could not be rewritten" in done.err
    entries = {shard["name"]: shard for shard in manifest(out)["shards"]}
    assert [name for name in entries if not entries[name]["output"]] == [shard_name(6)]
    assert not (out / shard_name(6)).exists()
    if engine == "datatrove":
        completions = out / ".capmerge" / "logs" / "001" / "completions"
        assert len(list(completions.iterdir())) == 3  # not that of the task with the shard
        return
    (shards / shard_name(6)).write_bytes(good)
    assert "15 of 16 shards are done already" in run(*command).err
    run("rewrite", tmp_path / "joined.jsonl", "-o", tmp_path / "one.jsonl")
    assert joined_outputs(out) == (tmp_path / "one.jsonl").read_bytes()


def test_rejects_are_kept_beside_each_shard(tmp_path):
    """With --on-error skip each shard lists its own rejects, and the manifest counts them."""
    records = dict(RECORDS)
    keys = [list(part)[3] for part in parts()]
    for number in (1, 8):
        records[keys[number]] = {"caption": 7}
    shards, out = make_shards(tmp_path, records), tmp_path / "out"
    run("rewrite", shards, "-o", out, "-j", "2", "--on-error", "skip", "--stats")
    found = sorted(path.name for path in out.glob("*.rejects.jsonl"))
    assert found == [f"{shard_name(1)}.rejects.jsonl", f"{shard_name(8)}.rejects.jsonl"]
    assert json.loads((out / found[0]).read_bytes())["key"] == keys[1]
    assert manifest(out)["counts"]["rejected"] == 2
    run("rewrite", tmp_path / "joined.jsonl", "-o", tmp_path / "one.jsonl", "--on-error", "skip")
    assert joined_outputs(out) == (tmp_path / "one.jsonl").read_bytes()


def test_keys_in_several_shards_are_named(tmp_path):
    """Equal keys in different shards are counted and told with their shards, all records kept."""
    shards = make_shards(tmp_path)
    first, second = list(parts()[2])[4], next(iter(parts()[5]))
    for number, key in ((9, first), (14, first), (14, second)):
        with (shards / shard_name(number)).open("ab") as file:
            file.write(as_jsonl({key: {"caption": f"again in {number}"}}))
    with (shards / shard_name(11)).open("ab") as file:  # twice in one shard alone
        file.write(as_jsonl({list(parts()[11])[1]: {"caption": "twice"}}))
    out = tmp_path / "out"
    done = run("rewrite", shards, "-o", out, "-j", "2")
    found = manifest(out)
    assert found["counts"]["repeated_keys"] == 4
    assert found["keys_in_several_shards"] == {
        "keys": 2,
        "exact": True,
        "first": [
            {"key": first, "shards": [shard_name(2), shard_name(14)]},
            {"key": second, "shards": [shard_name(5), shard_name(14)]},
        ],
    }
    assert b"2 keys are in more than one shard" in done.out
    assert joined_outputs(out).count(b"again in") == 3


def test_a_record_longer_than_a_block(tmp_path):
    """A line longer than a block is rewritten; beyond --max-record its shard fails with its key."""
    shards = make_shards(tmp_path)
    long = {"long/one": {"caption": "word " * (3 << 18), "tags": "a"}}  # 3.75 MiB, a block is 1
    with (shards / shard_name(4)).open("ab") as file:
        file.write(as_jsonl(long))
    run("rewrite", shards, "-o", tmp_path / "out", "-j", "2")
    assert b"long/one" in (tmp_path / "out" / shard_name(4)).read_bytes()
    limit = ["--max-record", str(1 << 21)]
    done = run("rewrite", shards, "-o", tmp_path / "limited", "-j", "2", *limit, fails=1)
    assert shard_name(4) in done.err
    assert "long/one" in done.err
    assert len(list((tmp_path / "limited").glob("part-*.jsonl"))) == SHARDS - 1


def test_a_shard_without_records(tmp_path):
    """A file of JSON lines without a line is a shard like any other, and one of JSON is broken."""
    shards = make_shards(tmp_path)
    records = (tmp_path / "joined.jsonl").read_bytes().count(b"\n")
    (shards / "empty.jsonl").write_bytes(b"")
    (shards / "empty.jsonl.gz").write_bytes(gzip.compress(b""))
    run("rewrite", shards, "-o", tmp_path / "out", "--stats")
    assert (tmp_path / "out" / "empty.jsonl").read_bytes() == b""
    assert gzip.decompress((tmp_path / "out" / "empty.jsonl.gz").read_bytes()) == b""
    assert manifest(tmp_path / "out")["counts"]["records"] == records
    run("verify", shards / "empty.jsonl", tmp_path / "out" / "empty.jsonl")
    run("stats", shards / "empty.jsonl")
    (shards / "empty.json").write_bytes(b"")
    told = run("rewrite", shards, "-o", tmp_path / "out", "--stats", fails=1).err
    assert "empty.json, byte 0: the file is empty, expected a JSON object" in told


@pytest.mark.skipif(os.name == "nt", reason="the test kills by signals of POSIX")
@pytest.mark.parametrize("engine", ["local", "datatrove"])
def test_killed_half_way_and_run_again(tmp_path, engine):
    """After SIGKILL only the missing shards are rewritten, none twice, and nothing is lost."""
    shards = make_shards(tmp_path, make_records(SHARDS * 1500, exotic=False))
    out, marks = tmp_path / "out", tmp_path / "out" / ".capmerge" / "done"
    words = ["rewrite", shards, "-o", out, "--tasks", "16", "-j", "2", "--engine", engine]
    command = [*COMMAND, *map(str, words)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: marks.is_dir() and len(list(marks.glob("*.json"))) >= 3)
    started = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGKILL)
    process.wait()
    # All processes that it started end with it.
    assert not psutil.wait_procs(started, timeout=20)[1]
    done_before = {path.name.removesuffix(".json") for path in marks.glob("*.json")}
    assert 3 <= len(done_before) < SHARDS
    times = {name: (out / name).stat().st_mtime_ns for name in done_before}
    done = run(*words)
    assert f"{len(done_before)} of 16 shards are done already" in done.err
    assert times == {name: (out / name).stat().st_mtime_ns for name in done_before}
    run("rewrite", tmp_path / "joined.jsonl", "-o", tmp_path / "one.jsonl", "--quiet")
    assert joined_outputs(out) == (tmp_path / "one.jsonl").read_bytes()
    single = json.loads((tmp_path / "one.jsonl.capmerge.json").read_bytes())
    assert manifest(out)["counts"] == single["counts"]
    assert not list(out.glob(".*tmp"))


@pytest.mark.skipif(os.name == "nt", reason="the test sends signals of POSIX")
def test_ctrl_c_keeps_what_is_done(tmp_path):
    """Ctrl-C ends the run with exit code 130, and the shards that are done stay done."""
    shards = make_shards(tmp_path, make_records(SHARDS * 1500, exotic=False))
    out, marks = tmp_path / "out", tmp_path / "out" / ".capmerge" / "done"
    command = [*COMMAND, "rewrite", str(shards), "-o", str(out), "-j", "2", "--quiet"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: marks.is_dir() and len(list(marks.glob("*.json"))) >= 2)
    process.send_signal(signal.SIGINT)
    assert "the shards that are done are kept" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert not list(out.glob(".*tmp"))
    assert " of 16 shards are done already" in run(*command[3:-1]).err


@pytest.mark.skipif(sys.platform != "linux", reason="the test looks for a process by its parent")
def test_a_killed_process_fails_its_shard_alone(tmp_path):
    """The other process does all other shards, and exit code 1 tells of the one."""
    shards = make_shards(tmp_path, make_records(SHARDS * 1500, exotic=False))
    out, marks = tmp_path / "out", tmp_path / "out" / ".capmerge" / "done"
    words = ["rewrite", str(shards), "-o", str(out), "--tasks", "4", "-j", "2", "--quiet"]
    process = subprocess.Popen([*COMMAND, *words], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: marks.is_dir() and len(list(marks.glob("*.json"))) >= 2)
    psutil.Process(process.pid).children()[0].kill()
    told = process.communicate(timeout=60)[1]
    assert process.returncode == 1
    assert "1 shard of 16 could not be rewritten" in told
    assert "was killed by signal 9 while it rewrote a shard" in told
    assert len(list(marks.glob("*.json"))) == SHARDS - 1
    run(*words)
    run("rewrite", tmp_path / "joined.jsonl", "-o", tmp_path / "one.jsonl", "--quiet")
    assert joined_outputs(out) == (tmp_path / "one.jsonl").read_bytes()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("shards", "Give it with -o OUT"),
        ("shards -o -", "Give it with -o OUT"),
        ("shards -o shards/out", "would lie among the shards"),
        ("shards -o shards", "would lie among the shards"),
        ("empty -o out", "found no shards"),
        ("shards -o out --index", "--index is for a single file"),
        ("shards -o out --in-place", "--in-place is for a single file"),
        ("joined.jsonl -o out.jsonl --tasks 2", "--tasks is for a folder"),
        ("shards -o joined.jsonl", "joined.jsonl: found something that is no folder"),
        pytest.param(
            "linked -o out",
            "z.jsonl: the shard cannot be read",
            marks=pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows"),
        ),
        ("nothing://x/y -o out", "this kind of URL cannot be opened"),
        ("shards -o full", "there is no manifest"),
        ("shards -o foreign", "expected the manifest of an earlier run"),
        ("shards -o out --executor slurm", "belongs to --engine datatrove"),
        ("shards -o out --only-task 1", "expected --tasks N with it"),
        ("shards -o out --sbatch time=1", "belongs to --executor slurm"),
        ("shards -o out --engine datatrove --executor slurm --sbatch x", "expected NAME=VALUE"),
        ("shards -o out --engine datatrove --executor slurm", "--sbatch partition=cpu"),
        ("shards -o out --engine datatrove --executor ray", "pip install ray"),
    ],
)
def test_mistakes_are_named(folder, tmp_path, words, message):
    """A mistake is one message, and nothing is written to the outputs."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "full").mkdir()
    if words.startswith("linked"):
        (tmp_path / "linked").mkdir()
        (tmp_path / "linked" / "a.jsonl").symlink_to(tmp_path / "joined.jsonl")
        (tmp_path / "linked" / "z.jsonl").symlink_to("nowhere")
    (tmp_path / "full" / shard_name(3)).write_text("mine")
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "manifest.json").write_text('{"name": "an app"}')
    shutil.copytree(folder / "shards", tmp_path / "shards")
    shutil.copy(folder / "joined.jsonl", tmp_path)
    done = subprocess.run(
        [*COMMAND, "rewrite", *words.split()],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (1, 2)
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "out").glob("*.jsonl"))
    assert (tmp_path / "full" / shard_name(3)).read_text() == "mine"
    assert json.loads((tmp_path / "foreign" / "manifest.json").read_bytes()) == {"name": "an app"}


@pytest.mark.parametrize(
    "damaged", [b"", b"null", b"[]", b"{}", b'{"output": {"bytes": 1}}', "tally"]
)
def test_a_shard_with_a_damaged_mark_is_done_again(tmp_path, damaged):
    """A mark that is not what a run writes counts as none."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.json").write_bytes(b'{"k": {"tags": "a, b", "caption": "A cat."}}')
    words = ["rewrite", tmp_path / "in", "-o", tmp_path / "out", "--tasks", "1", "-j", "1"]
    run(*words)
    mark = tmp_path / "out/.capmerge/done/a.json.json"
    whole = mark.read_bytes()
    if damaged == "tally":
        damaged = whole.replace(b'"tally": {', b'"tally": {"x": 1, ')
    mark.write_bytes(damaged)
    run(*words)
    assert mark.read_bytes() == whole


@pytest.mark.parametrize("kind", ["keys", "captions", "stats"])
@pytest.mark.parametrize("cut", [0, 8])
def test_a_shard_with_a_cut_file_of_counts_is_done_again(tmp_path, kind, cut):
    """Hashes and counts that lost their end do not make the counts of all shards wrong."""
    (tmp_path / "in").mkdir()
    for name in "ab":
        shard = b'{"k": {"tags": "a, b", "caption": "A cat."}, "%s": {"tags": "c"}}' % name.encode()
        (tmp_path / "in" / f"{name}.json").write_bytes(shard)
    words = ["rewrite", tmp_path / "in", "-o", tmp_path / "out", "--stats", "-j", "1"]
    run(*words)
    before = [(tmp_path / "out" / name).read_bytes() for name in ("manifest.json", "stats.json")]
    assert manifest(tmp_path / "out")["keys_in_several_shards"]["keys"] == 1
    (path,) = (tmp_path / "out" / ".capmerge" / kind).glob("a.json.*")
    path.write_bytes(path.read_bytes()[:cut])
    assert "1 of 2 shards are done already" in run(*words).err
    after = [(tmp_path / "out" / name).read_bytes() for name in ("manifest.json", "stats.json")]
    assert after == before


@pytest.mark.parametrize("name", ["manifest.json", "stats.json"])
def test_a_shard_with_the_name_of_a_file_of_a_run_is_refused(tmp_path, name):
    """It is not left out without a word; the outputs of a run are taken as shards all the same."""
    shards, out = tmp_path / "in", tmp_path / "out"
    shards.mkdir()
    for shard in ("a.json", name):
        (shards / shard).write_bytes(b'{"k": {"tags": "a, b"}}')
    told = run("rewrite", shards, "-o", out, "-j", "1", fails=2).err
    assert f"{name}: found a file of this name among the shards" in told
    assert not out.exists()
    (shards / name).rename(shards / "b.json")
    run("rewrite", shards, "-o", out, "-j", "1", "--stats")
    run("rewrite", out, "-o", tmp_path / "again", "-j", "1", "--allow-rewritten")
    assert [shard["name"] for shard in manifest(tmp_path / "again")["shards"]] == [
        "a.json",
        "b.json",
    ]


@pytest.mark.skipif(os.name == "nt", reason="paths of Windows are shorter")
def test_names_that_are_too_long_are_refused_before_the_run(tmp_path):
    """A name of 227 bytes has room for every file beside it, one of 228 is refused."""
    shards, out = tmp_path / "in", tmp_path / "out"
    shards.mkdir()
    longest = "n" * (227 - len(".json")) + ".json"
    (shards / longest).write_bytes(b'{"k": {"tags": "a, b"}, "bad": 1}')
    words = ["rewrite", shards, "-o", out, "-j", "1", "--stats", "--on-error", "skip"]
    run(*words)
    assert (out / f"{longest}.rejects.jsonl").exists()
    (shards / f"n{longest}").write_bytes(b'{"k": {"tags": "a, b"}}')
    told = run(*words, fails=2).err
    assert "found a file name of 228 bytes, expected at most 227" in told
    assert not (out / f"n{longest}").exists()
