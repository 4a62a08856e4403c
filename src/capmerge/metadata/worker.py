"""Runs in a worker process: takes blocks from a pipe and answers through shared memory.

This module owns the messages between parent and worker, and the slots of memory that hold the
answers. It does not know the order of the blocks.
"""

import mmap
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from typing import Any

from capmerge.errors import CapmergeError
from capmerge.files.source import Window
from capmerge.metadata.blocks import Block
from capmerge.metadata.pieces import MiscutError
from capmerge.metadata.steady_memory import steady_memory
from capmerge.metadata.work import Stream, Work, iter_output

# A slot holds the output of a block; pages that are not used take no memory.
_SLOT_BYTES = 2 << 20
# A block that weights make six times longer does not have to wait for the blocks before it.
_SLOTS = 6


@dataclass(frozen=True, slots=True)
class Task:
    """A message from parent to worker: work on this block."""

    number: int
    block: Block
    data: bytes | None
    """The block's bytes, if the worker cannot read them itself."""


@dataclass(frozen=True, slots=True)
class Free:
    """A message from parent to worker: the slot is written out, or its bytes are not wanted."""

    slot: int
    finished: int | None = None
    """The number of the block whose last answer was in the slot, if there was one."""
    keep_counts: bool = True
    """False when the counts of that block are to be dropped, because it began at a wrong cut."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Output of a block for the parent, where it may have to wait for the blocks before it."""

    number: int
    slot: int
    chunks: list[tuple[Stream, int, int]]
    """The stream of each chunk, and its bytes [start, end) in the slot.

    Chunks of one stream that follow each other are one."""
    finished: bool
    error: MiscutError | CapmergeError | str | None = None
    """The reason why the block ended early; a string is the traceback of a bug."""


@dataclass(frozen=True, slots=True)
class Message:
    """A message from worker to parent: an answer, the counts of valid blocks, or both."""

    answer: Answer | None
    """The answer; None in the last message of a worker."""
    counts: Any = None
    """The counts that the worker has kept, when they are full and at its end; otherwise None."""


class Slots:
    """The shared memory of one worker.

    It is anonymous where a fork hands it down, so that no limit of /dev/shm applies; otherwise it
    has a name.
    """

    def __init__(self, start_method: str) -> None:
        size = _SLOT_BYTES * _SLOTS
        self._named = None if start_method == "fork" else SharedMemory(create=True, size=size)
        # `buf` is None only after the memory was closed.
        self._memory = memoryview(self._named.buf if self._named else mmap.mmap(-1, size))  # type: ignore[arg-type]

    def __getitem__(self, slot: int) -> memoryview:
        return self._memory[slot * _SLOT_BYTES : (slot + 1) * _SLOT_BYTES]

    def __getstate__(self) -> SharedMemory | None:
        return self._named  # only spawn pickles an object of this class

    def __setstate__(self, named: SharedMemory) -> None:
        self._named, self._memory = named, memoryview(named.buf)  # type: ignore[arg-type]

    def close(self, *, unlink: bool) -> None:
        """Give the memory back; `unlink` also removes its name."""
        self._memory.release()
        if self._named is not None:
            self._named.close()
            if unlink:
                self._named.unlink()


def work_on_blocks(
    connection: Connection,
    slots: Slots,
    make_work: Callable[[], Work],
    reopen: Callable[[], Window] | None,
) -> None:
    """Work on blocks until the parent says that there are no more, or has ended.

    `reopen` opens the source as the parent did; None if the parent sends the bytes of the blocks.
    """
    try:
        with steady_memory():
            _WorkerLoop(connection, slots, reopen).run(make_work())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has ended, so nobody needs this work any more
    finally:
        slots.close(unlink=False)


class _WorkerLoop:
    """The worker's side of the pipe."""

    def __init__(
        self, connection: Connection, slots: Slots, reopen: Callable[[], Window] | None
    ) -> None:
        self._connection, self._slots = connection, slots
        self._reopen = reopen
        self._source: Window | None = None
        self._tasks: deque[Task | None] = deque()
        self._free = list(range(_SLOTS))
        # The counts of blocks that may yet turn out to have begun at a wrong cut.
        self._counted: dict[int, Any] = {}

    def run(self, work: Work) -> None:
        while True:
            while not self._tasks:
                self._take_message(work)
            task = self._tasks.popleft()
            if task is None:
                self._connection.send(Message(None, work.counts and work.counts.result()))
                return
            self._answer(task, work)

    def _take_message(self, work: Work) -> None:
        message = self._connection.recv()
        if isinstance(message, Free):
            self._free.append(message.slot)
            if message.finished is not None and work.counts:
                counted = self._counted.pop(message.finished)
                if message.keep_counts:
                    work.counts.keep(counted)
        else:
            self._tasks.append(message)

    def _take_slot(self, work: Work) -> int:
        while not self._free:
            self._take_message(work)
        # The slot that was freed last is the likeliest to be in the processor's cache.
        return self._free.pop()

    def _read(self, block: Block) -> bytes:
        if self._source is None:
            assert self._reopen is not None  # else the parent sends the bytes
            self._source = self._reopen()
        return self._source.window(block.start, block.end - block.start)

    def _answer(self, task: Task, work: Work) -> None:
        block, data = task.block, task.data
        slot, used = self._take_slot(work), 0
        chunks: list[tuple[Stream, int, int]] = []
        error: MiscutError | CapmergeError | str | None = None
        try:
            if data is None:
                data = self._read(block)

            # Copy the output to the slot. When the slot is full, send it and take another.
            for stream, chunk in iter_output(work, block, data):
                rest = memoryview(chunk)
                while rest:
                    if used == _SLOT_BYTES:
                        answer = Answer(task.number, slot, chunks, finished=False)
                        self._connection.send(Message(answer))
                        slot, used, chunks = self._take_slot(work), 0, []
                    part = rest[: _SLOT_BYTES - used]
                    self._slots[slot][used : used + len(part)] = part
                    start, end = used, used + len(part)
                    if chunks and chunks[-1][0] == stream:  # the parent writes them at once
                        start = chunks.pop()[1]
                    chunks.append((stream, start, end))
                    used, rest = end, rest[len(part) :]
        except (MiscutError, CapmergeError) as raised:
            error = raised
        except Exception:  # noqa: BLE001  # a bug, whose traceback the parent shows
            error = traceback.format_exc()

        # Send the last part. Counts go with an answer and never on their own, because only then the
        # parent is sure to be reading, and not sending a block.
        counts = None
        if work.counts:
            self._counted[task.number] = work.counts.take()
            counts = work.counts.result() if work.counts.is_full() else None

        answer = Answer(task.number, slot, chunks, finished=True, error=error)
        self._connection.send(Message(answer, counts))
