import hashlib
import json
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from builders.metadata import (
    HANG_SECONDS,
    LAYOUTS,
    as_compact,
    as_indent_2,
    as_indent_4,
    as_jsonl,
    assert_rewritten,
    make_records,
    run,
    wait_until,
)

from capmerge.errors import DataError
from capmerge.files.compression import compress
from capmerge.files.source import open_source
from capmerge.metadata.blocks import read_layout
from capmerge.metadata.parallel import run_blocks
from capmerge.metadata.pieces import MiscutError

BLOCK_BYTES = 1 << 20

# This script runs in a separate interpreter, because spawn imports the main module again, which
# works only for a file with a guard.
SCRIPT = """\
import sys
from pathlib import Path

from capmerge.commands.rewrite import RewriteOptions, rewrite
from capmerge.files.source import open_source


def main():
    path, out, jobs, method = sys.argv[1:]
    options = RewriteOptions(Path(out), jobs=int(jobs), start_method=method)
    with open_source(path) as source:
        outcome = rewrite(source, options)
    print(outcome.tally.records)


if __name__ == "__main__":
    main()
"""


SLOW_SCRIPT = """\
import os
import sys
import time

from capmerge.files.source import open_source
from capmerge.metadata.blocks import read_layout
from capmerge.metadata.parallel import run_blocks


class Slow:
    counts = None

    def run(self, _block, _data):
        with open(sys.argv[3], "a") as pids:
            pids.write(f"{os.getpid()}\\n")
        if sys.argv[4] == "in C":
            sum(range(10**10))
        end = time.monotonic() + 60
        while time.monotonic() < end:
            pass
        yield from ()

    def flush(self):
        return iter(())


if __name__ == "__main__":
    with open_source(sys.argv[1]) as source:
        run_blocks(source, read_layout(source), Slow, {}, jobs=2, start_method=sys.argv[2])
"""
"""Workers that notice nothing but their block: they are busy in Python, or in one call of C."""


def _with_long_records(records: dict[str, Any]) -> dict[str, Any]:
    """The records, with one of 300 KB after every 900 and one that contains 20,000 objects."""
    longer: dict[str, Any] = {}
    for number, (key, record) in enumerate(records.items()):
        longer[key] = record
        if number % 900 == 450:
            longer[f"long/{number}"] = {
                "caption": "word " * 60_000,
                "tags": "x",
                "meta": {"a": {}, "b": {}},
            }
        if number == 1000:
            longer["wide"] = {
                "caption": "c",
                "tags": "t",
                "parts": {f"part {i}": {"box": [i], "note": "y" * 40} for i in range(20_000)},
            }
    return longer


PLAIN = make_records(7000)
NESTED = _with_long_records(make_records(3600, nested=True))
SOURCES = {
    **{name: partial(layout, PLAIN) for name, layout in LAYOUTS.items()},
    "wrong cuts, compact": partial(as_compact, NESTED),
    "wrong cuts, indent=2": partial(as_indent_2, NESTED),
    "wrong cuts, jsonl": partial(as_jsonl, NESTED),
    "one long line a record": lambda: (
        json.dumps(NESTED, ensure_ascii=True).replace('}, "danbooru', '},\n"danbooru').encode()
    ),
}


@pytest.fixture(scope="module")
def source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], bytes, dict[str, Any]]:
    """A file and its records, and the output and the counts of one process for it."""
    folder = tmp_path_factory.mktemp("source")
    path, out = folder / "m.json", folder / "out.json"
    path.write_bytes(SOURCES[request.param]())
    assert path.stat().st_size > 3 * BLOCK_BYTES
    run("rewrite", path, "-o", out, "-j", "1")
    counts = json.loads((folder / "out.json.capmerge.json").read_bytes())["counts"]
    return (
        path,
        NESTED if "wrong" in request.param or "long" in request.param else PLAIN,
        out.read_bytes(),
        counts,
    )


def _digest(data: bytes) -> str:
    """A hash of bytes that are too many to print when a test fails."""
    return hashlib.sha256(data).hexdigest()


every_source = pytest.mark.parametrize("source", SOURCES, indirect=True)
some_sources = pytest.mark.parametrize(
    "source", ["indent=2", "wrong cuts, compact", "jsonl"], indirect=True
)


