"""Blocks of a source through N worker processes and back into order: one stream of bytes, the same for any N.

The parent only looks for cuts and writes. Workers read their blocks themselves (those of a pipe or
gzip source are handed over), work on them, and answer through slots of shared memory; the pipes
between carry a few hundred bytes a block. A worker has a few slots and at most two blocks waiting,
so memory is bounded whatever the output grows to.
"""

import multiprocessing
import selectors
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Protocol, Self

from capmerge.errors import DataError, WorkerError
from capmerge.files.source import Source
from capmerge.metadata.blocks import BLOCK_BYTES, Block, Layout, next_block, walked_block
from capmerge.metadata.codec import MiscutError
from capmerge.metadata.worker import (
    Answer,
    Free,
    Slots,
    Task,
    Work,
    no_garbage_collection,
    work_on_blocks,
)

_QUEUED_BLOCKS = 2  # one at work, one waiting


class Sink(Protocol):
    """Where a stream goes."""

    def write(self, data: bytes | memoryview, *, new_block: bool) -> None:
        """Append `data`; `new_block` says that it begins the output of a block."""


def run_blocks(
    source: Source,
    layout: Layout,
    make_work: Callable[[], Work],
    sinks: list[Sink],
    *,
    jobs: int,
    progress: Callable[[int], None] | None = None,
    collect: Callable[[Any], None] | None = None,
    start_method: str | None = None,
) -> None:
    """Work on every block, write the streams to their sinks in the source's order, and `collect` the processes' results.

    Each process has one result or more; they come in any order. `make_work` is called once in each
    process; it must be picklable. `progress` is told the offset that is done. `start_method` is
    "fork" or "spawn"; the default is fork on Linux, where it is cheap and safe (no thread runs
    yet).
    """
    if jobs == 1:
        with no_garbage_collection():
            _run_here(source, layout, make_work(), sinks, collect, progress)
            return
    with _Pool(
        source,
        layout,
        make_work,
        jobs,
        start_method or ("fork" if sys.platform == "linux" else "spawn"),
    ) as pool:
        pool.run(sinks, collect, progress)


