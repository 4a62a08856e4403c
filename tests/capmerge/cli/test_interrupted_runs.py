import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from builders.metadata import (
    COMMAND,
    HANG_SECONDS,
    as_compact,
    as_indent_2,
    as_jsonl,
    assert_rewritten,
    big_file_records,
    make_records,
    run,
    temporary_files,
    wait_until,
)

from capmerge.files.compression import compress

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the tests send signals of POSIX")
RECORDS = big_file_records(5)
DATA = as_indent_2(RECORDS)
REJECTS_EARLY = as_indent_2({"bad": {"caption": ["x"]}, **RECORDS})
GZIPPED = gzip.compress(as_indent_2(make_records(300)))
TEMPORARY = ".out.json.capmerge-tmp"
REJECTS_TEMPORARY = ".out.json.rejects.jsonl.capmerge-tmp"
OUTPUTS = ["out.json", "out.json.capmerge.json", "out.json.dataset.toml"]


def names(folder: Path) -> list[str]:
    """The names in `folder`."""
    return sorted(path.name for path in folder.iterdir())


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """The `processes` that still run; one that only waits to be collected does not."""
    running = []
    for process in processes:
        try:
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                running.append(process)
        except psutil.NoSuchProcess:
            continue
    return running


@contextmanager
def started(*arguments: str | Path, **options: object) -> Iterator[subprocess.Popen]:
    """`capmerge` in a process group of its own, killed at the end if it still runs."""
    pipes = {
        "stdin": subprocess.PIPE,
        "stdout": subprocess.PIPE,
        "stderr": subprocess.PIPE,
    } | options
    process = subprocess.Popen([*COMMAND, *map(str, arguments)], start_new_session=True, **pipes)
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe:
                with suppress(BrokenPipeError):
                    pipe.close()
        process.wait(HANG_SECONDS)


