"""The processes that answer the tasks of `verify`, apart from those that write a file.

A task and its answer are small, so both go through pipes, except for the bytes of blocks that only
the parent can read.
"""

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, NamedTuple, Protocol, Self

from capmerge.errors import CapmergeError
from capmerge.metadata.worker import death_of, end_with_parent, steady_memory
from capmerge.proof.digests import Answer, BlockDigests, Task

_CONSEQUENCE = "not all records were compared"
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
        # Any, because the base class in the type stubs has no Process.
        context: Any = multiprocessing.get_context(start_method)
        pipes = [context.Pipe() for _ in range(jobs)]
        self._workers: list[_Worker] = []
        for ours, theirs in pipes:
            # A forked child inherits every end that is open now. It must close them, or it would
            # never notice that its parent has died.
            inherited = (
                [end for pair in pipes for end in pair if end is not theirs]
                if start_method == "fork"
                else []
            )
            process = context.Process(
                target=_work_on_tasks, args=(theirs, inherited, make_work), daemon=True
            )
            process.start()
            self._workers.append(_Worker(ours, process))
        for _, theirs in pipes:
            theirs.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for worker in self._workers:
            worker.connection.close()
            if kind is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join()

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
        busy = {worker.connection: worker for worker in self._workers if worker.tickets}
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
            # A bug, not a value of a wrong type.
            raise RuntimeError(f"a worker process failed:\n{self.result}")  # noqa: TRY004
        if isinstance(self.result, CapmergeError):
            raise self.result
        return self.result


class _Worker:
    """The parent's side of one worker process, which answers its tasks in their order."""

    def __init__(self, connection: Connection, process: Any) -> None:
        self.connection, self.process = connection, process
        self.tickets: list[_TaskThere] = []

    def send(self, task: Task, ticket: _TaskThere) -> None:
        try:
            self.connection.send(task)
        except OSError as error:
            raise death_of(self.process, _CONSEQUENCE) from error
        self.tickets.append(ticket)

    def receive(self) -> None:
        try:
            result = self.connection.recv()
        except (EOFError, OSError) as error:
            raise death_of(self.process, _CONSEQUENCE) from error
        self.tickets.pop(0).result = result


def _work_on_tasks(
    connection: Connection, inherited: list[Connection], make_work: MakeWork
) -> None:
    """Answer tasks until the parent closes the pipe, or ends. Runs in a worker."""
    end_with_parent()
    # Ctrl-C reaches all processes of the group, and the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for end in inherited:
        end.close()
    work = make_work()
    with steady_memory():
        while True:
            try:
                task = connection.recv()
            except (EOFError, OSError):
                return
            result: Answer | CapmergeError | str
            try:
                result = work.answer(task)
            except CapmergeError as error:
                result = error
            except Exception:  # noqa: BLE001  # a bug, whose traceback the parent shows
                result = traceback.format_exc()
            try:
                connection.send(result)
            except OSError:
                return  # the parent has ended
