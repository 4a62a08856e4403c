"""Hands blocks to worker processes and puts their output back into the order of the source.

The parent only looks for cuts and writes. Workers read their blocks themselves (those of a pipe or
gzip source are handed over), work on them, and answer through slots of shared memory; the pipes
between parent and workers carry a few hundred bytes per block. A worker has a few slots and at most
two blocks waiting, so memory is bounded, however large the output is.
"""

import selectors
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Self

from capmerge.errors import DataError
from capmerge.files.source import Source
from capmerge.metadata.blocks import Block, FileLayout
from capmerge.metadata.cuts import next_block
from capmerge.metadata.pieces import MiscutError, recut
from capmerge.metadata.receiver import BlockOutput, Receiver
from capmerge.metadata.work import Work
from capmerge.metadata.worker import Answer, Free, Message, Slots, Task, work_on_blocks
from capmerge.processes import WorkerProcess, WorkerProcesses, bug_in_worker

_QUEUED_BLOCKS = 2  # one being worked on, one waiting


@dataclass(slots=True)
class _Worker:
    """The parent's side of one worker process, with its shared memory."""

    process: WorkerProcess
    slots: Slots
    queued: int = 0
    """The number of blocks that it was handed and has not finished."""


@dataclass(slots=True)
class _PendingBlock:
    """A block that was handed to a worker and whose output is not completely written yet."""

    block: Block
    worker: _Worker
    output: BlockOutput
    answers: deque[Answer] = field(default_factory=deque)
    """The answers that have arrived and wait for the blocks before this one."""