@contextmanager
def held(
    folder: Path, *arguments: str, jobs: int, data: bytes = DATA
) -> Iterator[subprocess.Popen]:
    """A run from a pipe to `folder`/out.json that waits for the second half of `data`."""
    with started("rewrite", "-", "-o", folder / "out.json", "-j", str(jobs), *arguments) as process:
        process.stdin.write(data[: len(data) * 3 // 5])
        process.stdin.flush()
        assert wait_until((folder / TEMPORARY).exists)
        if jobs > 1:
            assert wait_until(lambda: len(psutil.Process(process.pid).children()) == jobs)
        wait_until_idle(process)
        yield process


@contextmanager
def held_at_its_output(source: Path, *, jobs: int) -> Iterator[subprocess.Popen]:
    """A run from a file to a pipe that nobody empties."""
    with started("rewrite", source, "-o", "-", "-j", str(jobs)) as process:
        assert process.stdout.read(10)
        if jobs > 1:
            assert wait_until(lambda: len(psutil.Process(process.pid).children()) == jobs)
        wait_until_idle(process)
        yield process


def wait_until_idle(process: subprocess.Popen) -> None:
    """Wait until a run and its workers do nothing but wait."""
    processes = [psutil.Process(process.pid), *psutil.Process(process.pid).children()]
    before = None
    for _ in range(200):
        now = [one.cpu_times()[:2] for one in processes]
        if now == before and all(one.status() == psutil.STATUS_SLEEPING for one in processes):
            return
        before = now
        time.sleep(0.05)
    raise AssertionError("the run never came to wait")


def give_rest(process: subprocess.Popen, data: bytes = DATA) -> None:
    """Write the second half of `data` to a run that `held` began, unless it has ended."""
    with suppress(BrokenPipeError):
        process.stdin.write(data[len(data) * 3 // 5 :])
    with suppress(BrokenPipeError):
        process.stdin.close()
    process.stdin = None


def end_of(process: subprocess.Popen) -> tuple[int, str]:
    """Exit code and standard error of a process that is expected to end by itself."""
    _, err = process.communicate(timeout=HANG_SECONDS)
    return process.returncode, err.decode()


# --- killed ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
def test_sigkill_leaves_the_source_and_no_output(tmp_path, jobs):
    """SIGKILL leaves no OUT and no worker, only hidden files that the next run removes."""
    with held(tmp_path, "--on-error", "skip", jobs=jobs, data=REJECTS_EARLY) as process:
        begun = [TEMPORARY]
        if jobs == 1:  # with workers the parent waits for its input first
            assert wait_until((tmp_path / REJECTS_TEMPORARY).exists)
            begun.append(REJECTS_TEMPORARY)
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) == (jobs if jobs > 1 else 0)
        process.kill()
        process.wait(HANG_SECONDS)
        assert wait_until(lambda: not alive(workers), 5)
    assert names(tmp_path) == begun
    run("rewrite", "-", "-o", tmp_path / "out.json", stdin=as_indent_2({"a": {"caption": "x"}}))
    assert names(tmp_path) == OUTPUTS
    assert json.loads((tmp_path / "out.json").read_bytes()) == {
        "a": {"caption": "x", "capmerge": "c"}
    }


def test_sigkill_between_two_files(tmp_path):
    """A run killed while it writes leaves SRC as it was, and at most the hidden file."""
    source = tmp_path / "m.json"
    source.write_bytes(DATA)
    heavy = [f"--line={{tags}} {number}" for number in range(40)]
    with started("rewrite", source, "-o", tmp_path / "out.json", "-j", "2", *heavy) as process:
        temporary = tmp_path / TEMPORARY
        assert wait_until(lambda: temporary.exists() and temporary.stat().st_size)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait(HANG_SECONDS)
        assert workers
        assert wait_until(lambda: not alive(workers), 5)
    assert names(tmp_path) == [TEMPORARY, "m.json"]
    assert source.read_bytes() == DATA
    run("rewrite", source, "-o", tmp_path / "out.json")
    assert names(tmp_path) == ["m.json", *OUTPUTS]
    assert_rewritten(RECORDS, json.loads((tmp_path / "out.json").read_bytes()))


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
@pytest.mark.parametrize("to_group", [True, False])
def test_a_signal_ends_the_run_without_leftovers(tmp_path, jobs, number, code, to_group):
    """Ctrl-C exits 130 and SIGTERM 143, and no file, worker or traceback is left."""
    if jobs == 1 and to_group:
        pytest.skip("one process is its group")
    with held(tmp_path, "--on-error", "skip", jobs=jobs, data=REJECTS_EARLY) as process:
        workers = psutil.Process(process.pid).children(recursive=True)
        (os.killpg if to_group else os.kill)(process.pid, number)
        assert process.wait(HANG_SECONDS) == code
        err = process.stderr.read().decode()
        assert "Traceback" not in err
        assert err.count("\n") <= 1
        assert wait_until(lambda: not alive(workers), 5)
    assert names(tmp_path) == []


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
def test_a_signal_ends_a_run_that_waits_for_its_reader(tmp_path, jobs, number, code):
    """A run whose output nobody reads ends just as fast at a signal, with no worker left."""
    source = tmp_path / "m.json"
    source.write_bytes(DATA)
    with held_at_its_output(source, jobs=jobs) as process:
        workers = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, number)
        assert process.wait(HANG_SECONDS) == code
        assert b"Traceback" not in process.stderr.read()
        assert wait_until(lambda: not alive(workers), 5)
    assert names(tmp_path) == ["m.json"]


def test_an_interrupted_run_keeps_the_old_output(tmp_path):
    """Ctrl-C of a run with --force leaves OUT and its side files as they were."""
    for name in (*OUTPUTS, "out.json.rejects.jsonl"):
        (tmp_path / name).write_text(f"old {name}")
    with held(tmp_path, "--force", jobs=2) as process:
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(HANG_SECONDS) == 130
    assert names(tmp_path) == sorted([*OUTPUTS, "out.json.rejects.jsonl"])
    assert all(path.read_text() == f"old {path.name}" for path in tmp_path.iterdir())


@pytest.mark.parametrize("waits_for", ["input", "output"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_worker_killed_from_outside_is_an_error(tmp_path, which, waits_for):
    """The loss of a worker ends the run with exit 1, its process id, and no output."""
    source = tmp_path / "m.json"
    if waits_for == "output":
        source.write_bytes(DATA)
    with (
        held(tmp_path, jobs=2)
        if waits_for == "input"
        else held_at_its_output(source, jobs=2) as process
    ):
        workers = psutil.Process(process.pid).children()
        workers[which].kill()
        if waits_for == "input":
            give_rest(process)
        code, err = end_of(process)
        assert code == 1
        assert err.startswith(
            f"capmerge: worker process {workers[which].pid} was killed by signal 9"
        )
        assert err.count("\n") == 1
        assert wait_until(lambda: not alive(workers), 5)
    assert names(tmp_path) == (["m.json"] if waits_for == "output" else [])


def test_both_workers_killed(tmp_path):
    """The loss of all workers at once is the same error."""
    with held(tmp_path, jobs=2) as process:
        for worker in psutil.Process(process.pid).children():
            worker.kill()
        give_rest(process)
        code, err = end_of(process)
        assert code == 1
        assert "was killed by signal 9" in err
    assert names(tmp_path) == []


def test_workers_end_when_their_parent_is_killed_while_it_writes(tmp_path):
    """Workers whose parent dies in a write call end within five seconds."""
    source = tmp_path / "m.json"
    source.write_bytes(DATA)
    with held_at_its_output(source, jobs=2) as process:
        workers = psutil.Process(process.pid).children(recursive=True)
        assert len(workers) == 2
        process.kill()
        process.wait(HANG_SECONDS)
        assert wait_until(lambda: not alive(workers), 5)
    assert source.read_bytes() == DATA


# --- two runs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
def test_a_second_run_to_the_same_output_is_an_error(tmp_path, jobs):
    """A second run to the same OUT exits 1, and the first run ends as if it were alone."""
    with held(tmp_path, "--on-error", "skip", jobs=jobs, data=REJECTS_EARLY) as process:
        assert jobs > 1 or wait_until((tmp_path / REJECTS_TEMPORARY).exists)
        error = run(
            "rewrite", "-", "-o", tmp_path / "out.json", "--no-image-size", stdin=DATA, fails=1
        ).err
        assert error.startswith(
            f"capmerge: {tmp_path / 'out.json'}: another run is writing this file."
        )
        assert jobs > 1 or (tmp_path / REJECTS_TEMPORARY).exists()
        give_rest(process, REJECTS_EARLY)
        assert end_of(process) == (0, "")
    assert names(tmp_path) == [*OUTPUTS, "out.json.rejects.jsonl"]
    assert_rewritten(RECORDS, json.loads((tmp_path / "out.json").read_bytes()))


# --- no room --------------------------------------------------------------------------------------


def limit_file_size() -> None:
    """Let no file grow beyond 1 MB, as a full disk would."""
    import resource  # noqa: PLC0415  # POSIX only

    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize("way", ["file", "pipe"])
def test_an_output_that_cannot_grow_is_an_error(tmp_path, jobs, way):
    """A full disk is one clear message and exit 1, and only the old OUT is left."""
    source, out = tmp_path / "m.json", tmp_path / "out.json"
    source.write_bytes(DATA)
    out.write_text("old")
    given = {"stdin": DATA} if way == "pipe" else {}
    arguments = ("rewrite", "-" if way == "pipe" else source, "-o", out, "-j", jobs, "--force")
    error = run(*arguments, fails=1, preexec_fn=limit_file_size, **given).err
    assert error.startswith(f"capmerge: {out}: cannot write, File too large.")
    assert error.count("\n") == 1
    assert names(tmp_path) == ["m.json", "out.json"]
    assert out.read_text() == "old"


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = shutil.which("mount")
    if sys.platform != "linux" or os.geteuid() != 0 or mount is None:
        pytest.skip("only root of Linux can mount a small file system")
    done = subprocess.run(
        [mount, "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False
    )
    if done.returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_a_full_disk_is_an_error(small_disk, jobs):
    """A disk that fills up gives exit 1, one clear message, and its room back."""
    out = small_disk / "out.json"
    error = run("rewrite", "-", "-o", out, "-j", jobs, stdin=DATA, fails=1).err
    assert error.startswith(f"capmerge: {out}: cannot write, No space left on device.")
    assert error.count("\n") == 1
    assert names(small_disk) == []
    assert shutil.disk_usage(small_disk).used == 0


def test_a_disk_too_small_is_seen_before_anything_is_written(small_disk, tmp_path):
    """The size of OUT is estimated first: without the room for it the run ends at once."""
    source, out = tmp_path / "m.json", small_disk / "out.json"
    source.write_bytes(DATA)
    error = run("rewrite", source, "-o", out, fails=1).err
    assert "will take about" in error
    assert error.count("\n") == 1
    assert names(small_disk) == []


@pytest.mark.parametrize("suffix", [".capmerge.json", ".dataset.toml"])
def test_a_side_file_that_cannot_be_written_fails_the_run(tmp_path, suffix):
    """A folder under the name of a side file is an error, and OUT keeps its old content."""
    (tmp_path / f"out.json{suffix}").mkdir()
    (tmp_path / "out.json").write_text("old")
    done = run(
        "rewrite",
        "-",
        "-o",
        tmp_path / "out.json",
        "--force",
        stdin=b'{"a": {"caption": "x"}}',
        fails=1,
    )
    assert f"out.json{suffix}" in done.err
    assert (tmp_path / "out.json").read_text() == "old"
    assert temporary_files(tmp_path) == []


def test_a_folder_under_the_name_of_the_rejects(tmp_path):
    """A folder named OUT.rejects.jsonl is an error without traceback, and OUT stays as it was."""
    (tmp_path / "out.json.rejects.jsonl").mkdir()
    (tmp_path / "out.json").write_text("old")
    command = [*COMMAND, "rewrite", "-", "-o", tmp_path / "out.json", "--force"]
    done = subprocess.run(
        command,
        input=b'{"a": {"caption": "x"}}',
        capture_output=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    assert done.returncode in (1, 2)
    assert (tmp_path / "out.json").read_text() == "old"


# --- a damaged source -----------------------------------------------------------------------------


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("change", ["appended", "touched"])
def test_a_source_that_changes_while_it_is_read_is_an_error(tmp_path, jobs, change):
    """A source that is written to during the run is an error, as nobody knows what was read."""
    source = tmp_path / "m.json"
    source.write_bytes(DATA)
    with held_at_its_output(source, jobs=jobs) as process:
        if change == "appended":
            with source.open("ab") as file:
                file.write(b"\n")
        else:
            os.utime(source, (time.time() + 10, time.time() + 10))
        code, err = end_of(process)
    assert code == 1
    assert (
        err == f"capmerge: {source}: the file changed while it was read. "
        "Run again when nothing writes to it.\n"
    )


def test_a_source_that_shrinks_while_it_is_read_is_an_error(tmp_path):
    """A source that is cut off during the run is an error, never a short output."""
    source = tmp_path / "m.json"
    source.write_bytes(DATA)
    with held_at_its_output(source, jobs=2) as process:
        os.truncate(source, len(DATA) // 2)
        code, err = end_of(process)
    assert code == 1
    assert err.startswith(f"capmerge: {source}")
    assert "Traceback" not in err


GOOD = '{"a": {"caption": "x"}, "b": {"tags": "y"}}'
MALFORMED: dict[str, tuple[bytes, int | None, str | None, str]] = {
    # kind: bytes, offset of the error, key, a word of the message
    "empty": (b"", 0, None, "empty"),
    "white space": (b" \n\t ", 4, None, "empty"),
    "BOM only": (b"\xef\xbb\xbf", 3, None, "empty"),
    "array": (b' [{"caption": "x"}]', 1, None, "an array"),
    "string": (b'"text"', 0, None, "a string"),
    "number": (b"123", 0, None, "123"),
    "null": (b"null", 0, None, "null"),
    "text": (b"caption: x\n", 0, None, "caption: x"),
    "UTF-16 with BOM": (GOOD.encode("utf-16"), 0, None, "UTF-16"),
    "UTF-16 without BOM": (GOOD.encode("utf-16-le"), 0, None, "UTF-16"),
    "UTF-32": (GOOD.encode("utf-32"), 0, None, "UTF-"),
    "cut inside a text": (b'{"a": {"caption": "x"}, "b": {"tags": "y', 40, "b", "the file ends"),
    "cut inside an escape": (
        b'{"a": {"caption": "x"}, "b": {"tags": "y\\u26',
        44,
        "b",
        "the file ends",
    ),
    "cut inside a literal": (b'{"a": {"caption": "x", "score": tru', 35, "a", "the file ends"),
    "cut inside a record": (b'{"a": {"caption": "x"}, "b": {"tags": "y"', 41, "b", "the file ends"),
    "cut inside a key": (b'{"a": {"caption": "x"}, "b', 26, None, "the file ends"),
    "cut behind a comma": (b'{"a": {"caption": "x"},', 23, None, "the file ends"),
    "cut before the last brace": (b'{"a": {"caption": "x"}', 22, "a", "the file ends"),
    "cut behind the first brace": (b"{", 1, None, "the file ends"),
    "garbage": (b'{"a": {"caption": "x"}, @"b": {"tags": "y"}}', 24, None, "@"),
    "garbage in a record": (b'{"a": {"caption": "x"}, "b": {"tags": @}}', 38, "b", "@"),
    "trailing comma": (b'{"a": {"caption": "x"},}', 23, None, "comma"),
    "trailing comma in a record": (b'{"a": {"caption": "x",}}', 22, "a", "}"),
    "missing comma": (b'{"a": {"caption": "x"} "b": {"tags": "y"}}', 23, "a", "comma"),
    "missing comma in a record": (b'{"a": {"caption": "x" "tags": "y"}}', 22, "a", "delimiter"),
    "missing colon": (b'{"a" {"caption": "x"}}', 5, "a", "colon"),
    "missing brace": (b'{"a": {"caption": "x", "b": {"tags": "y"}}', 42, "a", "the file ends"),
    "text after the end": (b'{"a": {"caption": "x"}}\nxyz', 24, None, "after the end"),
    "second object": (b'{"a": {"caption": "x"}}\n{"b": {"tags": "y"}}', 24, None, "after the end"),
    "control character": (b'{"a": {"caption": "x\ny"}}', 20, "a", "\\n"),
    "bad escape": (b'{"a": {"caption": "\\x"}}', 19, "a", "escape"),
    "single quotes": (b"{'a': {'caption': 'x'}}", 1, None, "'"),
    "number as key": (b'{1: {"caption": "x"}}', 1, None, "1"),
    "invalid UTF-8": (b'{"a": {"caption": "x"}, "b": {"caption": "\xff"}}', 42, "b", "0xff"),
    "invalid UTF-8 in a key": (b'{"a": {"caption": "x"}, "b\xc3\x28": {}}', 26, None, "0xc3"),
    "JSONL with a broken line": (
        b'{"image_path": "a", "caption": "x"}\n{"image_path": "b", "caption": }\n',
        67,
        None,
        "}",
    ),
    "JSONL cut off": (
        b'{"image_path": "a", "caption": "x"}\n{"image_path": "b", "capt',
        61,
        None,
        "the file ends",
    ),
    "JSONL with two objects in a line": (
        b'{"image_path": "a"}\n{"image_path": "b"} {"image_path": "c"}\n',
        40,
        None,
        "one object per line",
    ),
    "JSONL with invalid UTF-8": (
        b'{"image_path": "a"}\n{"image_path": "b", "caption": "\xff"}\n',
        52,
        None,
        "0xff",
    ),
    "truncated gzip": (GZIPPED[:20_000], None, None, "gzip"),
    "gzip header only": (gzip.compress(b"")[:10], None, None, "gzip"),
    "gzip of nothing": (gzip.compress(b""), 0, None, "empty"),
    "garbage in gzip": (
        GZIPPED[:5000] + b"garbage" * 100 + GZIPPED[5700:],
        None,
        None,
        "",
    ),  # any text may come out
    "garbage behind gzip": (gzip.compress(GOOD.encode()) + b"garbage", None, None, "gzip"),
    "wrong checksum of gzip": (gzip.compress(GOOD.encode())[:-8] + b"12345678", None, None, "gzip"),
    "bomb of white space": (
        b"".join(compress(b" " * (1 << 20), "zst") for _ in range(100)),
        67_174_400,
        None,
        "nothing but white space",
    ),
    "truncated zstd": (compress(GOOD.encode(), "zst")[:-5], None, None, "zstd"),
    "zstd of nothing": (compress(b"", "zst"), 0, None, "empty"),
    "garbage behind zstd": (compress(GOOD.encode(), "zst") + b"garbage", None, None, "zstd"),
    "broken JSON in zstd": (compress(b'{"a": {"caption": "x"},}', "zst"), 23, None, "comma"),
    "broken JSON in gzip": (gzip.compress(b'{"a": {"caption": "x"},}'), 23, None, "comma"),
}


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_file_is_one_clear_error(tmp_path, kind):
    """A damaged source is one line with file, byte, record, problem and next step; no output."""
    data, offset, key, word = MALFORMED[kind]
    source = tmp_path / "m.json"
    source.write_bytes(data)
    error = run("rewrite", source, fails=1).err
    start = f"capmerge: {source}, byte "
    if offset is not None:
        start += f"{offset:,}"
        start += f', record "{key}": ' if key else ": "
    assert error.startswith(start)
    assert word in error
    assert error.count("\n") == 1
    assert (
        len(error.removeprefix("capmerge: ").split(". ")) >= 2
    )  # a next step behind what was found
    assert names(tmp_path) == ["m.json"]


@pytest.mark.parametrize("layout", [as_indent_2, as_compact, as_jsonl])
def test_a_file_cut_anywhere_is_an_error(tmp_path, layout):
    """A file that is cut off is never taken for a whole one, unless a line of JSONL ends there."""
    data = layout(make_records(12, exotic=False))
    source = tmp_path / "m.json"
    step = len(data) // 6
    for end in range(step, len(data) - 1, step):
        if b"\\u" in data[end - 6 : end] or (
            layout is as_jsonl and data[end - 1 : end + 1] in (b"}\n", b"\n{")
        ):
            continue  # for the end inside an escape see above
        source.write_bytes(data[:end])
        error = run("rewrite", source, "-o", "-", fails=1).err
        assert "cut off" in error


@pytest.mark.parametrize(
    "kind", ["empty", "garbage in a record", "truncated gzip", "text after the end"]
)
def test_a_malformed_pipe_is_named_standard_input(kind):
    """The same message calls a pipe standard input."""
    data, offset, _, word = MALFORMED[kind]
    error = run("rewrite", "-", "-o", "-", stdin=data, fails=1).err
    assert error.startswith("capmerge: standard input")
    assert word in error
    assert offset is None or f"byte {offset}" in error


@pytest.mark.parametrize("jobs", ["1", "2"])
@pytest.mark.parametrize(
    "data",
    [
        gzip.compress(DATA, 1)[:-3000],
        gzip.compress(DATA, 1)[:-8] + b"12345678",
        compress(DATA, "zst")[:-3000],
        compress(DATA, "zst")[:-4] + b"1234",
    ],
    ids=["gzip cut off", "gzip checksum", "zstd cut off", "zstd checksum"],
)
def test_a_compressed_file_that_breaks_far_in_keeps_the_old_output(tmp_path, jobs, data):
    """A late error leaves OUT as it was and no hidden file, with any number of workers."""
    source, out = tmp_path / "m.json.gz", tmp_path / "out.json"
    source.write_bytes(data)
    out.write_text("old")
    error = run("rewrite", source, "-o", out, "--force", "-j", jobs, fails=1).err
    assert error.startswith(f"capmerge: {source}, byte ")
    assert re.search("the (gzip|zstd) data is broken", error)
    assert names(tmp_path) == ["m.json.gz", "out.json"]
    assert out.read_text() == "old"
