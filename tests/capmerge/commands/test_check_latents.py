"""`capmerge check-latents`: every fault is found, told once and counted, and nothing is lost."""

import json
import os
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
from builders.metadata import COMMAND, run
from builders.packed import BROKEN, EXACT, arrays, write_broken, write_metadata, write_sound

from capmerge.files.lock import open_locked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="it needs pipes and links")
UNREADABLE = {"dangling": "No such file or directory", "loop": "Too many levels of symbolic links"}


def check(folder, *arguments, fails=1):
    """Check the latents of a folder; the findings by key, and the counts of the table."""
    report = folder / "report.jsonl"
    done = run(
        "check-latents",
        folder / "meta.json",
        "--latents",
        folder / "latents",
        "-o",
        report,
        "--force",
        *arguments,
        fails=fails,
    )
    lines = [json.loads(line) for line in report.read_text().splitlines()]
    counts = {}
    for line in done.out.decode().splitlines():
        name, _, number = line.rpartition("  ")
        if name.strip() and number.strip().replace(",", "").isdigit():
            counts[name.strip()] = int(number.replace(",", ""))
    return {line["key"]: line for line in lines}, counts


def test_every_fault_is_named_and_counted(tmp_path):
    """Broken files of every kind are told apart from sound ones of unusual layouts."""
    write_broken(tmp_path)
    before = sorted(path.name for path in (tmp_path / "latents").iterdir())
    found, counts = check(tmp_path)
    for name, (_, problem) in BROKEN.items():
        assert (found[name]["fault"], problem in found[name]["problem"]) == ("broken", True), name
    assert found.keys() & EXACT.keys() == set()
    assert found["other"]["fault"] == "other size"
    assert "found latents for 128 x 128 px, expected 192 x 128" in found["other"]["problem"]
    for name, problem in UNREADABLE.items():
        assert (found[name]["fault"], found[name]["problem"]) == ("unreadable", problem)
    assert found["pipe"]["problem"] == "not a regular file"
    for name in ("gone", "folder"):
        assert (found[name]["fault"], found[name]["file"]) == ("missing", None)
    assert counts["records"] == len(BROKEN) + len(EXACT) + 6
    assert counts["records without a file"] == 2
    assert counts["files"] == counts["records"] - 2
    assert counts["files broken"] == len(BROKEN) + 1
    assert (counts["files of another size"], counts["files unreadable"]) == (1, 2)
    assert sorted(path.name for path in (tmp_path / "latents").iterdir()) == before


def test_sound_latents_are_exit_code_0(tmp_path):
    """Where nothing is wrong, the report is empty."""
    write_sound(tmp_path, ["a/1", "a/2"])
    found, counts = check(tmp_path, fails=0)
    assert (found, counts["files"]) == ({}, 2)


def test_any_number_of_jobs_gives_the_same_report(tmp_path):
    """Reports of one and of three processes are equal, byte for byte, and in record order."""
    names = [f"d/{number}" for number in range(400)]
    write_sound(tmp_path, names)
    for number in (0, 7, 130, 399):
        (tmp_path / "latents" / f"d/{number}.npz").write_bytes(b"junk")
    (tmp_path / "latents" / "d/200.npz").unlink()
    reports = []
    for jobs in ("1", "3"):
        found, _ = check(tmp_path, "-j", jobs)
        assert [*found] == ["d/0", "d/7", "d/130", "d/200", "d/399"]
        reports.append((tmp_path / "report.jsonl").read_bytes())
    assert reports[0] == reports[1]


def test_broken_files_are_moved_and_never_over_others(tmp_path):
    """Files with faulty bytes keep their relative path; the others stay, and nothing is lost."""
    write_sound(tmp_path, ["a/1", "a/2", "b/1", "b/2", "c"])
    latents, away = tmp_path / "latents", tmp_path / "away"
    for name in ("a/1", "b/1", "b/2"):
        (latents / f"{name}.npz").write_bytes(f"junk of {name}".encode())
    (latents / "c.npz").unlink()
    (latents / "c.npz").symlink_to("none")
    (away / "b").mkdir(parents=True)
    (away / "b" / "1.npz").write_bytes(b"older")
    found, counts = check(tmp_path, "--quarantine", away)
    assert (away / "a" / "1.npz").read_bytes() == b"junk of a/1"
    assert (away / "b" / "2.npz").read_bytes() == b"junk of b/2"
    assert (away / "b" / "1.npz").read_bytes() == b"older"
    assert (latents / "b" / "1.npz").read_bytes() == b"junk of b/1"
    assert not (latents / "a" / "1.npz").exists()
    assert (latents / "a" / "2.npz").exists()
    assert (latents / "c.npz").is_symlink()
    assert counts["files moved"] == 2
    assert found["a/1"]["moved_to"] == str(away / "a" / "1.npz")
    assert "exists already" in found["b/1"]["not_moved"]
    assert "could not be read" in found["c"]["not_moved"]


