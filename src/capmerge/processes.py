"""Worker processes: how they start, how they end with their parent, and what a killed one means.

Each worker has a pipe to its parent. What is sent through it, and in which order, is the story of
the module that starts the workers.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

from capmerge.errors import CapmergeError, WorkerError

START_METHOD = "fork" if sys.platform == "linux" else "spawn"
"""Fork is cheap, and safe on Linux as long as no thread runs yet."""
_PR_SET_PDEATHSIG = 1  # of <linux/prctl.h>


class WorkerProcess:
    """The parent's side of one worker process. `when` says what its death breaks off."""

    def __init__(self, connection: Connection, process: Any, when: str) -> None:
        self.connection, self.process, self._when = connection, process, when

    def send(self, message: object) -> None:
        """Send a message; raises `WorkerError` when the process has ended."""
        try:
            self.connection.send(message)
        except OSError as error:
            raise self._death() from error

    def receive(self) -> Any:
        """The next message, as soon as it is there.

        Raises `WorkerError` as `send` does, and the error that `serve` sends instead of an answer.
        """
        try:
            message = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        if isinstance(message, CapmergeError):
            raise message
        return message

    def _death(self) -> WorkerError:
        self.process.join(5)
        code = self.process.exitcode
        how = (
            f"was killed by signal {-code}"
            if code is not None and code < 0
            else f"ended with exit code {code}"
        )
        return WorkerError(
            f"worker process {self.process.pid} {how} {self._when}. Often this means that the "
            "system ran out of memory: run again with a smaller --jobs."
        )


class WorkerProcesses:
    """Worker processes, one for each element of `arguments`.

    Each calls `work` with its end of the pipe and those arguments; with "spawn", all of it has to
    be picklable. `when` ends the sentence "worker process 7 was killed by signal 9 ...".
    """

    def __init__(
        self,
        work: Callable[..., None],
        arguments: Iterable[tuple[Any, ...]],
        start_method: str,
        when: str,
    ) -> None:
        # Any, because the base class in the type stubs has no Process.
        context: Any = multiprocessing.get_context(start_method)
        pipes = [(context.Pipe(), given) for given in arguments]
        ends = [end for pair, _ in pipes for end in pair]
        self.all: list[WorkerProcess] = []
        for (ours, theirs), given in pipes:
            # A forked child inherits every end that is open now. It must close them, or it would
            # never notice that its parent has died.
            inherited = [end for end in ends if end is not theirs] if start_method == "fork" else []
            process = context.Process(
                target=_begin, args=(theirs, inherited, work, given), daemon=True
            )
            process.start()
            self.all.append(WorkerProcess(ours, process, when))
        for (_, theirs), _ in pipes:
            theirs.close()

    def end(self, *, at_once: bool) -> None:
        """Close the pipes, at which workers end, and wait for all; `at_once` breaks off their work.

        To be called once, whatever happened since the start.
        """
        for worker in self.all:
            worker.connection.close()
            if at_once:
                worker.process.terminate()
        for worker in self.all:
            worker.process.join()


def bug_in_worker(trace: str) -> RuntimeError:
    """The error for a bug in a worker process, whose traceback is the text `trace`."""
    return RuntimeError(f"a worker process failed:\n{trace}")


def serve(connection: Connection, answer: Callable[[Any], object]) -> None:
    """Answer one message after the other until the parent closes the pipe, or ends.

    For the `work` of a worker whose messages each have one answer. A `CapmergeError` that `answer`
    raises is sent instead of it.
    """
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            return
        try:
            found = answer(message)
        except CapmergeError as error:
            found = error
        try:
            connection.send(found)
        except OSError:
            return  # the parent has ended


def _begin(
    connection: Connection,
    inherited: list[Connection],
    work: Callable[..., None],
    arguments: tuple[Any, ...],
) -> None:
    """Run a worker process from its start to its end."""
    _end_with_parent()
    # Ctrl-C reaches all processes of the group, and the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for end in inherited:
        end.close()
    work(connection, *arguments)


def _end_with_parent() -> None:
    """End this process as soon as its parent has ended, also in the middle of its work.

    A worker looks at its pipe only between two messages.
    """
    kill_with_parent()
    Thread(target=_wait_for_parent, daemon=True).start()


def kill_with_parent() -> None:
    """Let the kernel kill this process when its parent ends; only Linux does that.

    It is done at once, also in a long call of C code, in which no thread runs.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL))


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker is a child
    parent.join()
    os._exit(1)