class CopyAndMark:
    """Work that copies every block, and emits one byte per block in another stream."""

    counts = None

    def run(self, _block, data):
        """The bytes of the block, and a mark."""
        yield "records", data
        yield "rows", b"1"

    def flush(self):
        """No output, because none is held back."""
        return iter(())


class Taken:
    """A sink that counts the bytes that it is given."""

    def __init__(self):
        self.size = 0

    def write(self, data, *, new_block):  # noqa: ARG002  # a sink
        """Count the bytes of `data`."""
        self.size += len(data)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_stream_without_a_sink_is_an_error(tmp_path, jobs):
    """A stream without a sink raises an error, whatever the number of processes."""
    path = tmp_path / "m.json"
    path.write_bytes(as_indent_2(PLAIN))
    with open_source(str(path)) as source, pytest.raises(KeyError, match="rows"):
        run_blocks(source, read_layout(source), CopyAndMark, {"records": Taken()}, jobs=jobs)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_tells_where_its_last_block_ends(tmp_path, jobs):
    """A run returns the end of its last block, and work without counts needs no `collect`."""
    path, taken = tmp_path / "m.json", Taken()
    path.write_bytes(as_indent_2(PLAIN))
    with open_source(str(path)) as source:
        layout = read_layout(source)
        sinks = {"records": taken, "rows": Taken()}
        assert run_blocks(source, layout, CopyAndMark, sinks, jobs=jobs) == path.stat().st_size
    assert 0 < path.stat().st_size - taken.size < 100  # all but the opening and the separators


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_a_source_that_is_replaced_before_the_workers_open_it_is_an_error(tmp_path, change):
    """Workers that would read another file than their parent say so and do not try again."""
    path, other = tmp_path / "m.json", tmp_path / "other.json"
    path.write_bytes(as_indent_2(PLAIN))
    other.write_bytes(as_compact(NESTED))
    with open_source(str(path)) as source:
        layout = read_layout(source)
        other.replace(path) if change == "replaced" else path.unlink()
        sinks = {"records": Taken(), "rows": Taken()}
        with pytest.raises(DataError, match="changed while it was read"):
            run_blocks(source, layout, CopyAndMark, sinks, jobs=2)


class NeverRight(CopyAndMark):
    """Work to which every block is cut wrong."""

    def run(self, block, _data):
        """No output, only the error."""
        raise MiscutError(block.start)


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_cut_that_a_parser_found_is_not_tried_again(tmp_path, jobs):
    """A block that cannot be decoded though a parser cut it is an error with its place."""
    path = tmp_path / "m.json"
    path.write_bytes(as_indent_2(PLAIN))
    with open_source(str(path)) as source:
        layout = read_layout(source)
        with pytest.raises(DataError, match="byte 4: found bytes that cannot be decoded"):
            run_blocks(source, layout, NeverRight, {}, jobs=jobs)


@every_source
def test_one_process_rewrites_every_record(source):
    """One process rewrites and counts every record of a source, whatever its layout."""
    _, records, expected, counts = source
    assert_rewritten(records, json.loads(expected))
    assert counts["records"] == counts["rewritten"] == len(records)
    assert counts["lines"] == sum(
        len(record["capmerge"]) for record in json.loads(expected).values()
    )


@pytest.mark.parametrize(
    ("source", "jobs"),
    [*((name, 3) for name in SOURCES), ("indent=2", 2), ("wrong cuts, compact", 2)],
    indirect=["source"],
)
def test_any_number_of_processes_gives_the_same_bytes_and_counts(source, tmp_path, jobs):
    """Output and counts do not depend on the number of workers, though blocks may be abandoned."""
    path, _, expected, counts = source
    run("rewrite", path, "-o", tmp_path / "out.json", "-j", str(jobs))
    assert _digest((tmp_path / "out.json").read_bytes()) == _digest(expected)
    assert json.loads((tmp_path / "out.json.capmerge.json").read_bytes())["counts"] == counts


@some_sources
@pytest.mark.parametrize(("jobs", "way"), [(1, "gz"), (2, "gz"), (2, "zst"), (2, "pipe")])
def test_a_stream_gives_the_bytes_of_a_file(source, tmp_path, jobs, way):
    """A pipe and a compressed file, which workers cannot read themselves, give the same bytes."""
    path, _, expected, _ = source
    data, given = path.read_bytes(), "-"
    if way != "pipe":
        given, data = tmp_path / "m", (tmp_path / "m").write_bytes(compress(data, way)) and b""
    assert _digest(run("rewrite", given, "-o", "-", "-j", str(jobs), stdin=data).out) == _digest(
        expected
    )