def test_a_broken_file_of_two_records_is_moved_once(tmp_path):
    """Both findings say where it is."""
    write_sound(tmp_path, ["a"])
    write_metadata(tmp_path, ["a.png", "a.jpg"])
    (tmp_path / "latents" / "a.npz").write_bytes(b"junk")
    found, counts = check(tmp_path, "--quarantine", tmp_path / "away")
    assert {line["moved_to"] for line in found.values()} == {str(tmp_path / "away" / "a.npz")}
    assert (counts["files moved"], counts["files broken"]) == (1, 2)


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="it needs a second file system")  # noqa: PTH112
def test_a_quarantine_on_another_file_system(tmp_path):
    """Files are copied there whole before they leave, and links stay links."""
    write_sound(tmp_path, ["a", "b"])
    latents = tmp_path / "latents"
    (latents / "a.npz").write_bytes(b"junk" * 1000)
    os.utime(latents / "a.npz", ns=(1, 1_500_000_000_000_000_000))
    (latents / "b.npz").rename(latents / "target")
    (latents / "target").write_bytes(b"other junk")
    (latents / "b.npz").symlink_to("target")
    away = tmp_path.joinpath("/dev/shm") / f"capmerge-test-{os.getpid()}"
    assert os.stat(away.parent).st_dev != os.stat(tmp_path).st_dev  # noqa: PTH116
    try:
        check(tmp_path, "--quarantine", away)
        assert (away / "a.npz").read_bytes() == b"junk" * 1000
        assert (away / "a.npz").stat().st_mtime_ns == 1_500_000_000_000_000_000
        assert (away / "b.npz").is_symlink()
        assert (away / "b.npz").read_bytes() == b"other junk"
        assert [path.name for path in latents.iterdir()] == ["target"]
    finally:
        shutil.rmtree(away)


def test_a_quarantine_inside_of_the_latents_is_refused(tmp_path):
    """It would be listed again as latents."""
    write_sound(tmp_path, ["a"])
    done = run(
        "check-latents",
        tmp_path / "meta.json",
        "--latents",
        tmp_path / "latents",
        "--quarantine",
        tmp_path / "latents" / "bad",
        fails=2,
    )
    assert "inside of the folder of latents" in done.err


def test_an_interrupted_check_goes_on(tmp_path):
    """A killed check leaves notes; the next one reads only what is new or changed, and no more."""
    names = [f"d/{number:04d}" for number in range(3000)]
    write_sound(tmp_path, names)
    latents = tmp_path / "latents" / "d"
    (latents / "0003.npz").write_bytes(b"junk")
    (latents / "0004.npz").write_bytes(b"more junk")
    command = [
        *COMMAND, "check-latents", str(tmp_path / "meta.json"),
        "--latents", str(tmp_path / "latents"), "-o", str(tmp_path / "report.jsonl"), "-j", "1",
    ]  # fmt: skip
    notes = tmp_path / ".report.jsonl.capmerge-tmp.d" / "checked.new"
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 60
        while not (notes.exists() and notes.stat().st_size > 20_000):
            assert process.poll() is None, "it was done before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
    assert not (tmp_path / "report.jsonl").exists()
    noted = len(notes.read_bytes().splitlines()) - 2  # the head, and a line that may be cut
    assert 0 < noted < len(names)
    # One broken file is mended and a sound one breaks, at the same length.
    np.savez(latents / "0004.npz", **arrays())
    data = bytearray((latents / "0005.npz").read_bytes())
    data[400] ^= 1
    (latents / "0005.npz").write_bytes(data)
    found, counts = check(tmp_path)
    assert [*found] == ["d/0003", "d/0005"]
    assert noted - 3 <= counts["files known before"] < len(names)
    assert counts["files"] == len(names)
    assert not notes.parent.exists()
    fresh, counts = check(tmp_path)
    assert fresh == found
    assert "files known before" not in counts


def test_notes_of_other_metadata_are_not_taken(tmp_path):
    """The notes of an interrupted check hold for the same records alone."""
    write_sound(tmp_path, ["a", "b"])
    work = tmp_path / ".report.jsonl.capmerge-tmp.d"
    work.mkdir()
    stale = {"record": 0, "file": str(tmp_path / "latents" / "a.npz"), "fault": "broken"}
    status = (tmp_path / "latents" / "a.npz").stat()
    stale |= {"size": status.st_size, "changed_ns": status.st_mtime_ns, "problem": "stale"}
    about = {"check": 1, "metadata": "other", "latents": str(tmp_path / "latents"), "shards": None}
    (work / "checked").write_text(f"{json.dumps(about)}\n{json.dumps(stale)}\n")
    assert check(tmp_path, fails=0)[0] == {}


def test_two_checks_of_one_report(tmp_path):
    """The second one is refused while the first one runs."""
    write_sound(tmp_path, ["a"])
    work = tmp_path / ".report.jsonl.capmerge-tmp.d"
    work.mkdir()
    with open_locked(work / "lock"):
        done = subprocess.run(
            [
                *COMMAND,
                "check-latents",
                str(tmp_path / "meta.json"),
                "--latents",
                str(tmp_path / "latents"),
                "-o",
                str(tmp_path / "report.jsonl"),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 1
    assert "another check writes this report" in done.stderr
