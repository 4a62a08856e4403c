"""`rewrite --in-place` swaps a file for its rewrite, and never loses the file."""

import json
import subprocess
import sys

import pytest
from builders.metadata import as_indent_2, as_jsonl, assert_rewritten, make_records, run

from capmerge.files.compression import compress

RECORDS = make_records(30)
OLD = as_indent_2(RECORDS)


@pytest.fixture
def source(tmp_path):
    """A file of metadata that only its owner may read."""
    path = tmp_path / "m.json"
    path.write_bytes(OLD)
    path.chmod(0o600)
    return path


def test_the_file_is_swapped_and_verified(source):
    """SRC is rewritten, SRC.bak is what it was, and verify proves the one from the other."""
    out = source.with_name("out.json")
    run("rewrite", source, "-o", out)
    told = run("rewrite", source, "--in-place", "--index").out.decode()
    backup = source.with_name("m.json.bak")
    assert f"kept: {backup}" in told
    assert backup.read_bytes() == OLD
    assert source.read_bytes() == out.read_bytes()
    run("verify", backup, source)
    receipt = json.loads(source.with_name("m.json.capmerge.json").read_bytes())
    assert receipt["source"]["name"] == str(backup)
    assert receipt["source"]["bytes"] == len(OLD)
    if sys.platform != "win32":
        assert source.stat().st_mode & 0o777 == 0o600
    assert {path.name.removeprefix("m.json") for path in source.parent.glob("m*")} == {
        *("", ".bak", ".capmerge.json", ".dataset.toml", ".index")
    }


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("m.jsonl", as_jsonl(RECORDS)),
        ("m.json.gz", compress(OLD, "gz")),
        ("m.jsonl.zst", compress(as_jsonl(RECORDS), "zst")),
    ],
)
def test_the_ending_tells_the_format(tmp_path, name, data):
    """A file of JSON lines, and a compressed file, stay what they are."""
    path, out = tmp_path / name, tmp_path / f"out.{name.partition('.')[2]}"
    path.write_bytes(data)
    run("rewrite", path, "-o", out)
    run("rewrite", path, "--in-place")
    assert path.read_bytes() == out.read_bytes()
    assert (tmp_path / f"{name}.bak").read_bytes() == data
    run("verify", tmp_path / f"{name}.bak", path)


def test_a_backup_is_never_replaced(source):
    """An existing SRC.bak is refused, also a dangling link and with --force."""
    backup = source.with_name("m.json.bak")
    for make in (
        lambda: backup.write_text("mine"),
        lambda: backup.symlink_to("nowhere"),
        lambda: backup.symlink_to(source),
        backup.mkdir,
    ):
        make()
        error = run("rewrite", source, "--in-place", "--force", fails=2).err
        assert "m.json.bak: the file exists" in error
        assert source.read_bytes() == OLD
        assert {path.name for path in source.parent.iterdir()} == {"m.json", "m.json.bak"}
        backup.rmdir() if backup.is_dir() else backup.unlink()


def test_a_second_run_is_refused(source):
    """The backup of the first run stands in the way, and so does the mark of the records."""
    run("rewrite", source, "--in-place")
    rewritten = source.read_bytes()
    assert "m.json.bak: the file exists" in run("rewrite", source, "--in-place", fails=2).err
    source.with_name("m.json.bak").rename(source.with_name("old.json"))
    assert "rewritten already" in run("rewrite", source, "--in-place", fails=1).err
    assert source.read_bytes() == rewritten
    assert not source.with_name("m.json.bak").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["m.json", "--in-place", "-o", "x.json"], "-o names another file"),
        (["-", "--in-place"], "standard input is none"),
        (["m.json", "--in-place", "--format", "jsonl"], "readers go by the ending"),
        (["m.parquet", "--in-place"], "capmerge convert"),
        (["missing.json", "--in-place"], "no such file"),
        (["/dev/null", "--in-place"], "a pipe or a device"),
    ],
)
def test_what_cannot_be_swapped_is_refused(source, arguments, message):
    """The message says what is wrong, and nothing was made."""
    run("convert", "m.json", "-o", "m.parquet", cwd=source.parent)
    assert message in run("rewrite", *arguments, cwd=source.parent, fails=2).err
    assert {path.name for path in source.parent.iterdir()} == {"m.json", "m.parquet"}


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_links_are_followed(source):
    """The file behind a link is swapped, and the link leads to the new file."""
    folder = source.parent / "links"
    folder.mkdir()
    (folder / "link.json").symlink_to(source)
    run("rewrite", folder / "link.json", "--in-place")
    assert (folder / "link.json").is_symlink()
    assert_rewritten(RECORDS, json.loads(source.read_bytes()))
    assert source.with_name("m.json.bak").read_bytes() == OLD
    assert [path.name for path in folder.iterdir()] == ["link.json"]
    receipt = json.loads(source.with_name("m.json.capmerge.json").read_bytes())
    assert receipt["source"]["name"] == str(source.with_name("m.json.bak"))