def useful_jobs(source: Source, jobs: int) -> int:
    """No more processes than there are blocks."""
    if source.path is None or source.total_bytes is None:
        return jobs
    return max(1, min(jobs, source.total_bytes // BLOCK_BYTES))


def _run_here(
    source: Source,
    layout: Layout,
    work: Work,
    sinks: list[Sink],
    collect: Callable[[Any], None] | None,
    progress: Callable[[int], None] | None,
) -> None:
    """The whole story in one process."""
    block = next_block(source, layout, layout.first)
    while True:
        output = _BlockOutput(sinks)
        try:
            for stream, chunk in work.run(
                block, source.window(block.start, block.end - block.start)
            ):
                output.write(stream, chunk)
        except MiscutError as error:
            work.keep(work.take())
            block = walked_block(source, layout, error.offset)
            continue
        work.keep(work.take())
        if progress:
            progress(block.end)
        if collect and (block.last or work.is_full()):
            collect(work.result())
        if block.last:
            return
        source.release(block.next_start)
        block = next_block(source, layout, block.next_start)


class _BlockOutput:
    """The output of one block on its way to the sinks."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks
        self._begun: set[int] = set()

    def write(self, stream: int, chunk: bytes | memoryview) -> None:
        self._sinks[stream].write(chunk, new_block=stream not in self._begun)
        self._begun.add(stream)


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, context: Any, start_method: str) -> None:
        self.connection, self.far_end = context.Pipe()
        self.slots = Slots(start_method)
        self.queued = 0
        self.process: Any = None

    def send(self, message: Task | Free | None) -> None:
        try:
            self.connection.send(message)
        except OSError as error:
            raise self.death() from error

    def receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, OSError) as error:
            raise self.death() from error

    def death(self) -> WorkerError:
        """The error for a worker that is gone."""
        self.process.join(5)
        code = self.process.exitcode
        how = (
            f"was killed by signal {-code}"
            if code is not None and code < 0
            else f"ended with exit code {code}"
        )
        return WorkerError(
            f"worker process {self.process.pid} {how} before its work was done, so the output is not complete. "
            "Often the system was out of memory: run again, with a smaller --jobs."
        )


@dataclass(slots=True)
class _Pending:
    """A block that is handed out and not yet written."""

    block: Block
    worker: _Worker
    output: _BlockOutput
    answers: deque[Answer] = field(default_factory=deque)


class _Pool:
    """The worker processes of one run."""

    def __init__(
        self,
        source: Source,
        layout: Layout,
        make_work: Callable[[], Work],
        jobs: int,
        start_method: str,
    ) -> None:
        self._source, self._layout = source, layout
        context: Any = multiprocessing.get_context(
            start_method
        )  # the base class in the stubs has no Process
        self._workers = [_Worker(context, start_method) for _ in range(jobs)]
        ends = [end for worker in self._workers for end in (worker.connection, worker.far_end)]
        for worker in self._workers:
            # A forked child holds every end that is open now; it must close them, or it would never
            # see its parent die.
            inherited = (
                [end for end in ends if end is not worker.far_end] if start_method == "fork" else []
            )
            arguments = (worker.far_end, inherited, worker.slots, make_work, source.path)
            worker.process = context.Process(target=work_on_blocks, args=arguments, daemon=True)
            worker.process.start()
        for worker in self._workers:
            worker.far_end.close()
        self._by_end = {worker.connection: worker for worker in self._workers}
        self._ready = _waiter(list(self._by_end))

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
            worker.slots.close(unlink=True)

    def run(
        self,
        sinks: list[Sink],
        collect: Callable[[Any], None] | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        """Hand out blocks, write what comes back in order."""
        pending: dict[int, _Pending] = {}  # in the source's order
        void: dict[int, _Pending] = {}  # blocks that began at a wrong cut
        count = 0
        upcoming: Block | DataError | None = self._upcoming(self._layout.first)
        while True:
            while isinstance(upcoming, Block) and (worker := self._free_worker()):
                data = (
                    None
                    if self._source.path
                    else self._source.window(upcoming.start, upcoming.end - upcoming.start)
                )
                pending[count] = _Pending(upcoming, worker, _BlockOutput(sinks))
                worker.queued += 1
                worker.send(Task(count, upcoming, data))
                count += 1
                upcoming = self._after(upcoming)
            if not pending and isinstance(upcoming, DataError):
                raise upcoming
            if not pending and not void:
                self._collect_last(collect)
                return
            for answer, worker in self._receive():
                if answer.finished:
                    worker.queued -= 1
                if answer.result is not None:
                    if collect:
                        collect(answer.result)
                    answer.result = None  # the answer may wait for the blocks before it
                if answer.number in pending:
                    pending[answer.number].answers.append(answer)
                else:
                    worker.send(
                        Free(answer.slot, answer.number if answer.finished else None, stands=False)
                    )
                    if answer.finished:
                        del void[answer.number]
            while pending:
                number, head = next(iter(pending.items()))
                if not head.answers:
                    break
                answer = head.answers.popleft()
                slot = head.worker.slots[answer.slot]
                for stream, start, end in answer.chunks:
                    head.output.write(stream, slot[start:end])
                head.worker.send(Free(answer.slot, number if answer.finished else None))
                if not answer.finished:
                    continue
                del pending[number]
                if isinstance(answer.error, MiscutError):
                    for dropped, block in pending.items():
                        for waiting in block.answers:
                            block.worker.send(
                                Free(
                                    waiting.slot,
                                    dropped if waiting.finished else None,
                                    stands=False,
                                )
                            )
                        if not block.answers or not block.answers[-1].finished:
                            void[dropped] = block
                    pending.clear()
                    upcoming = self._upcoming(answer.error.offset, find=walked_block)
                elif isinstance(answer.error, str):
                    raise RuntimeError(f"a worker process failed:\n{answer.error}")  # noqa: TRY004  # no wrong type
                elif answer.error:
                    raise answer.error
                else:
                    if progress:
                        progress(head.block.end)
                    self._source.release(head.block.next_start)

    def _after(self, block: Block) -> Block | DataError | None:
        """The block behind `block`; None when that was the last."""
        return None if block.last else self._upcoming(block.next_start)

    def _upcoming(
        self, start: int, find: Callable[[Source, Layout, int], Block] = next_block
    ) -> Block | DataError:
        """The block at `start`, or the error in its place: the blocks before it come first, and may turn out to be cut wrong."""
        try:
            return find(self._source, self._layout, start)
        except DataError as error:
            return error

    def _free_worker(self) -> _Worker | None:
        worker = min(self._workers, key=lambda worker: worker.queued)
        # A block that is sent as bytes goes to an idle worker: sending to a busy one would hold the
        # parent up.
        return worker if worker.queued < (_QUEUED_BLOCKS if self._source.path else 1) else None

    def _receive(self) -> list[tuple[Answer, _Worker]]:
        """At least one answer; raises `WorkerError` when a worker is gone."""
        workers = [self._by_end[end] for end in self._ready()]
        return [(worker.receive(), worker) for worker in workers]

    def _collect_last(self, collect: Callable[[Any], None] | None) -> None:
        for worker in self._workers:
            worker.send(None)
        for worker in self._workers:
            result = worker.receive()
            if collect:
                collect(result)


def _waiter(ends: list[Connection]) -> Callable[[], list[Connection]]:
    """A function that waits until some of `ends` can be read and returns those."""
    if sys.platform == "win32":
        return lambda: wait(ends)  # type: ignore[return-value]
    selector = selectors.DefaultSelector()  # wait() would build one for every call
    for end in ends:
        selector.register(end, selectors.EVENT_READ)
    return lambda: [key.fileobj for key, _ in selector.select()]  # type: ignore[misc]
