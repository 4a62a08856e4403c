"""Work on many files in several processes, with the results in the order of the files.

Unlike `metadata.pool`, which cuts one big file into blocks, a worker here is sent the paths of some
files and sends back one small result for each.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from multiprocessing.connection import Connection
from typing import Generic, Self, TypeVar

from capmerge.processes import START_METHOD, WorkerProcess, WorkerProcesses, serve

Result = TypeVar("Result")

_FILES_PER_MESSAGE = 128


class FilePool(Generic[Result]):
    """Up to `jobs` processes that apply `work`, a function of a path, to files.

    They start when there is enough work for two, and live as long as the context of the pool. With
    one job there are none, and the work is done here.
    """

    def __init__(self, work: Callable[[str], Result], jobs: int) -> None:
        self._work, self._jobs = work, jobs
        self._workers: WorkerProcesses | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._workers:
            self._workers.end(at_once=kind is not None)

    def map(self, paths: Iterable[str]) -> Iterator[Result]:
        """Yield the result of each file, in the order of the paths.

        Raises `WorkerError` when a process has ended before its work was done.
        """
        rest = iter(paths)
        parts = iter(lambda: list(islice(rest, _FILES_PER_MESSAGE)), [])
        first = next(parts, [])
        if self._jobs > 1 and not self._workers and len(first) == _FILES_PER_MESSAGE:
            self._workers = WorkerProcesses(
                _serve, [(self._work,)] * self._jobs, START_METHOD, "while it read latents"
            )
        if not self._workers:
            for part in chain((first,), parts):
                yield from map(self._work, part)
            return

        # Every worker has one message at a time, so neither side waits for the other to read.
        busy: deque[WorkerProcess] = deque()
        todo = chain((first,), parts)
        for worker, part in zip(self._workers.all, todo, strict=False):
            worker.send(part)
            busy.append(worker)
        while busy:
            worker = busy.popleft()
            results = worker.receive()
            part = next(todo, [])
            if part:
                worker.send(part)
                busy.append(worker)
            yield from results


def _serve(connection: Connection, work: Callable[[str], object]) -> None:
    """Work on the files of one message after the other. Runs in a worker."""
    serve(connection, lambda paths: [work(path) for path in paths])