@pytest.mark.parametrize(
    ("source", "method", "way"),
    [
        ("indent=2", "spawn", "file"),
        ("wrong cuts, compact", "spawn", "file"),
        ("wrong cuts, compact", "spawn", "zst"),
        ("wrong cuts, compact", "fork", "file"),
    ],
    indirect=["source"],
)
def test_any_start_method_gives_the_same_bytes(source, tmp_path, method, way):
    """Spawned workers, as on Windows, give the output of forked ones, and end without a message."""
    if method == "fork" and sys.platform != "linux":
        pytest.skip("fork is used on Linux only")
    path, _, expected, _ = source
    if way == "zst":
        compressed = tmp_path / "m.zst"
        compressed.write_bytes(compress(path.read_bytes(), way))
        path = compressed
    script, out = tmp_path / "script.py", tmp_path / "out.json"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, path, out, "2", method],
        capture_output=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 0
    assert done.stderr == b""
    assert _digest(out.read_bytes()) == _digest(expected)


def _runs(process: psutil.Process) -> bool:
    """True unless a process has ended, even if nobody has collected it."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.skipif(sys.platform == "win32", reason="the test sends a signal of POSIX")
@pytest.mark.parametrize(("method", "busy"), [("fork", "in C"), ("spawn", "in Python")])
def test_workers_end_within_a_second_of_their_killed_parent(tmp_path, method, busy):
    """Workers end when their parent is killed, also in the middle of a block."""
    if method == "fork" and sys.platform != "linux":
        pytest.skip("fork is used on Linux only")
    path, script, pids = tmp_path / "m.json", tmp_path / "script.py", tmp_path / "pids"
    path.write_bytes(as_indent_2(PLAIN))
    script.write_text(SLOW_SCRIPT)
    process = subprocess.Popen(
        [sys.executable, script, path, method, pids, busy], stderr=subprocess.DEVNULL
    )
    try:
        assert wait_until(lambda: pids.exists() and len(pids.read_text().splitlines()) == 2)
        workers = [psutil.Process(int(line)) for line in pids.read_text().splitlines()]
        time.sleep(0.2)
    finally:
        process.kill()
        process.wait()
    ended = wait_until(lambda: not any(map(_runs, workers)), 1)
    for worker in filter(_runs, workers):
        worker.kill()
    assert ended


@pytest.mark.parametrize("layout", ["compact", "indent=2"])
def test_blocks_done_in_vain_are_not_counted(tmp_path, layout):
    """A record of several blocks is counted once, though workers take its objects for records."""
    wide = {f"part {i}": {"caption": "c" * 60} for i in range(45_000)}
    some = make_records(800)
    path, out = tmp_path / "m.json", tmp_path / "out.json"
    path.write_bytes(
        LAYOUTS[layout](
            {
                **some,
                "wide": {"caption": "c", "parts": wide},
                **{key + "b": value for key, value in some.items()},
            }
        )
    )
    found = []
    for jobs in ("1", "3"):
        run("rewrite", path, "-o", out, "-j", jobs, "--force")
        found.append(json.loads((tmp_path / "out.json.capmerge.json").read_bytes())["counts"])
    assert found[0]["records"] == 1601
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("source", "name"),
    [("indent=2", "out.json.gz"), ("wrong cuts, compact", "out.jsonl")],
    indirect=["source"],
)
def test_other_formats_do_not_depend_on_the_processes(source, tmp_path, name):
    """One process and three write the same bytes of JSONL and of gzip."""
    path, *_ = source
    digests = set()
    for jobs in ("1", "3"):
        run("rewrite", path, "-o", tmp_path / name, "-j", jobs, "--force")
        digests.add(_digest((tmp_path / name).read_bytes()))
    assert len(digests) == 1


@pytest.mark.parametrize("source", ["indent=2", "wrong cuts, compact"], indirect=True)
def test_verify_reads_several_blocks(source, tmp_path):
    """The output of three processes is verified record by record."""
    path, records, *_ = source
    run("rewrite", path, "-o", tmp_path / "out.json", "-j", "3")
    assert (
        f"verified: {len(records):,} records"
        in run("verify", path, tmp_path / "out.json").out.decode()
    )


@pytest.mark.parametrize(
    ("layout", "jobs"), [("indent=2", "1"), ("indent=2", "3"), ("compact", "3"), ("jsonl", "3")]
)
def test_rejects_keep_the_order_of_the_source(tmp_path, layout, jobs):
    """Records left out of many blocks are listed in the source's order, and all others are kept."""
    records = {
        key: {"caption": [key]} if number % 97 == 0 else record
        for number, (key, record) in enumerate(PLAIN.items())
    }
    path, out = tmp_path / "m.json", tmp_path / "out.json"
    path.write_bytes(LAYOUTS[layout](records))
    run("rewrite", path, "-o", out, "--on-error", "skip", "-j", jobs)
    lines = (tmp_path / "out.json.rejects.jsonl").read_bytes().splitlines()
    assert [json.loads(line)["key"] for line in lines] == [
        key for number, key in enumerate(records) if number % 97 == 0
    ]
    assert_rewritten(
        {key: record for number, (key, record) in enumerate(records.items()) if number % 97},
        json.loads(out.read_bytes()),
    )


