"""A worker process: takes blocks from a pipe, works on them, and answers through slots of shared memory.

Owns the messages between parent and worker, and the memory that the answers lie in. Knows nothing
of the order of blocks.
"""

import gc
import mmap
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from typing import Any

from capmerge.errors import CapmergeError
from capmerge.files.source import FileSource
from capmerge.metadata.blocks import Block
from capmerge.metadata.pieces import MiscutError
from capmerge.metadata.work import Stream, Work, iter_output

_SLOT_BYTES = 2 << 20  # the output of a block; pages not used take no memory
_SLOTS = 6  # a block that weights make six times longer does not wait for the blocks before it


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Records hold no cycles: reference counts free them at once, and looking for cycles costs a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@dataclass(frozen=True, slots=True)
class Task:
    """Parent to worker: work on this block."""

    number: int
    block: Block
    data: bytes | None
    """The block's bytes, when the worker cannot read them itself."""


@dataclass(frozen=True, slots=True)
class Free:
    """Parent to worker: this slot is written out, or its bytes are not wanted."""

    slot: int
    finished: int | None = None
    """The block whose last answer was in the slot."""
    stands: bool = True
    """Whether what that block has counted is kept."""


@dataclass(frozen=True, slots=True)
class Answer:
    """Worker to parent: output of a block, which may wait there for the blocks before it."""

    number: int
    slot: int
    chunks: list[tuple[Stream, int, int]]
    """Stream, and [start, end) in the slot."""
    finished: bool
    error: MiscutError | CapmergeError | str | None = None
    """Why the block ended early; a string is the traceback of a bug."""


@dataclass(frozen=True, slots=True)
class Message:
    """Worker to parent: an answer, or the counts of the blocks that stand, or both."""

    answer: Answer | None
    """None in the last message of a worker."""
    counts: Any = None
    """What the worker had kept, when it was full or is at its end; None when it counts nothing."""


class Slots:
    """A worker's shared memory: anonymous where a fork hands it down (no limit of /dev/shm applies), else by name."""

    def __init__(self, start_method: str) -> None:
        size = _SLOT_BYTES * _SLOTS
        self._named = None if start_method == "fork" else SharedMemory(create=True, size=size)
        self._memory = memoryview(self._named.buf if self._named else mmap.mmap(-1, size))  # type: ignore[arg-type]  # buf is None only when closed

    def __getitem__(self, slot: int) -> memoryview:
        return self._memory[slot * _SLOT_BYTES : (slot + 1) * _SLOT_BYTES]

    def __getstate__(self) -> SharedMemory | None:
        return self._named  # only spawn pickles it

    def __setstate__(self, named: SharedMemory) -> None:
        self._named, self._memory = named, memoryview(named.buf)  # type: ignore[arg-type]

    def close(self, *, unlink: bool) -> None:
        """Give the memory back; `unlink` takes its name away too."""
        self._memory.release()
        if self._named is not None:
            self._named.close()
            if unlink:
                self._named.unlink()


def work_on_blocks(
    connection: Connection,
    inherited: list[Connection],
    slots: Slots,
    make_work: Callable[[], Work],
    path: Path | None,
) -> None:
    """The life of a worker process; it ends when the parent says so, or is gone."""
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for end in inherited:
        end.close()
    try:
        with no_garbage_collection():
            _WorkerLoop(connection, slots, path).run(make_work())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone, and so is any use of this work
    finally:
        slots.close(unlink=False)


class _WorkerLoop:
    """The worker's side of the pipe."""

    def __init__(self, connection: Connection, slots: Slots, path: Path | None) -> None:
        self._connection, self._slots = connection, slots
        self._file = FileSource(path) if path else None
        self._tasks: deque[Task | None] = deque()
        self._free = list(range(_SLOTS))
        self._counted: dict[int, Any] = {}  # of blocks that may not stand

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
                if message.stands:
                    work.counts.keep(counted)
        else:
            self._tasks.append(message)

    def _take_slot(self, work: Work) -> int:
        while not self._free:
            self._take_message(work)
        return self._free.pop()  # the last one freed: the processor still has its pages at hand

    def _answer(self, task: Task, work: Work) -> None:
        block, data = task.block, task.data
        slot, used = self._take_slot(work), 0
        chunks: list[tuple[Stream, int, int]] = []
        error: MiscutError | CapmergeError | str | None = None
        try:
            if data is None:
                assert (
                    self._file is not None
                )  # the parent sends the bytes of a source without a path
                data = self._file.window(block.start, block.end - block.start)
            for stream, chunk in iter_output(work, block, data):
                rest = memoryview(chunk)
                while rest:
                    if used == _SLOT_BYTES:
                        answer = Answer(task.number, slot, chunks, finished=False)
                        self._connection.send(Message(answer))
                        slot, used, chunks = self._take_slot(work), 0, []
                    part = rest[: _SLOT_BYTES - used]
                    self._slots[slot][used : used + len(part)] = part
                    chunks.append((stream, used, used + len(part)))
                    used, rest = used + len(part), rest[len(part) :]
        except (MiscutError, CapmergeError) as raised:
            error = raised
        except Exception:  # noqa: BLE001  # a bug: the parent shows it
            error = traceback.format_exc()
        counts = None
        if work.counts:
            self._counted[task.number] = work.counts.take()
            # With an answer, never on its own: the parent is sure to be reading then, not sending a
            # block.
            counts = work.counts.result() if work.counts.is_full() else None
        answer = Answer(task.number, slot, chunks, finished=True, error=error)
        self._connection.send(Message(answer, counts))
