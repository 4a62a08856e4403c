"""Blocks of a source through N worker processes and back into order: one stream of bytes, the same for any N.

The parent only looks for cuts and writes. Workers read their blocks themselves (those of a pipe or gzip source are
handed over), work on them, and answer through slots of shared memory; the pipes between carry a few hundred bytes a
block. A worker has a few slots and at most two blocks waiting, so memory is bounded whatever the output grows to.
"""

import gc
import mmap
import multiprocessing
import selectors
import signal
import sys
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

from capmerge.blocks import BLOCK_BYTES, Block, Layout, next_block, walked_block
from capmerge.codec import MiscutError
from capmerge.errors import CapmergeError, DataError, WorkerError
from capmerge.source import FileSource, Source

_SLOT_BYTES = 2 << 20  # the output of a block; pages not used take no memory
_SLOTS = 6  # a block that weights make six times longer does not wait for the blocks before it
_QUEUED_BLOCKS = 2  # one at work, one waiting


class Work(Protocol):
    """What is done with each block; one object a process."""

    def run(self, block: Block, data: bytes) -> Iterator[tuple[int, bytes | memoryview]]:
        """The output of one block: the number of a stream, and bytes to append to it.

        Raises `codec.MiscutError` where the bytes are not whole records; what was given before it stands.
        """

    def take(self) -> Any:
        """What the last block has counted; the work forgets it."""

    def keep(self, counted: Any) -> None:
        """Add what `take` gave for a block that stands. A block that began at a wrong cut is worked on and never kept."""

    def is_full(self) -> bool:
        """Whether so much is kept that it is time to hand it over."""

    def result(self) -> Any:
        """All that was kept since the last call; the work forgets it."""


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
    progress: Callable[[int], None],
    collect: Callable[[Any], None] = lambda _result: None,
    start_method: str | None = None,
) -> None:
    """Work on every block, write the streams to their sinks in the source's order, and `collect` the processes' results.

    Each process has one result or more; they come in any order. `make_work` is called once in each process; it must be
    picklable. `progress` is told the offset that is done.
    `start_method` is "fork" or "spawn"; the default is fork on Linux, where it is cheap and safe (no thread runs yet).
    """
    if jobs == 1:
        with _no_garbage_collection():
            _run_here(source, layout, make_work(), sinks, collect, progress)
            return
    with _Pool(source, layout, make_work, jobs, start_method or ("fork" if sys.platform == "linux" else "spawn")) as pool:
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
    collect: Callable[[Any], None],
    progress: Callable[[int], None],
) -> None:
    """The whole story in one process."""
    block = next_block(source, layout, layout.first)
    while True:
        output = _BlockOutput(sinks)
        try:
            for stream, chunk in work.run(block, source.window(block.start, block.end - block.start)):
                output.write(stream, chunk)
        except MiscutError as error:
            work.keep(work.take())
            block = walked_block(source, layout, error.offset)
            continue
        work.keep(work.take())
        progress(block.end)
        if block.last or work.is_full():
            collect(work.result())
        if block.last:
            return
        source.release(block.next_start)
        block = next_block(source, layout, block.next_start)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Records hold no cycles: reference counts free them at once, and looking for cycles costs a fifth of the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _BlockOutput:
    """The output of one block on its way to the sinks."""

    def __init__(self, sinks: list[Sink]) -> None:
        self._sinks = sinks
        self._begun: set[int] = set()

    def write(self, stream: int, chunk: bytes | memoryview) -> None:
        self._sinks[stream].write(chunk, new_block=stream not in self._begun)
        self._begun.add(stream)


@dataclass(frozen=True, slots=True)
class _Task:
    """Parent to worker: work on this block."""

    number: int
    block: Block
    data: bytes | None
    """The block's bytes, when the worker cannot read them itself."""


@dataclass(frozen=True, slots=True)
class _Free:
    """Parent to worker: this slot is written out, or its bytes are not wanted."""

    slot: int
    finished: int | None = None
    """The block whose last answer was in the slot."""
    stands: bool = True
    """Whether what that block has counted is kept."""


