import os
import subprocess

import pytest
from builders.commands import needs_linux, needs_shell
from builders.metadata import COMMAND, run, run_shell


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rewrite", "missing.json"], ["missing.json: no such file"]),
        (["rewrite", "folder"], ["folder: found a folder"]),
        (["rewrite", "meta_lat.json", "-o", "folder"], ["folder: found a folder"]),
        (
            ["rewrite", "meta_lat.json", "-o", "nowhere/out.json"],
            ["nowhere/out.json: there is no folder", "Create it"],
        ),
        (["rewrite", "-"], ["-o OUT"]),
        (["rewrite"], ["SRC"]),
        (["rewrite", "meta_lat.json", "--no-such-option"], ["--no-such-option"]),
        (
            ["rewrite", "meta_lat.json", "--layout", "diagonal"],
            ["diagonal", "concat-caption-first"],
        ),
        (["rewrite", "meta_lat.json", "--weights", "heavy"], ["heavy", "field"]),
        (["rewrite", "meta_lat.json", "--format", "xml"], ["xml", "jsonl.gz"]),
        (["rewrite", "meta_lat.json", "--fit", "75", "cut"], ["--fit", "cut", "drop", "trim"]),
        (["verify", "meta_lat.json", "x.json", "--fit", "75", "cut"], ["--fit", "cut", "trim"]),
        (["stats", "meta_lat.json", "--fit", "75", "cut"], ["--fit", "cut", "trim"]),
        (["preview", "meta_lat.json", "--fit", "75", "cut"], ["--fit", "cut", "trim"]),
        (
            ["rewrite", "meta_lat.json", "--family", "sd2"],
            ["--family sd2", "--fit N drop", "--stats", "--dry-run"],
        ),
        (["verify", "meta_lat.json", "x.json", "--family", "sd2"], ["--family sd2", "--fit N"]),
        (["rewrite", "meta_lat.json", "-j", "0"], ["jobs", "0"]),
        (["rewrite", "meta_lat.json", "-j", "two"], ["jobs", "two"]),
        (["rewrite", "meta_lat.json", "--dry-run", "0"], ["dry-run", "0"]),
        (["rewrite", "meta_lat.json", "--max-record", "10"], ["max-record"]),
        (
            ["rewrite", "meta_lat.json", "--line", "{tags}", "--layout", "concat"],
            ["--line", "--layout"],
        ),
        (
            ["rewrite", "meta_lat.json", "--layout", "inline", "--weights", "field"],
            ["--weights field", "inline"],
        ),
        (["rewrite", "meta_lat.json", "--line", "{tags}=0"], ["{tags}=0", "weight is 0"]),
        (["rewrite", "meta_lat.json", "--line", "{a|b}"], ["{a|b}", "{caption}"]),
        (
            ["rewrite", "meta_lat.json", "--line", "{tags}=0.5", "--line", "{caption} = 2"],
            ["'0.5' after the =", "0.5 : 2 is 1:4", "--line '{tags}=1' --line '{caption} =4'"],
        ),
        (["rewrite", "meta_lat.json", "--line", "{}"], ["{}", "{caption}"]),
        (["rewrite", "meta_lat.json", "--line", "words"], ["words", "no field"]),
        (["rewrite", "meta_lat.json", "--line", "{tags}\n{caption}"], ["line break"]),
        (["rewrite", "meta_lat.json", "--prefix", "a\nb"], ["--prefix", "line break"]),
        (["rewrite", "meta_lat.json", "--suffix", "a\rb"], ["--suffix", "line break"]),
        (
            ["rewrite", "meta_lat.json", "-o", "out.jsonl", "--format", "json"],
            ["out.jsonl", "--format json"],
        ),
        (
            ["rewrite", "meta_lat.json", "-o", "out.json", "--format", "jsonl"],
            ["out.json", ".jsonl"],
        ),
        (["rewrite", "meta_lat.json", "-o", "out.txt", "--format", "jsonl"], ["out.txt", ".jsonl"]),
        (
            ["rewrite", "meta_lat.json", "-o", "out.json", "--format", "json.gz"],
            ["out.json", ".json.gz"],
        ),
        (["rewrite", "meta_lat.json", "-o", "out.json.gz", "--format", "json"], ["out.json.gz"]),
        (["verify", "meta_lat.json", "missing.json"], ["missing.json"]),
        (
            ["verify", "missing.json", "meta_lat.json", "--layout", "lines"],
            ["missing.json: no such file"],
        ),
        (["no-such-command"], ["no-such-command"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_command_line_exits_2_and_says_why(source, arguments, said):
    """A mistake on the command line exits 2, names what is wrong and writes nothing."""
    (source.parent / "folder").mkdir()
    done = run(*arguments, fails=2, cwd=source.parent)
    for words in said:
        assert words in done.err
    assert done.out == b""
    assert sorted(path.name for path in source.parent.iterdir()) == ["folder", "meta_lat.json"]


@needs_linux
@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="folders are writable for root"
)
def test_an_unwritable_folder_is_an_error(source):
    """A folder without write permission gives exit 1 and one message."""
    folder = source.with_name("locked")
    folder.mkdir(mode=0o555)
    error = run("rewrite", source, "-o", folder / "out.json", fails=1).err
    assert "out.json: cannot write" in error


@needs_linux
def test_a_folder_that_takes_no_files_is_an_error(source):
    """A folder where nobody can create files, not even root, gives exit 1 and one message."""
    error = run("rewrite", "-", "-o", "/proc/out.json", stdin=source.read_bytes(), fails=1).err
    assert error.startswith("capmerge: /proc/out.json: cannot write")
    assert error.count("\n") == 1


@needs_linux
def test_a_file_system_without_a_size_is_not_called_full(source):
    """A file system that reports a size of 0 bytes is tried, not taken for full."""
    error = run("rewrite", source, "-o", "/proc/out.json", fails=1).err
    assert "GB are free" not in error


@needs_linux
def test_an_output_that_is_a_device_is_refused(source):
    """`-o /dev/null` exits 2 and says what to do instead."""
    assert "-o -" in run("rewrite", source, "-o", "/dev/null", fails=2).err


@needs_linux
@pytest.mark.parametrize(
    "length",
    [300, pytest.param(240, id="side files only")],
)
def test_a_name_that_is_too_long_is_an_error(source, length):
    """A name that the file system refuses gives a message, no traceback."""
    done = subprocess.run(
        [*COMMAND, "rewrite", source, "-o", source.with_name("x" * length)],
        capture_output=True,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    assert done.returncode in (1, 2)


@needs_linux
def test_an_output_in_a_loop_of_links_is_an_error(source):
    """A link to itself as OUT gives a message, no traceback."""
    loop = source.with_name("loop.json")
    loop.symlink_to(loop)
    done = subprocess.run(
        [*COMMAND, "rewrite", source, "-o", loop, "--force"], capture_output=True, check=False
    )
    assert b"Traceback" not in done.stderr
    assert done.returncode in (1, 2)


@needs_shell
@pytest.mark.parametrize(
    "script",
    ["CAPMERGE rewrite - -o - <&-", 'CAPMERGE rewrite "$1" -o - >&-'],
    ids=["input", "output"],
)
def test_a_closed_standard_stream_is_an_error(source, script):
    """A closed standard input or output gives a message, no traceback."""
    done = run_shell(script, source)
    assert "Traceback" not in done.err
    assert done.code in (1, 2)
