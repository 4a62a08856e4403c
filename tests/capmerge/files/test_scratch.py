"""Temporary files for worker processes are read by each process, and gone at the end."""

import os
import random
from functools import partial

import pytest
from builders.commands import needs_linux

from capmerge.errors import OutputError
from capmerge.files.scratch import ScratchFolder, SharedFile
from capmerge.files.source import FileSource


def test_a_folder_is_gone_with_what_a_killed_run_left(tmp_path):
    """What is in the folder before is removed, and the folder itself when it is left."""
    left = tmp_path / ".out.json.capmerge-scratch"
    left.mkdir()
    (left / "old").write_text("x")
    with ScratchFolder(tmp_path / "out.json") as folder:
        assert list(folder.path.iterdir()) == []
        with folder.file("new") as file:
            file.write(b"abc")
        assert (folder.path / "new").read_bytes() == b"abc"
        assert file.written_bytes == 3
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_told(tmp_path):
    """A file in the place of the folder is not removed."""
    (tmp_path / ".out.json.capmerge-scratch").write_text("mine")
    with pytest.raises(OutputError, match="cannot be made"), ScratchFolder(tmp_path / "out.json"):
        pass
    assert (tmp_path / ".out.json.capmerge-scratch").read_text() == "mine"


@needs_linux
def test_a_forked_process_reads_what_it_asks_for(tmp_path):
    """Parent and child read at the same time through one handle, which has no position."""
    data = random.Random(2).randbytes(1 << 16)
    path = tmp_path / "file"
    path.write_bytes(data)
    shared = SharedFile(partial(FileSource, path))
    assert shared.window(0, 10) == data[:10]

    def reads_right(seed):
        starts = random.Random(seed).sample(range(1 << 16), 3000)
        return all(shared.window(start, 64) == data[start : start + 64] for start in starts)

    child = os.fork()
    if child == 0:
        os._exit(int(not reads_right(1)))
    assert reads_right(3)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
