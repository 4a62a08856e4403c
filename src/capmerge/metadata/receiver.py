"""Takes in the output, the counts and the progress of a run, in whatever process they arise."""

from collections.abc import Callable, Mapping
from typing import Any

from capmerge.files.atomic import Buffer
from capmerge.metadata.work import Sink, Stream


class BlockOutput:
    """The output of one block on its way to the sinks.

    A stream without a sink raises `KeyError`: it is a bug of the code that combined work and sinks.
    """

    def __init__(self, sinks: Mapping[Stream, Sink]) -> None:
        self._sinks = sinks
        self._begun: set[Stream] = set()

    def write(self, stream: Stream, chunk: Buffer) -> None:
        """Append `chunk` to `stream`."""
        self._sinks[stream].write(chunk, new_block=stream not in self._begun)
        self._begun.add(stream)


class Receiver:
    """The sinks of a run, and the functions that are given its counts and its progress."""

    def __init__(
        self,
        sinks: Mapping[Stream, Sink],
        collect: Callable[[Any], None] | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._sinks, self._collect, self._progress = sinks, collect, progress

    def begin_block(self) -> BlockOutput:
        """An object that takes the output of the next block."""
        return BlockOutput(self._sinks)

    def add_counts(self, counts: Any) -> None:
        """Hand over one result of the counts of a process."""
        assert self._collect is not None  # run_blocks asks for it when the work counts
        self._collect(counts)

    def end_block(self, offset: int) -> None:
        """Report that the blocks up to `offset` are written."""
        if self._progress:
            self._progress(offset)
