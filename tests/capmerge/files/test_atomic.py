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
    """Return True if another process can write the file now, else its last line of error."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE, path],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    return done.returncode == 0 or done.stderr.splitlines()[-1]


def names(folder):
    """Return the sorted names of the files in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_publish_gives_the_name(tmp_path):
    """The older file stays until `publish`; then only the new one is there."""
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
    """A file that was not published is removed, with and without an error; an older one stays."""
    target = tmp_path / "out"
    with AtomicFile(target) as file:
        file.write(b"new")
    assert names(tmp_path) == []
    target.write_text("old")
    with pytest.raises(ZeroDivisionError), AtomicFile(target) as file:
        file.write(bytes(1 // 0))
    assert (names(tmp_path), target.read_text()) == (["out"], "old")


def test_publish_syncs_first(tmp_path, monkeypatch):
    """The bytes are synced before the file gets its name, and the folder is synced after that."""
    target, seen = tmp_path / "out", []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda number: (seen.append(target.exists()), fsync(number)))
    write_whole(target, "text")
    assert seen == ([False, True] if os.name == "posix" else [False])


def test_an_error_of_the_disk_names_the_target(tmp_path):
    """If the folder is missing, the message names the file that could not be written."""
    with pytest.raises(OutputError, match=r"none.out: cannot write, No such file"):
        AtomicFile(tmp_path / "none" / "out")


def test_two_writers_of_one_target(tmp_path):
    """A second writer in this or another process is refused until the first one is done."""
    target = tmp_path / "out"
    with AtomicFile(target) as file:
        with pytest.raises(BusyError, match="another run is writing this file"):
            AtomicFile(target)
        assert "another run is writing this file" in another_process_writes(target)
        file.publish()
        assert another_process_writes(target) is True
    assert target.read_text() == "other"


def test_what_a_killed_run_left_is_taken_over(tmp_path):
    """The new file holds no bytes of the hidden file that a killed run left."""
    (tmp_path / ".out.capmerge-tmp").write_text("half a file that is longer")
    write_whole(tmp_path / "out", "text")
    assert (names(tmp_path), (tmp_path / "out").read_text()) == (["out"], "text")


def test_reading_back_keeps_the_lock(tmp_path):
    """Closing the source that reads the file back does not give up the lock."""
    target = tmp_path / "out"
    with AtomicFile(target) as file:
        file.write(b"written")
        with file.read_back() as source:
            assert source.window(0, 100) == b"written"
        assert "another run is writing this file" in another_process_writes(target)
        file.publish()
    assert target.read_text() == "written"


def test_output_files_appear_together(tmp_path):
    """No file has its name before `publish`, which also removes old side files."""
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