@dataclass(slots=True)
class _Answer:
    """Worker to parent: output of a block."""

    number: int
    slot: int
    chunks: list[tuple[int, int, int]]
    """Stream, and [start, end) in the slot."""
    finished: bool
    error: MiscutError | CapmergeError | str | None = None
    """Why the block ended early; a string is the traceback of a bug."""
    result: Any = None
    """What the worker had kept of earlier blocks, when it was full."""


class _Slots:
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
        self._memory.release()
        if self._named is not None:
            self._named.close()
            if unlink:
                self._named.unlink()


class _Worker:
    """The parent's side of one worker process."""

    def __init__(self, context: Any, start_method: str) -> None:
        self.connection, self.far_end = context.Pipe()
        self.slots = _Slots(start_method)
        self.queued = 0
        self.process: Any = None

    def send(self, message: _Task | _Free | None) -> None:
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
        how = f"was killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
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
    answers: deque[_Answer] = field(default_factory=deque)


class _Pool:
    """The worker processes of one run."""

    def __init__(self, source: Source, layout: Layout, make_work: Callable[[], Work], jobs: int, start_method: str) -> None:
        self._source, self._layout = source, layout
        context: Any = multiprocessing.get_context(start_method)  # the base class in the stubs has no Process
        self._workers = [_Worker(context, start_method) for _ in range(jobs)]
        ends = [end for worker in self._workers for end in (worker.connection, worker.far_end)]
        for worker in self._workers:
            # A forked child holds every end that is open now; it must close them, or it would never see its parent die.
            inherited = [end for end in ends if end is not worker.far_end] if start_method == "fork" else []
            arguments = (worker.far_end, inherited, worker.slots, make_work, source.path)
            worker.process = context.Process(target=_work, args=arguments, daemon=True)
            worker.process.start()
        for worker in self._workers:
            worker.far_end.close()
        self._by_end = {worker.connection: worker for worker in self._workers}
        self._ready = _waiter(list(self._by_end))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for worker in self._workers:
            worker.connection.close()
            if kind is not None:
                worker.process.terminate()
        for worker in self._workers:
            worker.process.join()
            worker.slots.close(unlink=True)

    def run(self, sinks: list[Sink], collect: Callable[[Any], None], progress: Callable[[int], None]) -> None:
        """Hand out blocks, write what comes back in order."""
        pending: dict[int, _Pending] = {}  # in the source's order
        void: dict[int, _Pending] = {}  # blocks that began at a wrong cut
        count = 0
        upcoming: Block | DataError | None = self._upcoming(self._layout.first)
        while True:
            while isinstance(upcoming, Block) and (worker := self._free_worker()):
                data = None if self._source.path else self._source.window(upcoming.start, upcoming.end - upcoming.start)
                pending[count] = _Pending(upcoming, worker, _BlockOutput(sinks))
                worker.queued += 1
                worker.send(_Task(count, upcoming, data))
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
                    collect(answer.result)
                    answer.result = None  # the answer may wait for the blocks before it
                if answer.number in pending:
                    pending[answer.number].answers.append(answer)
                else:
                    worker.send(_Free(answer.slot, answer.number if answer.finished else None, stands=False))
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
                head.worker.send(_Free(answer.slot, number if answer.finished else None))
                if not answer.finished:
                    continue
                del pending[number]
                if isinstance(answer.error, MiscutError):
                    for dropped, block in pending.items():
                        for waiting in block.answers:
                            block.worker.send(_Free(waiting.slot, dropped if waiting.finished else None, stands=False))
                        if not block.answers or not block.answers[-1].finished:
                            void[dropped] = block
                    pending.clear()
                    upcoming = self._upcoming(answer.error.offset, find=walked_block)
                elif isinstance(answer.error, str):
                    raise RuntimeError(f"a worker process failed:\n{answer.error}")  # noqa: TRY004  # no wrong type
                elif answer.error:
                    raise answer.error
                else:
                    progress(head.block.end)
                    self._source.release(head.block.next_start)

    def _after(self, block: Block) -> Block | DataError | None:
        """The block behind `block`; None when that was the last."""
        return None if block.last else self._upcoming(block.next_start)

    def _upcoming(self, start: int, find: Callable[[Source, Layout, int], Block] = next_block) -> Block | DataError:
        """The block at `start`, or the error in its place: the blocks before it come first, and may turn out to be cut wrong."""
        try:
            return find(self._source, self._layout, start)
        except DataError as error:
            return error

    def _free_worker(self) -> _Worker | None:
        worker = min(self._workers, key=lambda worker: worker.queued)
        # A block that is sent as bytes goes to an idle worker: sending to a busy one would hold the parent up.
        return worker if worker.queued < (_QUEUED_BLOCKS if self._source.path else 1) else None

    def _receive(self) -> list[tuple[_Answer, _Worker]]:
        """At least one answer; raises `WorkerError` when a worker is gone."""
        workers = [self._by_end[end] for end in self._ready()]
        return [(worker.receive(), worker) for worker in workers]

    def _collect_last(self, collect: Callable[[Any], None]) -> None:
        for worker in self._workers:
            worker.send(None)
        for worker in self._workers:
            collect(worker.receive())


