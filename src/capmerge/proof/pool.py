"""The processes that answer the tasks of `verify`, apart from those that write a file.

A task and its answer are small, so both go through pipes, except for the bytes of blocks that only
the parent can read.
"""

import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import NamedTuple, Protocol, Self

from capmerge.errors import CapmergeError
from capmerge.metadata.steady_memory import steady_memory
from capmerge.processes import WorkerProcess, WorkerProcesses, bug_in_worker, serve
from capmerge.proof.digests import Answer, BlockDigests, Task

_QUEUED_TASKS = 2  # one being worked on, one waiting

MakeWork = Callable[[], BlockDigests]


class Ticket(Protocol):
    """A task that was handed out."""

    def answer(self) -> Answer:
        """Return the answer as soon as it is there; raises what ended the task early."""


class Here:
    """Answers tasks in this process, each when its answer is asked for."""

    def __init__(self, make_work: MakeWork) -> None:
        self._work = make_work()
        self.ahead = 1
        """The number of tasks of one file that are worth handing out before the first answer."""

    def submit(self, task: Task) -> Ticket:
        """Take a task."""
        return _TaskHere(self._work, task)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._work.close()


class _TaskHere(NamedTuple):
    work: BlockDigests
    task: Task

    def answer(self) -> Answer:
        with steady_memory():
            return self.work.answer(self.task)


class Workers:
    """Answers tasks in `jobs` other processes."""

    def __init__(self, make_work: MakeWork, jobs: int, start_method: str) -> None:
        self.ahead = jobs + 1
        self._processes = WorkerProcesses(
            _work_on_tasks,
            [(make_work,)] * jobs,
            start_method,
            "before its work was done, so not all records were compared",
        )
        self._workers = [_Worker(process) for process in self._processes.all]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._processes.end(at_once=kind is not None)

    def submit(self, task: Task) -> Ticket:
        """Hand out a task, as soon as a worker has room for it."""
        # The bytes of a block are sent to an idle worker only, because the parent would have to
        # wait for a busy one, which may be waiting for the parent.
        most = _QUEUED_TASKS if task.data is None else 1
        while len((worker := min(self._workers, key=lambda w: len(w.tickets))).tickets) >= most:
            self.collect()
        ticket = _TaskThere(self)
        worker.send(task, ticket)
        return ticket

    def collect(self) -> None:
        """Take in at least one answer."""
        busy = {worker.process.connection: worker for worker in self._workers if worker.tickets}
        for connection in wait(list(busy)):
            busy[connection].receive()  # type: ignore[index]


class _TaskThere:
    """A task that a worker has."""

    def __init__(self, workers: Workers) -> None:
        self._workers = workers
        self.result: Answer | CapmergeError | str | None = None
        """A string is the traceback of a bug."""

    def answer(self) -> Answer:
        while self.result is None:
            self._workers.collect()
        if isinstance(self.result, str):
            raise bug_in_worker(self.result)
        if isinstance(self.result, CapmergeError):
            raise self.result
        return self.result


class _Worker:
    """The parent's side of one worker process, which answers its tasks in their order."""

    def __init__(self, process: WorkerProcess) -> None:
        self.process = process
        self.tickets: list[_TaskThere] = []

    def send(self, task: Task, ticket: _TaskThere) -> None:
        self.process.send(task)
        self.tickets.append(ticket)

    def receive(self) -> None:
        result = self.process.receive()
        self.tickets.pop(0).result = result


def _work_on_tasks(connection: Connection, make_work: MakeWork) -> None:
    """Answer tasks until the parent closes the pipe, or ends. Runs in a worker."""
    work = make_work()
    with steady_memory():
        serve(connection, lambda task: _answer_or_error(work, task))


def _answer_or_error(work: BlockDigests, task: Task) -> Answer | CapmergeError | str:
    """The answer to a task, or the reason why there is none; a string is the traceback of a bug."""
    try:
        return work.answer(task)
    except CapmergeError as error:
        return error
    except Exception:  # noqa: BLE001  # a bug, whose traceback the parent shows
        return traceback.format_exc()
