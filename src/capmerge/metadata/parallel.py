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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from types import TracebackType
from typing import Any, Self

from capmerge.errors import DataError, WorkerError
from capmerge.files.atomic import Buffer
from capmerge.files.source import Source
from capmerge.metadata.blocks import BLOCK_BYTES, Block, FileLayout, next_block, walked_block
from capmerge.metadata.codec import MiscutError
from capmerge.metadata.work import Sink, Stream, Work, iter_output
from capmerge.metadata.worker import (
    Answer,
    Free,
    Message,
    Slots,
    Task,
    no_garbage_collection,
    work_on_blocks,
)

_QUEUED_BLOCKS = 2  # one at work, one waiting


def run_blocks(
    source: Source,
    layout: FileLayout,
    make_work: Callable[[], Work],
    sinks: Mapping[Stream, Sink],
    *,
    jobs: int,
    progress: Callable[[int], None] | None = None,
    collect: Callable[[Any], None] | None = None,
    start_method: str | None = None,
) -> int:
    """Work on every block and write the streams to their sinks in the source's order.

    Returns the offset where the last block ends. `make_work` is called once in each process; it
    must be picklable. `collect` is given the counts of the processes: each has one result or more,
    and they come in any order; work that counts needs it. `progress` is told the offset that is
    done. `start_method` is "fork" or "spawn"; the default is fork on Linux, where it is cheap and
    safe (no thread runs yet).
    """
    receiver = _Receiver(sinks, collect, progress)
    if jobs == 1:
        with no_garbage_collection():
            return _run_here(source, layout, make_work(), receiver)
    with _Pool(
        source,
        layout,
        make_work,
        jobs,
        start_method or ("fork" if sys.platform == "linux" else "spawn"),
    ) as pool:
        return pool.run(receiver)


