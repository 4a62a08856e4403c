"""Work on many files in several processes, with the results in the order of the files.

Unlike `metadata.pool`, which cuts one big file into blocks, a worker here is sent the paths of some
files and sends back one small result for each.
"""

import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Generic, Self, TypeVar

from capmerge.errors import WorkerError

Result = TypeVar("Result")

_FILES_PER_MESSAGE = 128


class FilePool(Generic[Result]):
    """Up to `jobs` processes that apply `work`, a function of a path, to files.

    They start when there is enough work for two, and live as long as the context of the pool. With
    one job there are none, and the work is done here.
    """

    def __init__(self, work: Callable[[str], Result], jobs: int) -> None:
        self._work, self._jobs = work, jobs
        self._workers: list[tuple[Connection, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for connection, process in self._workers:
            connection.close()
            if kind is not None:
                process.terminate()
        for _, process in self._workers:
            process.join()

    def map(self, paths: Iterable[str]) -> Iterator[Result]:
        """Yield the result of each file, in the order of the paths.

        Raises `WorkerError` when a process has ended before its work was done.
        """
        rest = iter(paths)
        parts = iter(lambda: list(islice(rest, _FILES_PER_MESSAGE)), [])
        first = next(parts, [])
        if self._jobs > 1 and not self._workers and len(first) == _FILES_PER_MESSAGE:
            self._start()
        if not self._workers:
            for part in chain((first,), parts):
                yield from map(self._work, part)
            return

        # Every worker has one message at a time, so neither side waits for the other to read.
        busy: deque[tuple[Connection, Any]] = deque()
        todo = chain((first,), parts)
        for worker, part in zip(self._workers, todo, strict=False):
            _send(worker, part)
            busy.append(worker)
        while busy:
            worker = busy.popleft()
            results = _receive(worker)
            part = next(todo, [])
            if part:
                _send(worker, part)
                busy.append(worker)
            yield from results

    def _start(self) -> None:
        method = "fork" if sys.platform == "linux" else "spawn"
        context: Any = multiprocessing.get_context(method)
        pipes = [context.Pipe() for _ in range(self._jobs)]
        for ours, theirs in pipes:
            # A forked child inherits every end that is open now. It must close them, or it would
            # never notice that its parent has died.
            inherited = (
                [end for pair in pipes for end in pair if end is not theirs]
                if method == "fork"
                else []
            )
            process = context.Process(
                target=_serve, args=(theirs, inherited, self._work), daemon=True
            )
            process.start()
            self._workers.append((ours, process))
        for _, theirs in pipes:
            theirs.close()


def _serve(
    connection: Connection, inherited: list[Connection], work: Callable[[str], object]
) -> None:
    """Work on the files of one message after the other until the parent closes the pipe, or ends.

    Runs in a worker.
    """
    # Ctrl-C reaches all processes of the group, and the parent decides what it means.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for end in inherited:
        end.close()
    while True:
        try:
            paths = connection.recv()
        except (EOFError, OSError):
            return
        results = [work(path) for path in paths]
        try:
            connection.send(results)
        except OSError:
            return  # the parent has ended


def _send(worker: tuple[Connection, Any], part: list[str]) -> None:
    try:
        worker[0].send(part)
    except OSError as error:
        raise _death(worker[1]) from error


def _receive(worker: tuple[Connection, Any]) -> list[Any]:
    try:
        results: list[Any] = worker[0].recv()
    except (EOFError, OSError) as error:
        raise _death(worker[1]) from error
    return results


def _death(process: Any) -> WorkerError:
    process.join(5)
    code = process.exitcode
    how = f"was killed by signal {-code}" if code and code < 0 else f"ended with exit code {code}"
    return WorkerError(
        f"worker process {process.pid} {how} while it read latents. Often this means that the "
        "system ran out of memory: run again with a smaller --jobs."
    )
