import os
import subprocess
import sys

import pytest
from builders.metadata import HANG_SECONDS

from capmerge.errors import BusyError, OutputError
from capmerge.files.atomic import AtomicFile, OutputFiles, write_whole

WRITE = """
import sys, pathlib
from capmerge.files.atomic import write_whole
write_whole(pathlib.Path(sys.argv[1]), "other")
"""


def another_process_writes(path):
    """Whether another process can write the file now; its last line of error otherwise."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE, path],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    return done.returncode == 0 or done.stderr.splitlines()[-1]


def names(folder):
    """What lies in the folder."""
    return sorted(path.name for path in folder.iterdir())


def test_publish_gives_the_name(tmp_path):
    """Until `publish` the older file stands there, behind it the new one, and nothing else."""
    target = tmp_path / "out"
    target.write_text("old")
    with AtomicFile(target) as file:
        file.write(b"new")
        assert target.read_text() == "old"
        file.publish()
        assert target.read_text() == "new"
    assert names(tmp_path) == ["out"]
    assert file.written_bytes == 3


def test_leaving_the_block_without_publish_discards(tmp_path):
    """What nobody published is removed, with and without an error; an older file stays."""
    target = tmp_path / "out"
    with AtomicFile(target) as file:
        file.write(b"new")
    assert names(tmp_path) == []
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), AtomicFile(target) as file:
        file.write(bytes(1 // 0))
    assert (names(tmp_path), target.read_text()) == (["out"], "old")


def test_publish_syncs_first(tmp_path, monkeypatch):
    """The bytes are on disk before the file has its name, which is made durable after it."""
    target, seen = tmp_path / "out", []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (seen.append(target.exists()), fsync(number)))
    write_whole(target, "text")
    assert seen == ([False, True] if os.name == "posix" else [False])


def test_an_error_of_the_disk_names_the_target(tmp_path):
    """Without a folder to write into the message says which file could not be written."""
    with pytest.raises(OutputError, match=r"none.out: cannot write, No such file"):
        AtomicFile(tmp_path / "none" / "out")


def test_two_writers_of_one_target(tmp_path):
    """A second writer is told, in this process as in another, until the first is done."""
    target = tmp_path / "out"
    with AtomicFile(target) as file:
        with pytest.raises(BusyError, match="another run is writing this file"):
            AtomicFile(target)
        assert "another run is writing this file" in another_process_writes(target)
        file.publish()
        assert another_process_writes(target) is True
    assert target.read_text() == "other"


def test_what_a_killed_run_left_is_taken_over(tmp_path):
    """The bytes of an earlier hidden file do not come into the new one."""
    (tmp_path / ".out.capmerge-tmp").write_text("half a file that is longer")
    write_whole(tmp_path / "out", "text")
    assert (names(tmp_path), (tmp_path / "out").read_text()) == (["out"], "text")


def test_reading_back_keeps_the_lock(tmp_path):
    """Closing the source that reads what was written lets no other run in."""
    target = tmp_path / "out"
    with AtomicFile(target) as file:
        file.write(b"written")
        with file.read_back() as source:
            assert source.window(0, 100) == b"written"
        assert "another run is writing this file" in another_process_writes(target)
        file.publish()
    assert target.read_text() == "written"


def test_output_files_appear_together(tmp_path):
    """Nothing has its name before `publish`, and old side files go with it."""
    target = tmp_path / "out"
    (tmp_path / "out.b").write_text("of an earlier run")
    with OutputFiles(target, (".a", ".b")) as files:
        files.open().write(b"main")
        files.side(".a").write(b"side")
    assert names(tmp_path) == ["out.b"]
    with OutputFiles(target, (".a", ".b")) as files:
        files.open().write(b"main")
        files.side(".a").write(b"side")
        files.publish()
    assert {name: (tmp_path / name).read_text() for name in names(tmp_path)} == {
        "out": "main",
        "out.a": "side",
    }
