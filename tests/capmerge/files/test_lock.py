import errno
import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest
from builders.metadata import HANG_SECONDS, wait_until

from capmerge.files import lock
from capmerge.files.lock import open_locked

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs fork or POSIX locks")

HOLD = """
import sys, pathlib
from capmerge.files.lock import open_locked
file = open_locked(pathlib.Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""
HOLD_AND_FORK = """
import os, sys, pathlib, time
from capmerge.files.lock import open_locked
file = open_locked(pathlib.Path(sys.argv[1]))
child = os.fork()
if child == 0:
    time.sleep(600)
print(child, flush=True)
sys.stdin.read()
"""


def started(code, path):
    """Start a process that runs `code` on `path`; returns it and the first line that it prints."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    return process, process.stdout.readline()


def test_one_process_excludes_another(tmp_path):
    """The file is refused while another process holds it, and given when that one ends."""
    path = tmp_path / "lock"
    holder, _ = started(HOLD, path)
    with holder:
        with pytest.raises(BlockingIOError):
            open_locked(path)
        holder.communicate(timeout=HANG_SECONDS)
    open_locked(path).close()


def test_waiting_ends_when_the_holder_is_killed(tmp_path):
    """A waiting thread gets the file when the other process is gone, and not before."""
    path = tmp_path / "lock"
    holder, _ = started(HOLD, path)
    given = []
    waiting = threading.Thread(target=lambda: given.append(open_locked(path, wait=True)))
    with holder:
        waiting.start()
        waiting.join(0.3)
        assert given == []
        holder.kill()
    waiting.join(HANG_SECONDS)
    given[0].close()


@posix_only
def test_a_child_that_outlives_its_killed_parent_holds_nothing(tmp_path):
    """A forked worker inherits the open file, but the lock still ends with its parent."""
    path = tmp_path / "lock"
    holder, child = started(HOLD_AND_FORK, path)
    with holder:
        holder.kill()
        holder.wait(HANG_SECONDS)
        try:
            assert psutil.Process(int(child)).is_running()
            open_locked(path).close()
        finally:
            os.kill(int(child), signal.SIGKILL)


@posix_only
def test_a_forked_child_asks_the_kernel(tmp_path):
    """A child is refused the file that its parent holds, and gets it when the parent is done."""
    path = tmp_path / "lock"
    held = open_locked(path)
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(HANG_SECONDS // 4)  # a child that waits for ever ends the test too
        try:
            open_locked(path)
        except BlockingIOError:
            os.write(writing, b"refused, ")
        try:
            open_locked(path, wait=True)
            os.write(writing, b"given")
        finally:
            os._exit(0)
    os.close(writing)
    said = os.read(reading, 100)
    held.close()
    said += os.read(reading, 100)
    os.close(reading)
    os.waitpid(child, 0)
    assert said == b"refused, given"


def test_one_process_excludes_itself(tmp_path):
    """A second open in one process is refused, and does not give up the lock of the first."""
    path = tmp_path / "lock"
    with open_locked(path):
        for _ in range(2):
            with pytest.raises(BlockingIOError):
                open_locked(path)
        other = subprocess.run([sys.executable, "-c", HOLD, path], capture_output=True, check=False)
        assert b"BlockingIOError" in other.stderr
    open_locked(path).close()


def test_threads_take_turns(tmp_path):
    """Eight threads that wait for one file never hold it at the same time."""
    path = tmp_path / "lock"
    inside, together = [], []

    def enter():
        with open_locked(path, wait=True):
            inside.append(None)
            together.append(len(inside))
            time.sleep(0.01)
            inside.pop()

    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(HANG_SECONDS)
    assert together == [1] * 8


def test_content_is_kept_and_can_be_written(tmp_path):
    """Locking truncates nothing, and the file can be read and written through the lock."""
    path = tmp_path / "lock"
    path.write_bytes(b"old")
    with open_locked(path) as file:
        assert file.read() == b"old"
        file.write(b" and new")
    assert path.read_bytes() == b"old and new"


def test_a_file_that_its_holder_renamed_is_opened_anew(tmp_path):
    """A name is free again when the holder has renamed its file, which itself stays locked."""
    path, final = tmp_path / "lock", tmp_path / "final"
    with open_locked(path) as first:
        path.rename(final)
        with open_locked(path) as second:
            assert not os.path.samestat(os.fstat(first.fileno()), os.fstat(second.fileno()))
        with pytest.raises(BlockingIOError):
            open_locked(final)


@posix_only
def test_a_file_system_without_locks_goes_on(tmp_path, monkeypatch):
    """Where the kernel has no locks, every process gets the file; any other error is raised."""

    def fails(code):
        def lockf(*_):
            raise OSError(code, os.strerror(code))

        monkeypatch.setattr(lock.fcntl, "lockf", lockf)

    fails(errno.ENOLCK)
    open_locked(tmp_path / "lock").close()
    fails(errno.EIO)
    with pytest.raises(OSError, match="Input/output"):
        open_locked(tmp_path / "lock")


def test_no_descriptor_stays_open(tmp_path):
    """Refused and released files leave no descriptor open."""
    path = tmp_path / "lock"
    open_locked(path).close()
    before = psutil.Process().num_fds() if os.name == "posix" else psutil.Process().num_handles()
    holder, _ = started(HOLD, path)
    with holder:
        for _ in range(5):
            with pytest.raises(BlockingIOError):
                open_locked(path)
        holder.communicate(timeout=HANG_SECONDS)
    for _ in range(5):
        open_locked(path).close()
    assert wait_until(
        lambda: (
            before
            == (
                psutil.Process().num_fds() if os.name == "posix" else psutil.Process().num_handles()
            )
        )
    )