def useful_jobs(source: Source, jobs: int) -> int:
    """No more processes than there are blocks."""
    if source.path is None or source.total_bytes is None:
        return jobs
    return max(1, min(jobs, source.total_bytes // BLOCK_BYTES))


class _Receiver:
    """What takes in the output, the counts and the progress of a run."""

    def __init__(
        self,
        sinks: Mapping[Stream, Sink],
        collect: Callable[[Any], None] | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._sinks, self._collect, self._progress = sinks, collect, progress

    def begin_block(self) -> "_BlockOutput":
        return _BlockOutput(self._sinks)

    def add_counts(self, counts: Any) -> None:
        assert self._collect is not None  # whoever runs work that counts collects its counts
        self._collect(counts)

    def end_block(self, offset: int) -> None:
        """The blocks up to `offset` are written."""
        if self._progress:
            self._progress(offset)


class _BlockOutput:
    """The output of one block on its way to the sinks.

    A stream without a sink raises `KeyError`: it is a bug of whoever put work and sinks together.
    """

    def __init__(self, sinks: Mapping[Stream, Sink]) -> None:
        self._sinks = sinks
        self._begun: set[Stream] = set()

    def write(self, stream: Stream, chunk: Buffer) -> None:
        self._sinks[stream].write(chunk, new_block=stream not in self._begun)
        self._begun.add(stream)


def _run_here(source: Source, layout: FileLayout, work: Work, receiver: _Receiver) -> int:
    """The whole story in one process; the offset where the last block ends."""
    block = next_block(source, layout, layout.first)
    while True:
        output = receiver.begin_block()
        miscut = None
        try:
            # The bytes have no name here: they would be held while the next block is read.
            for stream, chunk in iter_output(
                work, block, source.window(block.start, block.end - block.start)
            ):
                output.write(stream, chunk)
        except MiscutError as error:
            miscut = error
        if work.counts:
            work.counts.keep(work.counts.take())
        if miscut:
            block = walked_block(source, layout, miscut.offset)
            continue
        receiver.end_block(block.end)
        if work.counts and (block.last or work.counts.is_full()):
            receiver.add_counts(work.counts.result())
        if block.last:
            return block.end
        source.release(block.next_start)
        block = next_block(source, layout, block.next_start)


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

    def receive(self) -> Message:
        try:
            message: Message = self.connection.recv()
        except (EOFError, OSError) as error:
            raise self.death() from error
        return message

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
class _PendingBlock:
    """A block that a worker has been given and whose output is not yet written whole."""

    block: Block
    worker: _Worker
    output: _BlockOutput
    answers: deque[Answer] = field(default_factory=deque)
    """Those that have come and wait for the blocks before this one."""


class _Pool:
    """The worker processes of one run."""

    def __init__(
        self,
        source: Source,
        layout: FileLayout,
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

    def run(self, receiver: _Receiver) -> int:
        """Hand out blocks and write their output in order; returns where the last one ends.

        A block is handed out before the blocks before it are proven to be cut right. When one of
        those was cut wrong, all blocks behind it are abandoned: their workers finish them in vain.
        """
        pending: dict[int, _PendingBlock] = {}  # by number, in the source's order
        abandoned: set[int] = set()  # the numbers of those that a worker still answers for
        count, end = 0, self._layout.first
        upcoming: Block | DataError | None = self._upcoming(self._layout.first)
        while True:
            # Hand out blocks as long as a worker has room for one more.
            while isinstance(upcoming, Block) and (worker := self._free_worker()):
                pending[count] = _PendingBlock(upcoming, worker, receiver.begin_block())
                worker.queued += 1
                worker.send(Task(count, upcoming, self._data(upcoming)))
                count += 1
                upcoming = self._after(upcoming)

            # Stop at an error in the source once all before it is written, or at the end.
            if not pending and isinstance(upcoming, DataError):
                raise upcoming
            if not pending and not abandoned:
                self._collect_last(receiver)
                return end

            # Take in what the workers have sent. Output of an abandoned block is not wanted.
            for answer, worker in self._receive(receiver):
                if answer.finished:
                    worker.queued -= 1
                if answer.number in pending:
                    pending[answer.number].answers.append(answer)
                else:
                    self._drop(answer, worker)
                    if answer.finished:
                        abandoned.remove(answer.number)

            # Write the output of the first pending block as far as it has come, then of the next.
            while pending:
                number, head = next(iter(pending.items()))
                if not head.answers:
                    break
                answer = head.answers.popleft()
                self._write(answer, head)
                if not answer.finished:
                    continue
                del pending[number]
                if isinstance(answer.error, MiscutError):
                    # What came before the wrong cut is written. From there on, a parser finds where
                    # the next block ends, and the blocks behind are cut anew.
                    abandoned |= self._abandon(pending)
                    upcoming = self._upcoming(answer.error.offset, find=walked_block)
                elif isinstance(answer.error, str):
                    raise RuntimeError(f"a worker process failed:\n{answer.error}")  # noqa: TRY004  # no wrong type
                elif answer.error:
                    raise answer.error
                else:
                    end = head.block.end
                    receiver.end_block(end)
                    self._source.release(head.block.next_start)

    def _data(self, block: Block) -> bytes | None:
        """The bytes of a block that its worker cannot read itself."""
        if self._source.path:
            return None
        return self._source.window(block.start, block.end - block.start)

    def _write(self, answer: Answer, pending: _PendingBlock) -> None:
        """Write an answer to the sinks, and give its slot back."""
        slot = pending.worker.slots[answer.slot]
        for stream, start, end in answer.chunks:
            pending.output.write(stream, slot[start:end])
        pending.worker.send(Free(answer.slot, answer.number if answer.finished else None))

    def _drop(self, answer: Answer, worker: _Worker) -> None:
        """Give the slot of an abandoned block's answer back; what the block counted is not kept."""
        finished = answer.number if answer.finished else None
        worker.send(Free(answer.slot, finished, stands=False))

    def _abandon(self, pending: dict[int, _PendingBlock]) -> set[int]:
        """Drop the output of all pending blocks.

        Returns the numbers of those that are not finished.
        """
        unfinished = set()
        for number, abandoned in pending.items():
            for answer in abandoned.answers:
                self._drop(answer, abandoned.worker)
            if not abandoned.answers or not abandoned.answers[-1].finished:
                unfinished.add(number)
        pending.clear()
        return unfinished

    def _after(self, block: Block) -> Block | DataError | None:
        """The block behind `block`; None when that was the last."""
        return None if block.last else self._upcoming(block.next_start)

    def _upcoming(
        self, start: int, find: Callable[[Source, FileLayout, int], Block] = next_block
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

    def _receive(self, receiver: _Receiver) -> list[tuple[Answer, _Worker]]:
        """At least one answer with its worker; counts that came along are collected.

        Raises `WorkerError` when a worker is gone.
        """
        answers = []
        for worker in [self._by_end[end] for end in self._ready()]:
            message = worker.receive()
            if message.counts is not None:
                receiver.add_counts(message.counts)
            assert message.answer is not None  # no worker has been told to end
            answers.append((message.answer, worker))
        return answers

    def _collect_last(self, receiver: _Receiver) -> None:
        """End the workers; each sends the counts that it has kept."""
        for worker in self._workers:
            worker.send(None)
        for worker in self._workers:
            counts = worker.receive().counts
            if counts is not None:
                receiver.add_counts(counts)


def _waiter(ends: list[Connection]) -> Callable[[], list[Connection]]:
    """A function that waits until some of `ends` can be read and returns those."""
    if sys.platform == "win32":
        return lambda: wait(ends)  # type: ignore[return-value]
    selector = selectors.DefaultSelector()  # wait() would build one for every call
    for end in ends:
        selector.register(end, selectors.EVENT_READ)
    return lambda: [key.fileobj for key, _ in selector.select()]  # type: ignore[misc]
