"""The work of `capmerge convert`: source -> blocks -> workers encode each record -> ordered output.

No record is changed. Every format holds what every other one does, with two exceptions that are
errors: a line of JSON lines must be an object, and its field `image_path` is the key.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from capmerge.commands.targets import check_target
from capmerge.errors import DataError, RecordError, UsageError, printable
from capmerge.files.atomic import AtomicFile, Buffer, OutputFiles, StandardOutput
from capmerge.files.source import Source
from capmerge.metadata.blocks import MAX_RECORD_BYTES, Block, FileLayout, read_layout
from capmerge.metadata.codec import Stray
from capmerge.metadata.encoding import encode
from capmerge.metadata.format import (
    FRAMINGS,
    PARQUET,
    ConvertFormat,
    Format,
    RecordWriter,
    is_format_ending,
)
from capmerge.metadata.parallel import run_blocks, useful_jobs
from capmerge.metadata.parquet_columns import import_pyarrow, schema
from capmerge.metadata.parquet_writer import ParquetWriter, Rows
from capmerge.metadata.pieces import Piece, iter_block, place_of
from capmerge.metadata.scan import IMAGE_PATH
from capmerge.stats.repeated_keys import KeyCheck, KeyNotes, RepeatedKeys

if TYPE_CHECKING:
    from capmerge.metadata.work import Chunk, Sink, Stream

_LENGTH_BYTES = 8


@dataclass(frozen=True, slots=True)
class ConvertOptions:
    """The options of one run of `capmerge convert`."""

    target: Path | None
    """The file to write; None for standard output."""
    format: Format | None
    """The format to write; None for Parquet."""
    jobs: int = 1
    force: bool = False
    max_record_bytes: int = MAX_RECORD_BYTES
    start_method: str | None = None


@dataclass(frozen=True, slots=True)
class Converted:
    """The counts of a finished run."""

    records: int
    read_bytes: int
    """Bytes of the source as it is on disk or comes from the pipe."""
    written_bytes: int
    repeated: RepeatedKeys
    """The keys, and the fields of records, that occur more than once."""


def choose_format(name: ConvertFormat | None, target: Path | None) -> Format | None:
    """The format that `--format` names, or the ending of `target`; None for Parquet.

    Raises `UsageError` when the two disagree, and when neither tells the format.
    """
    is_parquet = target is not None and target.suffix.lower() == PARQUET
    if name == "parquet" or (name is None and is_parquet):
        if target is not None and not is_parquet and is_format_ending(target):
            raise UsageError(
                f"{printable(str(target))}: --format parquet writes a file that ends in {PARQUET}, "
                f"and readers go by the ending. Name the output *{PARQUET}, or leave --format out."
            )
        return None
    if is_parquet:
        raise UsageError(
            f"{printable(str(target))}: --format {name} writes a file that ends in .{name}, and "
            f"readers go by the ending. Name the output *.{name}, or leave --format out."
        )
    if name is None and (target is None or not is_format_ending(target)):
        shown = "standard output" if target is None else printable(str(target))
        raise UsageError(
            f"{shown}: found no ending that tells the format. Give --format, or name the output "
            "*.json, *.jsonl or *.parquet, the first two also with .gz or .zst behind it."
        )
    return Format.choose(name, target)


def convert(
    source: Source, options: ConvertOptions, *, progress: Callable[[int], None] | None = None
) -> Converted:
    """Write the records of `source` to `options.target` in another format; return the counts.

    The file appears when all is done. `progress` is given the offset that is done. Raises
    `UsageError`, `DataError`, `OutputError` or `WorkerError`; then no file was written or replaced.
    """
    target = options.target and check_target(options.target, source, force=options.force)
    layout = read_layout(source, options.max_record_bytes, may_be_empty=True)
    with ExitStack() as stack:
        files = stack.enter_context(OutputFiles(target, ()))
        output = files.open()
        records = RecordWriter(output, options.format) if options.format else BatchWriter(output)
        keys = stack.enter_context(KeyCheck(target))
        sinks: dict[Stream, Sink] = {"records": records, **keys.sinks()}
        counts: list[int] = []
        end = run_blocks(
            source,
            layout,
            partial(BlockConverter, source.name, layout, options.format),
            sinks,
            collect=counts.append,
            jobs=useful_jobs(source, options.jobs),
            progress=progress,
            start_method=options.start_method,
        )
        records.finish()
        read_bytes = source.read_bytes(end)
        source.check_unchanged()
        repeated = keys.result()
        files.publish()
    return Converted(sum(counts), read_bytes, output.written_bytes, repeated)


class BlockConverter:
    """The work on each block: its records as the output holds them, and the notes on their keys."""

    def __init__(self, name: str, layout: FileLayout, out: Format | None) -> None:
        self._name, self._layout, self._out = name, layout, out
        self._rows = Rows()
        self._keys = KeyNotes()
        self.counts = _Count()

    def run(self, block: Block, data: bytes) -> "Iterator[Chunk]":
        """The records of a block: their text, or batches of rows with their length in front."""
        is_first = True
        for piece in iter_block(data, self._layout, block):
            self._check(piece)
            self._keys.note(piece.records.keys(), piece.records.doubled_keys())
            self.counts.add(len(piece.records.pairs))
            if self._out is None:
                for key, record in piece.records.pairs:
                    self._rows.add(key, record)
                    if self._rows.is_full:
                        yield from self._take_rows()
            elif body := encode(piece.records, self._out.kind):
                separator = b"" if is_first else FRAMINGS[self._out.kind].separator
                is_first = False
                for part in self._out.parts(separator, body):
                    yield "records", part

    def flush(self) -> "Iterator[Chunk]":
        """The rows that are held back, and the notes on the keys."""
        if len(self._rows):
            yield from self._take_rows()
        yield from self._keys.take()

    def _take_rows(self) -> "Iterator[Chunk]":
        batch = memoryview(self._rows.take().serialize()).cast("B")
        yield "records", len(batch).to_bytes(_LENGTH_BYTES, "little")
        yield "records", batch

    def _check(self, piece: Piece) -> None:
        """Raise `DataError` for a line without a key, and for what JSON lines cannot hold."""
        is_lines = self._out is not None and self._out.kind == "jsonl"
        if self._layout.kind == "json" and not is_lines:
            return
        for number, (key, record) in enumerate(piece.records.pairs):
            if isinstance(record, Stray):
                place = place_of(self._name, self._layout, piece, number)
                raise DataError(self._name, place, None, record.problem, "Fix the line.")
            if not is_lines or (record.__class__ is dict and IMAGE_PATH not in record):
                continue
            problem = (
                f'the record has a field "{IMAGE_PATH}", which is the key in JSON lines.'
                if record.__class__ is dict
                else "the record is no object, which a line of JSON lines must be."
            )
            place = place_of(self._name, self._layout, piece, number)
            next_step = "Convert to .json or .parquet, which hold such records."
            raise RecordError(self._name, place, key, problem, next_step)


class BatchWriter:
    """The sink of batches of rows, which writes them to a Parquet file."""

    def __init__(self, file: AtomicFile | StandardOutput) -> None:
        self._writer = ParquetWriter(file)
        self._schema = schema()
        self._waiting = bytearray()

    def write(self, data: Buffer, *, new_block: bool) -> None:  # noqa: ARG002  # a sink
        """Append bytes of batches, each of them behind its length."""
        self._waiting += data
        while len(self._waiting) >= _LENGTH_BYTES:
            end = _LENGTH_BYTES + int.from_bytes(self._waiting[:_LENGTH_BYTES], "little")
            if len(self._waiting) < end:
                return
            batch = bytes(memoryview(self._waiting)[_LENGTH_BYTES:end])
            del self._waiting[:end]
            self._writer.write_batch(import_pyarrow().ipc.read_record_batch(batch, self._schema))

    def finish(self) -> None:
        """Write the rest of the file."""
        assert not self._waiting, "a batch of rows lacks its end"
        self._writer.finish()


class _Count:
    """The number of records, block by block."""

    def __init__(self) -> None:
        self._block = self._kept = 0

    def add(self, records: int) -> None:
        """Count records of the block under way."""
        self._block += records

    def take(self) -> int:
        """The records of the last block."""
        records, self._block = self._block, 0
        return records

    def keep(self, counted: int) -> None:
        """Add those of a block that is valid."""
        self._kept += counted

    def is_full(self) -> bool:
        """False: a number takes no memory."""
        return False

    def result(self) -> int:
        """All that was kept since the last call."""
        records, self._kept = self._kept, 0
        return records
