import os
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from capmerge.errors import WorkerError
from capmerge.processes import START_METHOD, WorkerProcesses, serve

METHODS = ["fork", "spawn"] if sys.platform == "linux" else ["spawn"]


def _double(connection, plus):
    serve(connection, lambda number: (os.getpid(), 2 * number + plus))


def _stop_at_seven(connection):
    """A worker that is killed by its own hand at 7, and leaves at 8."""
    serve(connection, lambda n: os.kill(os.getpid(), signal.SIGKILL) if n == 7 else sys.exit(n))


def _sleep(connection):
    serve(connection, time.sleep)


def is_working(pid):
    """Whether there is such a process, apart from what is left until somebody asks for its end."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@contextmanager
def started(work, arguments, method=START_METHOD):
    """Workers that are ended at once when the test fails, and otherwise when they are done."""
    processes = WorkerProcesses(work, arguments, method, "while it slept")
    at_once = True
    try:
        yield processes.all
        at_once = False
    finally:
        processes.end(at_once=at_once)


@pytest.mark.parametrize("method", METHODS)
def test_each_worker_answers_with_its_arguments(method):
    """Every worker is a process of its own, which has its arguments and answers in order."""
    with started(_double, [(0,), (1,)], method) as workers:
        for worker in workers:
            worker.send(10)
            worker.send(20)
        found = [[worker.receive(), worker.receive()] for worker in workers]
        pids = [worker.process.pid for worker in workers]
    assert found == [[(pids[0], 20), (pids[0], 40)], [(pids[1], 21), (pids[1], 41)]]
    assert not any(map(is_working, pids))


@pytest.mark.parametrize(("number", "how"), [(7, "was killed by signal 9"), (8, "exit code 8")])
def test_a_worker_that_is_gone_is_told(number, how):
    """The message says which process ended, how, and what that breaks off."""
    with started(_stop_at_seven, [()]) as (worker,):
        worker.send(number)
        with pytest.raises(
            WorkerError, match=rf"^worker process \d+ .*{how} while it slept\. Often"
        ):
            worker.receive()


def test_workers_can_be_ended_at_once():
    """Workers in the middle of their work are not waited for when that is not wanted any more."""
    began = time.monotonic()
    workers = WorkerProcesses(_sleep, [(), ()], START_METHOD, "early")
    for worker in workers.all:
        worker.send(100)
    workers.end(at_once=True)
    assert time.monotonic() - began < 50
    assert [worker.process.is_alive() for worker in workers.all] == [False, False]


@pytest.mark.parametrize("method", METHODS)
def test_a_worker_does_not_outlive_its_parent(method):
    """A worker that works when its parent is killed is gone soon after."""
    code = (
        "import os, signal, sys; sys.path[:0] = sys.argv[1:]\n"
        "from test_processes import WorkerProcesses, _sleep\n"
        f"if __name__ == '__main__':\n"
        f"    workers = WorkerProcesses(_sleep, [(), ()], '{method}', 'early')\n"
        "    for worker in workers.all: worker.send(100)\n"
        "    print(*(worker.process.pid for worker in workers.all), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=False,
    )
    pids = [int(pid) for pid in done.stdout.split()]
    assert len(pids) == 2, done.stderr
    end = time.monotonic() + 30
    while any(map(is_working, pids)):
        assert time.monotonic() < end
        time.sleep(0.02)