def _waiter(ends: list[Connection]) -> Callable[[], list[Connection]]:
    """A function that waits until some of `ends` can be read and returns those."""
    if sys.platform == "win32":
        return lambda: wait(ends)  # type: ignore[return-value]
    selector = selectors.DefaultSelector()  # wait() would build one for every call
    for end in ends:
        selector.register(end, selectors.EVENT_READ)
    return lambda: [key.fileobj for key, _ in selector.select()]  # type: ignore[misc]


def _work(connection: Connection, inherited: list[Connection], slots: _Slots, make_work: Callable[[], Work], path: Path | None) -> None:
    """The life of a worker process; it ends when the parent says so, or is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for end in inherited:
        end.close()
    try:
        with _no_garbage_collection():
            _WorkerLoop(connection, slots, path).run(make_work())
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent is gone, and so is any use of this work
    finally:
        slots.close(unlink=False)


class _WorkerLoop:
    """The worker's side of the pipe."""

    def __init__(self, connection: Connection, slots: _Slots, path: Path | None) -> None:
        self._connection, self._slots = connection, slots
        self._file = FileSource(path) if path else None
        self._tasks: deque[_Task | None] = deque()
        self._free = list(range(_SLOTS))
        self._counted: dict[int, Any] = {}  # of blocks that may not stand

    def run(self, work: Work) -> None:
        while True:
            while not self._tasks:
                self._take_message(work)
            task = self._tasks.popleft()
            if task is None:
                self._connection.send(work.result())
                return
            self._answer(task, work)

    def _take_message(self, work: Work) -> None:
        message = self._connection.recv()
        if isinstance(message, _Free):
            self._free.append(message.slot)
            if message.finished is not None:
                counted = self._counted.pop(message.finished)
                if message.stands:
                    work.keep(counted)
        else:
            self._tasks.append(message)

    def _take_slot(self, work: Work) -> int:
        while not self._free:
            self._take_message(work)
        return self._free.pop()  # the last one freed: the processor still has its pages at hand

    def _answer(self, task: _Task, work: Work) -> None:
        block, data = task.block, task.data
        slot, used = self._take_slot(work), 0
        chunks: list[tuple[int, int, int]] = []
        error: MiscutError | CapmergeError | str | None = None
        try:
            if data is None:
                assert self._file is not None  # the parent sends the bytes of a source without a path
                data = self._file.window(block.start, block.end - block.start)
            for stream, chunk in work.run(block, data):
                rest = memoryview(chunk)
                while rest:
                    if used == _SLOT_BYTES:
                        self._connection.send(_Answer(task.number, slot, chunks, finished=False))
                        slot, used, chunks = self._take_slot(work), 0, []
                    part = rest[: _SLOT_BYTES - used]
                    self._slots[slot][used : used + len(part)] = part
                    chunks.append((stream, used, used + len(part)))
                    used, rest = used + len(part), rest[len(part) :]
        except (MiscutError, CapmergeError) as raised:
            error = raised
        except Exception:  # noqa: BLE001  # a bug: the parent shows it
            error = traceback.format_exc()
        self._counted[task.number] = work.take()
        # With an answer, never on its own: the parent is sure to be reading then, not sending a block.
        result = work.result() if work.is_full() else None
        self._connection.send(_Answer(task.number, slot, chunks, finished=True, error=error, result=result))
