"""The receiving end of a run: its output, its counts and its progress."""

from collections.abc import Callable, Mapping
from typing import Any

from capmerge.files.atomic import Buffer
from capmerge.metadata.work import Sink, Stream


class BlockOutput:
    """The output of one block on its way to the sinks.

    A stream without a sink raises `KeyError`: it is a bug of whoever put work and sinks together.
    """

    def __init__(self, sinks: Mapping[Stream, Sink]) -> None:
        self._sinks = sinks
        self._begun: set[Stream] = set()

    def write(self, stream: Stream, chunk: Buffer) -> None:
        self._sinks[stream].write(chunk, new_block=stream not in self._begun)
        self._begun.add(stream)


class Receiver:
    """What takes in the output, the counts and the progress of a run."""

    def __init__(
        self,
        sinks: Mapping[Stream, Sink],
        collect: Callable[[Any], None] | None,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._sinks, self._collect, self._progress = sinks, collect, progress

    def begin_block(self) -> BlockOutput:
        return BlockOutput(self._sinks)

    def add_counts(self, counts: Any) -> None:
        assert self._collect is not None  # whoever runs work that counts collects its counts
        self._collect(counts)

    def end_block(self, offset: int) -> None:
        """The blocks up to `offset` are written."""
        if self._progress:
            self._progress(offset)
