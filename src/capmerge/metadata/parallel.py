"""Runs work on every block of a source, in this process or in N workers.

The streams of output are in the source's order, and their bytes are the same for any N. `pool` does
the work in several processes.
"""

from collections.abc import Callable, Mapping
from typing import Any

from capmerge.files.source import Source
from capmerge.metadata.blocks import BLOCK_BYTES, FileLayout
from capmerge.metadata.cuts import next_block
from capmerge.metadata.pieces import MiscutError, recut
from capmerge.metadata.quotes import prepare_to_count
from capmerge.metadata.receiver import Receiver
from capmerge.metadata.steady_memory import steady_memory
from capmerge.metadata.work import Sink, Stream, Work, iter_output


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
    """Work on every block, and write the streams to their sinks in the source's order.

    Returns the offset where the last block ends.

    `make_work` is called once in each process; it must be picklable. `collect` is given the counts
    of the processes: each process has one result or more, and they come in any order. Only work
    that counts needs it. `progress` is given the offset up to which the work is done.
    `start_method` is "fork" or "spawn"; the default is `START_METHOD`.
    """
    receiver = Receiver(sinks, collect, progress)
    prepare_to_count(source.total_bytes or 0)
    if jobs == 1:
        with steady_memory():
            return _run_here(source, layout, make_work(), receiver)
    from capmerge.metadata.pool import Pool
    from capmerge.processes import START_METHOD

    with Pool(source, layout, make_work, jobs, start_method or START_METHOD) as pool:
        return pool.run(receiver)


def useful_jobs(source: Source, jobs: int) -> int:
    """The number of processes that are of use: `jobs`, but no more than there are blocks."""
    if source.path is None or source.total_bytes is None:
        return jobs
    return max(1, min(jobs, source.total_bytes // BLOCK_BYTES))


def _run_here(source: Source, layout: FileLayout, work: Work, receiver: Receiver) -> int:
    """The whole run in this process; returns the offset where the last block ends."""
    block = next_block(source, layout, layout.first)
    while True:
        output = receiver.begin_block()
        miscut = None
        try:
            # The bytes have no name here, because a name would keep them in memory while the next
            # block is read.
            for stream, chunk in iter_output(
                work, block, source.window(block.start, block.end - block.start)
            ):
                output.write(stream, chunk)
        except MiscutError as error:
            miscut = error
        if work.counts:
            work.counts.keep(work.counts.take())
        if miscut:
            block = recut(source, layout, block, miscut)
            continue
        receiver.end_block(block.end)
        if work.counts and (block.last or work.counts.is_full()):
            receiver.add_counts(work.counts.result())
        if block.last:
            return block.end
        source.release(block.next_start)
        block = next_block(source, layout, block.next_start, block.careful)
