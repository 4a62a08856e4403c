"""A first pass over a source that notes where each record is, for a second pass that copies them.

A join has to know all keys before it can write its first record, and a split into equal parts the
number of all records. The first pass decodes every record, which proves where it begins and ends.
The second reads these offsets, so it decodes only what it has to look into.
"""

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from capmerge.files.atomic import Buffer
from capmerge.files.scratch import ScratchFolder, ScratchWriter, SharedFile
from capmerge.files.source import FileSource
from capmerge.metadata.blocks import Block, FileLayout
from capmerge.metadata.key_bytes import joined_keys
from capmerge.metadata.parallel import run_blocks, useful_jobs
from capmerge.metadata.pieces import MiscutError
from capmerge.metadata.raw_records import iter_raw
from capmerge.metadata.work import Chunk, Sink, Stream

NUMBER_BYTES = 8
_ROW_BYTES = 2 * NUMBER_BYTES
_ROWS_AT_ONCE = 1 << 12


class SpanRun(NamedTuple):
    """Consecutive records of a source, which numbers them from 0, and their bytes [start, end)."""

    first: int
    """The number of the first of them."""
    starts: Sequence[int]
    ends: Sequence[int]

    def __len__(self) -> int:
        return len(self.starts)


class Spans:
    """The bytes of every record of a source, as a survey noted them in the file `path`."""

    def __init__(self, path: Path, count: int) -> None:
        self.count = count
        self._file = SharedFile(partial(FileSource, path))

    def run(self, first: int, end: int) -> SpanRun:
        """The records numbered [first, end), as far as there are so many."""
        found = array("Q", self._file.window(first * _ROW_BYTES, (end - first) * _ROW_BYTES))
        return SpanRun(first, found[::2], found[1::2])

    def start_of(self, number: int) -> int:
        """The offset of a record."""
        return self.run(number, number + 1).starts[0]

    def in_block(self, block: Block) -> tuple[SpanRun, MiscutError | None]:
        """The records that lie in a block, and the error to raise behind them.

        There is one if the next record begins in the block and does not end in it, because the end
        of the block was guessed wrong.
        """
        first = bisect_left(range(self.count), block.start, key=self.start_of)
        starts, ends = array("Q"), array("Q")
        while not starts or starts[-1] < block.end:
            more = self.run(first + len(starts), first + len(starts) + _ROWS_AT_ONCE)
            if not more:
                break
            starts.extend(more.starts)
            ends.extend(more.ends)
        count = bisect_right(ends, block.end)
        miscut = None
        if count < len(starts) and starts[count] < block.end:
            miscut = MiscutError(starts[count])
        return SpanRun(first, starts[:count], ends[:count]), miscut


class Surveyor:
    """The work of a survey on each block: the "spans" of its records, and "keys" if asked."""

    counts = None

    def __init__(self, name: str, layout: FileLayout, *, keys: bool) -> None:
        self._name, self._layout, self._with_keys = name, layout, keys
        self._spans, self._keys = array("Q"), list[bytes]()

    def run(self, block: Block, data: bytes) -> Iterator[Chunk]:
        """Note the records of a block."""
        for starts, ends, pairs in iter_raw(self._name, self._layout, block, data):
            self._spans.extend(chain.from_iterable(zip(starts, ends, strict=True)))
            if self._with_keys:
                self._keys.append(joined_keys([key for key, _ in pairs]))
        yield from ()

    def flush(self) -> Iterator[Chunk]:
        """What was noted."""
        if self._spans:
            yield "spans", self._spans.tobytes()
            yield "keys", b"".join(self._keys)
            self._spans, self._keys = array("Q"), []


class _Noted:
    """A sink that writes a stream to a scratch file."""

    def __init__(self, file: ScratchWriter) -> None:
        self._file = file

    def write(self, data: Buffer, *, new_block: bool) -> None:  # noqa: ARG002  # a sink
        """Append `data`."""
        self._file.write(data)


class Survey(NamedTuple):
    """The outcome of a first pass over a source."""

    spans: Spans
    keys: Path | None
    """The file of the keys in the order of their records, as `joined_keys` writes them."""


def survey(
    source: FileSource,
    layout: FileLayout,
    folder: ScratchFolder,
    name: str,
    *,
    keys: bool,
    jobs: int,
    progress: Callable[[int], None] | None = None,
    start_method: str | None = None,
) -> Survey:
    """Find every record of `source`; what is noted are files of `folder` whose names begin so.

    With `keys`, the keys are noted too. Raises `DataError` where the source is not valid, and for a
    line of JSONL that is no record.
    """
    with folder.file(f"{name}.spans") as spans, folder.file(f"{name}.keys") as noted:
        sinks: dict[Stream, Sink] = {"spans": _Noted(spans), "keys": _Noted(noted)}
        run_blocks(
            source,
            layout,
            partial(Surveyor, source.name, layout, keys=keys),
            sinks,
            jobs=useful_jobs(source, jobs),
            progress=progress,
            start_method=start_method,
        )
    source.check_unchanged()
    return Survey(
        Spans(spans.path, spans.written_bytes // _ROW_BYTES), noted.path if keys else None
    )
