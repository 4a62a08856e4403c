"""Work on many files in several processes, with the results in the order of the files.

Unlike `metadata.pool`, which cuts one big file into blocks, a worker here is sent the names of some
files and sends back one small result for each.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from itertools import chain, islice
from multiprocessing.connection import Connection
from typing import Generic, Self, TypeVar

from capmerge.processes import START_METHOD, WorkerProcess, WorkerProcesses, serve

Item = TypeVar("Item")
Result = TypeVar("Result")

_FILES_PER_MESSAGE = 128


class FilePool(Generic[Item, Result]):
    """Up to `jobs` processes that apply `work` to items, each of which names a file or several.

    They start when there is enough work for two, and live as long as the context of the pool. With
    one job there are none, and the work is done here. A message to a process has `per_message`
    items, where there is much to do for one item.
    """

    def __init__(
        self, work: Callable[[Item], Result], jobs: int, *, per_message: int | None = None
    ) -> None:
        self._work, self._jobs = work, jobs
        self._workers: WorkerProcesses | None = None
        self._per_message = per_message or _FILES_PER_MESSAGE

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._workers:
            self._workers.end(at_once=kind is not None)

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """Yield the result of each item, in their order.

        Raises `WorkerError` when a process has ended before its work was done, and a
        `CapmergeError` that `work` raises.
        """
        rest = iter(items)
        parts = iter(lambda: list(islice(rest, self._per_message)), [])
        first = next(parts, [])
        if self._jobs > 1 and not self._workers and len(first) == self._per_message:
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


def _serve(connection: Connection, work: Callable[[Item], object]) -> None:
    """Work on the items of one message after the other. Runs in a worker."""
    serve(connection, lambda items: [work(item) for item in items])