class Pool:
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
        slots = [Slots(start_method) for _ in range(jobs)]
        self._processes = WorkerProcesses(
            work_on_blocks,
            [(memory, make_work, source.reopener()) for memory in slots],
            start_method,
            "before its work was done, so the output is not complete",
        )
        self._workers = list(map(_Worker, self._processes.all, slots))
        self._by_end = {worker.process.connection: worker for worker in self._workers}
        self._ready = _waiter(list(self._by_end))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._processes.end(at_once=kind is not None)
        for worker in self._workers:
            worker.slots.close(unlink=True)

    def run(self, receiver: Receiver) -> int:
        """Hand out blocks and write their output in order; returns where the last one ends.

        A block is handed out before the blocks before it are proven to be cut right. When one of
        those was cut wrong, all blocks after it are abandoned: their workers finish them in vain.
        """
        pending: dict[int, _PendingBlock] = {}  # by number, in the source's order
        abandoned: set[int] = set()  # the numbers of blocks that a worker has not finished yet
        count, end = 0, self._layout.first
        upcoming: Block | DataError | None = self._upcoming(self._layout.first)
        while True:
            # Hand out blocks as long as a worker has room for one more.
            while isinstance(upcoming, Block) and (worker := self._free_worker()):
                pending[count] = _PendingBlock(upcoming, worker, receiver.begin_block())
                worker.queued += 1
                worker.process.send(Task(count, upcoming, self._data(upcoming)))
                count += 1
                upcoming = self._after(upcoming)

            # Stop at an error in the source once all blocks before it are written, or at the end.
            if not pending and isinstance(upcoming, DataError):
                raise upcoming
            if not pending and not abandoned:
                self._collect_last(receiver)
                return end

            # Take in what the workers have sent, and drop the output of abandoned blocks.
            for answer, worker in self._receive(receiver):
                if answer.finished:
                    worker.queued -= 1
                if answer.number in pending:
                    pending[answer.number].answers.append(answer)
                else:
                    self._drop(answer, worker)
                    if answer.finished:
                        abandoned.remove(answer.number)

            # Write the output of the first pending block as far as it has arrived. Once that block
            # is finished, go on with the next.
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
                    # The output before the wrong cut is written. A parser finds the end of the
                    # block that starts there, and the blocks after it are cut anew.
                    abandoned |= self._abandon(pending)
                    upcoming = self._recut(head.block, answer.error)
                elif isinstance(answer.error, str):
                    raise bug_in_worker(answer.error)
                elif answer.error:
                    raise answer.error
                else:
                    end = head.block.end
                    receiver.end_block(end)
                    self._source.release(head.block.next_start)

    def _data(self, block: Block) -> bytes | None:
        """The bytes of a block if its worker cannot read them itself, else None."""
        if self._source.path:
            return None
        return self._source.window(block.start, block.end - block.start)

    def _write(self, answer: Answer, pending: _PendingBlock) -> None:
        """Write an answer to the sinks, and free its slot."""
        slot = pending.worker.slots[answer.slot]
        for stream, start, end in answer.chunks:
            pending.output.write(stream, slot[start:end])
        pending.worker.process.send(Free(answer.slot, answer.number if answer.finished else None))

    def _drop(self, answer: Answer, worker: _Worker) -> None:
        """Free the slot of an answer for an abandoned block; what the block counted is not kept."""
        finished = answer.number if answer.finished else None
        worker.process.send(Free(answer.slot, finished, keep_counts=False))

    def _abandon(self, pending: dict[int, _PendingBlock]) -> set[int]:
        """Drop the output of all pending blocks, and return the numbers of the unfinished ones."""
        unfinished = set()
        for number, abandoned in pending.items():
            for answer in abandoned.answers:
                self._drop(answer, abandoned.worker)
            if not abandoned.answers or not abandoned.answers[-1].finished:
                unfinished.add(number)
        pending.clear()
        return unfinished

    def _after(self, block: Block) -> Block | DataError | None:
        """The block after `block`; None when that was the last."""
        return None if block.last else self._upcoming(block.next_start, block.careful)

    def _upcoming(self, start: int, careful: int = 0) -> Block | DataError:
        """The block at `start`, or the error that the source has there.

        The error is not raised yet, because the blocks before it have to be written first, and may
        turn out to be cut wrong.
        """
        try:
            return next_block(self._source, self._layout, start, careful)
        except DataError as error:
            return error

    def _recut(self, block: Block, miscut: MiscutError) -> Block | DataError:
        """The block to go on with behind the valid part of `block`, or the error found there."""
        try:
            return recut(self._source, self._layout, block, miscut)
        except DataError as error:
            return error

    def _free_worker(self) -> _Worker | None:
        """The worker with the fewest blocks, if it can take one more."""
        worker = min(self._workers, key=lambda worker: worker.queued)
        # The bytes of a block are sent to an idle worker only, because the parent would have to
        # wait for a busy one.
        return worker if worker.queued < (_QUEUED_BLOCKS if self._source.path else 1) else None

    def _receive(self, receiver: Receiver) -> list[tuple[Answer, _Worker]]:
        """At least one answer with its worker; counts that come with an answer are collected.

        Raises `WorkerError` when a worker process has ended.
        """
        answers = []
        for worker in [self._by_end[end] for end in self._ready()]:
            message: Message = worker.process.receive()
            if message.counts is not None:
                receiver.add_counts(message.counts)
            assert message.answer is not None  # no worker has been told to end
            answers.append((message.answer, worker))
        return answers

    def _collect_last(self, receiver: Receiver) -> None:
        """End the workers and collect the counts that each of them has kept."""
        for worker in self._workers:
            worker.process.send(None)
        for worker in self._workers:
            counts = worker.process.receive().counts
            if counts is not None:
                receiver.add_counts(counts)


def _waiter(ends: list[Connection]) -> Callable[[], list[Connection]]:
    """A function that waits until some of `ends` can be read, and returns those."""
    if sys.platform == "win32":
        return lambda: wait(ends)  # type: ignore[return-value]
    # wait() would build a selector for every call.
    selector = selectors.DefaultSelector()
    for end in ends:
        selector.register(end, selectors.EVENT_READ)
    return lambda: [key.fileobj for key, _ in selector.select()]  # type: ignore[misc]
