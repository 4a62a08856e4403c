"""The work on the blocks of a file, its named streams of output, and the sinks that they end in.

Owns the protocols between the code that runs blocks and the code that knows what is in them.
"""

from collections.abc import Iterator
from typing import Any, Literal, Protocol

from capmerge.errors import CapmergeError
from capmerge.files.atomic import Buffer
from capmerge.metadata.blocks import Block
from capmerge.metadata.pieces import MiscutError

Stream = Literal["records", "rejects", "rows", "hashes", "per_record", "places"]
"""The name of a stream of output.

"records" are those of the output file, "rejects" lines of JSON for the records left out of it, and
"rows" those of its index. Statistics have "hashes" of captions, lines of JSON "per_record", and the
"places" of decoded pieces in the source."""
Chunk = tuple[Stream, Buffer]
"""A stream, and bytes to append to it."""


class Sink(Protocol):
    """Where a stream goes."""

    def write(self, data: Buffer, *, new_block: bool) -> None:
        """Append `data`; `new_block` says that it begins the output of a block."""


class Counting(Protocol):
    """The counts of one process, block by block.

    A block that began at a wrong cut is worked on like any other, so what it counts is taken at its
    end and kept only once it is known to stand.
    """

    def take(self) -> Any:
        """What the last block has counted; it is forgotten here."""

    def keep(self, counted: Any) -> None:
        """Add what `take` gave for a block that stands."""

    def is_full(self) -> bool:
        """Whether so much is kept that it is time to hand it over."""

    def result(self) -> Any:
        """All that was kept since the last call; it is forgotten here."""


class Work(Protocol):
    """What is done with each block; one object per process.

    It emits only streams that the run has a sink for.
    """

    @property
    def counts(self) -> Counting | None:
        """The counts of this process; None when the work counts nothing."""

    def run(self, block: Block, data: bytes) -> Iterator[Chunk]:
        """The output of one block, but for what is held back until `flush`.

        Raises `codec.MiscutError` where the bytes are not whole records; what came before it
        stands.
        """

    def flush(self) -> Iterator[Chunk]:
        """The output that is still held of the block; nothing of it is held afterwards."""


def iter_output(work: Work, block: Block, data: bytes) -> Iterator[Chunk]:
    """The whole output of one block: what `work` gives as it goes, and what it holds at the end.

    Raises what `Work.run` raises, after the output.
    """
    error: MiscutError | CapmergeError | None = None
    try:
        yield from work.run(block, data)
    except (MiscutError, CapmergeError) as raised:
        error = raised
    # After an error too: what came before a wrong cut stands. And a block with a record that is an
    # error may itself have begun at a wrong cut: then the run goes on, and what is held of that
    # block must not come out with the next one.
    yield from work.flush()
    if error:
        raise error