def test_a_block_may_hold_rejects_only():
    """A block whose records are all left out adds no separator."""
    bad = {f"bad/{number}": {"caption": ["x" * 900]} for number in range(3000)}
    records = {
        "first": {"caption": "x"},
        **bad,
        "middle": {"caption": "y"},
        **{key + "b": value for key, value in bad.items()},
    }
    outputs = {
        run(
            "rewrite", "-", "-o", "-", "--on-error", "skip", "-j", jobs, stdin=as_indent_2(records)
        ).out
        for jobs in ("1", "2")
    }
    assert len(outputs) == 1
    assert list(json.loads(outputs.pop())) == ["first", "middle"]


def test_output_far_larger_than_the_input(tmp_path):
    """A block whose output is many times a worker's shared memory comes through whole."""
    records = make_records(1600, exotic=False)
    path = tmp_path / "m.json"
    path.write_bytes(as_indent_2(records))
    heavy = ["--line", "{tags}=31", "--line", "{caption}=32"]
    outputs = [run("rewrite", path, "-o", "-", "-j", jobs, *heavy).out for jobs in ("1", "2")]
    assert _digest(outputs[0]) == _digest(outputs[1])
    assert list(json.loads(outputs[0])) == list(records)


def _broken(kind: str) -> tuple[bytes, str]:
    """A file of several blocks with an error far after the first, and a word of its message."""
    data = (as_compact if "compact" in kind else as_jsonl if "jsonl" in kind else as_indent_4)(
        NESTED if "nested" in kind else PLAIN
    )
    middle = data.index(b"danbooru/1003", len(data) // 2) - 1
    if "garbage" in kind:
        return data[:middle] + b"@" + data[middle:], "@"
    if "byte" in kind:
        return data[: middle + 3] + b"\xff" + data[middle + 3 :], "0xff"
    if "cut" in kind:
        return data[: middle + 40], "cut off"
    if "list" in kind:
        at = data.index(b'"caption":', middle) + len(b'"caption":')
        end = data.index(b'"', data.index(b'"', at) + 1) + 1
        return data[:at] + b"[1]" + data[end:], '"caption" is a list'
    if "marked" in kind:
        at = data.index(b'"caption"', middle)
        return data[:at] + b'"capmerge": "t", ' + data[at:], "rewritten already"
    raise AssertionError(kind)


@pytest.mark.parametrize(
    "kind",
    [
        *("garbage", "garbage, nested compact", "garbage, jsonl", "byte", "byte, nested compact"),
        *(
            "cut",
            "cut, nested compact",
            "list",
            "list, nested compact",
            "list, jsonl",
            "marked, compact",
        ),
    ],
)
def test_an_error_in_the_middle_reads_the_same_from_any_number_of_processes(tmp_path, kind):
    """One process and two give the same message with the same offset, and no output."""
    path, out = tmp_path / "m.json", tmp_path / "out.json"
    data, word = _broken(kind)
    path.write_bytes(data)
    messages = {run("rewrite", path, "-o", out, "-j", jobs, fails=1).err for jobs in ("1", "2")}
    (message,) = messages
    assert message.startswith(f"capmerge: {path}, byte ")
    assert word in message
    assert message.count("\n") == 1
    assert [file.name for file in tmp_path.iterdir()] == ["m.json"]