def test_a_record_that_cannot_be_merged_changes_nothing(source):
    """A run that fails leaves the file and no backup."""
    broken = OLD[:-2] + b',\n"x": {"tags": 5}}'
    source.write_bytes(broken)
    run("rewrite", source, "--in-place", fails=1)
    assert source.read_bytes() == broken
    assert [path.name for path in source.parent.iterdir()] == ["m.json"]


STEPS = """
import os, sys
from pathlib import Path

kill_at, without_links = int(sys.argv[1]), sys.argv[2] == "copy"
steps = 0

def counted(function):
    def run(*arguments, **options):
        global steps
        steps += 1
        if steps == kill_at:
            os._exit(9)
        return function(*arguments, **options)
    return run

def no_links(*_):
    raise OSError(1, "Operation not permitted")

os.link = counted(no_links if without_links else os.link)
os.fsync, os.replace, os.unlink = counted(os.fsync), counted(os.replace), counted(os.unlink)
os.chmod = counted(os.chmod)
os.rename = counted(os.rename)
Path.replace = counted(Path.replace)
Path.unlink = counted(Path.unlink)
sys.argv = ["capmerge", "rewrite", "m.json", "--in-place", "-j", "1", "--quiet"]
from capmerge.__main__ import main
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the steps are those of POSIX")
@pytest.mark.parametrize("way", ["link", "copy"])
def test_a_kill_at_any_step_loses_nothing(source, way):
    """Either the old file or the new one stands under SRC, and the old one is somewhere, whole.

    Where no backup stands in the way, the next run swaps the file as if nothing had happened.
    """
    out = source.with_name("out.json")
    run("rewrite", source, "-o", out, "--quiet")
    new = out.read_bytes()
    for path in source.parent.iterdir():
        path.unlink()
    backup = source.with_name("m.json.bak")
    for kill_at in range(1, 100):
        source.write_bytes(OLD)
        done = subprocess.run(
            [sys.executable, "-c", STEPS, str(kill_at), way],
            cwd=source.parent,
            capture_output=True,
            check=False,
        )
        assert done.returncode in (0, 9), done.stderr
        assert source.read_bytes() in (OLD, new)
        assert OLD in (source.read_bytes(), backup.exists() and backup.read_bytes())
        if source.read_bytes() == OLD and (way == "link" or not backup.exists()):
            run("rewrite", source, "--in-place", "--quiet")
            assert source.read_bytes() == new
        if source.read_bytes() == new:
            assert backup.read_bytes() == OLD
            run("verify", backup, source)
        for path in source.parent.iterdir():
            path.unlink()
        if done.returncode == 0:
            break
    assert kill_at > 8
    assert done.returncode == 0


def test_two_runs_at_once_make_one_rewrite(source):
    """One of two runs that start together swaps the file, and the other changes nothing."""
    command = [sys.executable, "-m", "capmerge", "rewrite", source, "--in-place", "--quiet"]
    runs = [subprocess.Popen(command, stderr=subprocess.PIPE) for _ in range(2)]
    errors = [process.communicate()[1] for process in runs]
    assert sorted(process.returncode == 0 for process in runs) == [False, True], errors
    assert source.with_name("m.json.bak").read_bytes() == OLD
    assert_rewritten(RECORDS, json.loads(source.read_bytes()))
    assert not [path for path in source.parent.iterdir() if "tmp" in path.name]
