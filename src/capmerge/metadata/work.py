"""Defines the work on the blocks of a file, its named streams of output, and their sinks.

This module owns the protocols between the code that runs blocks and the code that knows what is in
them.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, Literal, Protocol, cast

from capmerge.errors import CapmergeError
from capmerge.files.atomic import Buffer
from capmerge.metadata.blocks import Block
from capmerge.metadata.pieces import MiscutError

Stream = Literal[
    "records",
    "rejects",
    "rows",
    "hashes",
    "per_record",
    "places",
    "loops",
    "keys",
    "doubled",
    "spans",
    "missing",
    "dropped",
]
"""The name of a stream of output.

"records" are those of the output file, "rejects" are lines of JSON for the records left out of it,
and "rows" are those of its index. Statistics have "hashes" of captions, lines of JSON "per_record",
"places": the offsets of decoded pieces in the source, and "loops": the keys of records whose
caption loops. For repeated keys there are the "keys", and those of records with "doubled" fields.
A survey notes the "spans" of records and their "keys". A join has lines of JSON on what is
"missing", and a filter on the records that are "dropped". A split has a `part_stream` per part."""
Chunk = tuple[Stream, Buffer]
"""A stream, and bytes to append to it."""


def part_stream(number: int) -> Stream:
    """The stream of the records of one part of a split, counted from 0."""
    return cast("Stream", f"part {number}")


class Sink(Protocol):
    """A destination of one stream, such as a file."""

    def write(self, data: Buffer, *, new_block: bool) -> None:
        """Append `data`; `new_block` says that it begins the output of a block."""


class Counting(Protocol):
    """The counts of one process, block by block.

    A block that began at a wrong cut is worked on like any other. So its counts are taken at its
    end, and kept only once the block is known to be valid.
    """

    def take(self) -> Any:
        """The counts of the last block, which are forgotten here."""

    def keep(self, counted: Any) -> None:
        """Add the counts that `take` returned for a block that is valid."""

    def is_full(self) -> bool:
        """True when so much is kept that it is time to hand it over."""

    def result(self) -> Any:
        """All that was kept since the last call, which is forgotten here."""


class NamedCounts:
    """Counts by name, as `Counting` hands them over."""

    def __init__(self) -> None:
        self.block: Counter[str] = Counter()
        """The counts of the block that is worked on."""
        self._kept: Counter[str] = Counter()

    def take(self) -> Counter[str]:
        """The counts of the last block, which are forgotten here."""
        taken, self.block = self.block, Counter()
        return taken

    def keep(self, counted: Counter[str]) -> None:
        """Add the counts of a block that is valid."""
        self._kept.update(counted)

    def is_full(self) -> bool:
        """False, because there are few names."""
        return False

    def result(self) -> Counter[str]:
        """All that was kept since the last call."""
        kept, self._kept = self._kept, Counter()
        return kept


class Work(Protocol):
    """The work that is done with each block; there is one object per process.

    It emits only streams for which the run has a sink.
    """

    @property
    def counts(self) -> Counting | None:
        """The counts of this process; None when the work counts nothing."""

    def run(self, block: Block, data: bytes) -> Iterator[Chunk]:
        """The output of one block, except for what is held back until `flush`.

        Raises `pieces.MiscutError` where the bytes are not whole records; the output before it is
        valid.
        """

    def flush(self) -> Iterator[Chunk]:
        """The output of the block that is still held back; none of it is held afterwards."""


def iter_output(work: Work, block: Block, data: bytes) -> Iterator[Chunk]:
    """The whole output of one block, including what `work` holds back until the end.

    Raises what `Work.run` raises, after the output.
    """
    error: MiscutError | CapmergeError | None = None
    try:
        yield from work.run(block, data)
    except (MiscutError, CapmergeError) as raised:
        error = raised
    # Flush after an error, too. The output before a wrong cut is valid. And a block with a record
    # that is an error may itself have begun at a wrong cut: then the run goes on, and what is held
    # of that block must not come out with the next one.
    yield from work.flush()
    if error:
        raise error
