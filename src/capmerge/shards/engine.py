"""The engine of this machine: worker processes that rewrite one shard after the other."""

import signal
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

from capmerge.errors import WorkerError
from capmerge.processes import START_METHOD, WorkerProcess, WorkerProcesses, bug_in_worker
from capmerge.shards.job import Failure, Job
from capmerge.shards.task import run_task


def run_here(
    job: Job,
    names: Sequence[str],
    tasks: int,
    workers: int,
    done: Callable[[str], None],
    *,
    forks: bool,
) -> list[Failure]:
    """Rewrite shards in `tasks` groups, of which `workers` processes work on one at a time each.

    Returns the shards that failed. `done` is told each shard that is done or failed. With `forks`
    the processes are forked where that is usual. A process that is killed fails its shard, and the
    other processes do the rest of its group.
    """
    groups = deque(deque(names[rank::tasks]) for rank in range(min(tasks, len(names))))
    if min(workers, len(groups)) <= 1:
        return [failure for group in groups for failure in run_task(job, group, done)]
    processes = WorkerProcesses(
        _work,
        [(job,)] * min(workers, len(groups)),
        START_METHOD if forks else "spawn",
        "while it rewrote a shard",
    )
    finished = False
    try:
        failures = _shared_out(processes.all, groups, done)
        finished = True
    finally:
        processes.end(at_once=not finished)
    return failures


def _shared_out(
    workers: list[WorkerProcess], groups: deque[deque[str]], done: Callable[[str], None]
) -> list[Failure]:
    """Hand out the shards one by one, each group to one worker; returns those that failed."""
    failures: list[Failure] = []
    idle, busy = list(workers), dict[Any, tuple[WorkerProcess, str, deque[str]]]()
    while True:
        while idle and groups:
            worker, group = idle.pop(), groups.popleft()
            name = group.popleft()
            busy[worker.connection] = worker, name, group
            worker.send(name)
        if not busy:
            break
        for connection in wait([*busy]):
            worker, name, group = busy.pop(connection)
            try:
                answer = worker.receive()
            except WorkerError as error:
                failures.append(Failure(name, str(error)))
            else:
                if isinstance(answer, str):
                    raise bug_in_worker(answer)
                failures += answer
                idle.append(worker)
            done(name)
            if group:
                groups.appendleft(group)  # the worker itself takes it next
    failures += [
        Failure(name, "no worker process was left for this shard. Run the same command again.")
        for group in groups
        for name in group
    ]
    return failures


def _work(connection: Connection, job: Job) -> None:
    """Rewrite the shards whose names come through the pipe; the answer is what failed."""
    # A worker that is ended removes its temporary files.
    signal.signal(signal.SIGTERM, _end)
    while True:
        try:
            name = connection.recv()
        except (EOFError, OSError):
            return
        answer: list[Failure] | str
        try:
            answer = run_task(job, [name])
        except Exception:  # noqa: BLE001  # a bug, which the parent shows
            answer = traceback.format_exc()
        try:
            connection.send(answer)
        except OSError:
            return  # the parent has ended


def _end(_signal: int, _frame: object) -> None:
    raise SystemExit(143)
