"""The story of `capmerge rewrite`: source -> blocks -> workers merge each record -> one ordered output.

The whole run, from the first look at the source to the rename of the output; `rewriter` is what a worker does with a block.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from capmerge.blocks import MAX_RECORD_BYTES, Kind, Layout, read_layout
from capmerge.caption import Merger, Record, RewrittenError, UnmergeableError, copy_of
from capmerge.codec import Stray, iter_source
from capmerge.document import Document
from capmerge.errors import OutputError, UsageError, printable
from capmerge.gather import Gathered, Tokenizers
from capmerge.output import AtomicFile, Buffer, OutputFiles, StandardOutput, check_target
from capmerge.parallel import run_blocks, useful_jobs
from capmerge.rewriter import SEPARATORS, Counted, Format, OnError, Rewriter, compressed, reserved_fields
from capmerge.side_files import DATASET, INDEX, RECEIPT, REJECTS, SIDE_FILES, dataset_config, receipt
from capmerge.source import Source, fingerprint
from capmerge.tally import Tally
from capmerge.templates import MergeOptions

if TYPE_CHECKING:
    from capmerge.index_build import Indexing

_SAMPLE_RECORDS, _SAMPLE_BYTES = 1000, 8 << 20  # a pipe's bytes are held meanwhile


_JSON = Format("json")


@dataclass(frozen=True, slots=True)
class RewriteOptions:
    """One run of `capmerge rewrite`; `merge` decides what a record becomes, the rest how the run is done."""

    target: Path | None
    """None: standard output."""
    format: Format = _JSON
    merge: MergeOptions = field(default_factory=MergeOptions)
    on_error: OnError = "stop"
    jobs: int = 1
    force: bool = False
    stats: Tokenizers | None = None
    """Count the output in the same pass, with these."""
    index: bool = False
    """Write the index of the output in the same pass."""
    max_record_bytes: int = MAX_RECORD_BYTES
    start_method: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a finished run has to tell."""

    tally: Tally
    read_bytes: int
    """Of the source as it lies on disk or comes from the pipe."""
    written_bytes: int
    statistics: Document | None = None
    """Of the output, when they were asked for."""


def rewrite(source: Source, options: RewriteOptions, *, warn: Callable[[str], None], progress: Callable[[int], None]) -> Outcome:
    """Rewrite `source` into `options.target` and its side files, which appear together when all is done.

    `warn` is given each warning, `progress` the offset that is done.
    Raises `UsageError`, `DataError`, `OutputError` or `WorkerError`; then nothing new is there.
    """
    if options.index:
        _check_indexable(options)
    target = options.target and check_target(options.target, source, force=options.force, side_suffixes=SIDE_FILES)
    layout = read_layout(source, options.max_record_bytes)
    sample = _sample(source, layout, options)
    if sample.growth > 2 and options.merge.weights == "repeat":
        warn(f"The output will be about {sample.growth:.1f} times the input: weights repeat lines. --weights field stores numbers.")
    if target:
        _check_room(target, source, sample.growth)
    end = layout.first

    def done(offset: int) -> None:
        nonlocal end
        end = offset
        progress(offset)

    files = OutputFiles(target, SIDE_FILES)
    scratch = ExitStack()
    try:
        records = _RecordSink(main := files.open(), options.format)
        rejects = _RejectSink(partial(files.side, REJECTS) if target else None)
        indexing = scratch.enter_context(_indexing(target, options.format, records)) if target and options.index else None
        gathered = Gathered(options.stats) if options.stats else None
        work = partial(
            Rewriter,
            source.name,
            layout,
            options.merge,
            options.on_error,
            options.format,
            gathered.make_observer() if gathered else None,
            indexing.make_rows() if indexing else None,
        )
        sinks = [records, rejects, indexing.rows if indexing else rejects, *(gathered.sinks() if gathered else ())]
        jobs = useful_jobs(source, options.jobs)
        tally = Tally()

        def collect(counted: Counted) -> None:
            tally.add(counted.tally)
            if gathered:
                gathered.stats.merge(counted.stats)

        run_blocks(source, layout, work, sinks, collect=collect, jobs=jobs, progress=done, start_method=options.start_method)
        records.finish()
        read_bytes = source.read_bytes(end)
        source.check_unchanged()
        if indexing and isinstance(main, AtomicFile):
            with main.read_back() as written:
                indexing.write(files.side(INDEX), written)
        name = target.name if target else source.name
        statistics = gathered.document(name, source, layout, options.merge) if gathered else None
        if target:
            files.side(RECEIPT).write(receipt(source.name, fingerprint(source), options.merge, options.on_error, tally).encode())
            files.side(DATASET).write(dataset_config(target, (source.path or target).resolve().parent, sample.resolutions).encode())
        files.publish()
    except BaseException:
        files.discard()
        raise
    finally:
        scratch.close()
    return Outcome(tally, read_bytes, main.written_bytes, statistics)


def _check_indexable(options: RewriteOptions) -> None:
    """Raise `UsageError` for an output that has no offsets."""
    if options.target is None:
        raise UsageError("--index: standard output cannot be read by offsets. Give -o OUT, a file.")
    if options.format.gz:
        shown = printable(str(options.target))
        raise UsageError(f"{shown}: --index needs offsets, which gzip has not. Choose a -o that does not end in .gz.")


def _indexing(target: Path, out: Format, records: "_RecordSink") -> "Indexing":
    from capmerge.index_build import Indexing

    return Indexing(target, out.kind, lambda: records.block_start)


def first_records(source: Source, options: RewriteOptions, count: int) -> Iterator[tuple[str, Any, Record | str]]:
    """The first `count` records: key, the record as it is, and as it would be written, or why it cannot be."""
    layout = read_layout(source, options.max_record_bytes)
    merger = Merger(options.merge, reserved_fields(options.format))
    pairs = (pair for piece in iter_source(source, layout) for pair in piece.records.pairs)
    for key, record in islice(pairs, count):
        before = record.value if isinstance(record, Stray) else copy_of(record)
        try:
            merger.merge(record)
            yield key, before, record
        except UnmergeableError as error:
            yield key, before, record.problem if isinstance(record, Stray) else str(error)
        except RewrittenError:
            yield key, before, "the record is rewritten already."


_OPENINGS: dict[Kind, bytes] = {"json": b"{\n", "jsonl": b""}
_CLOSINGS: dict[Kind, bytes] = {"json": b"\n}", "jsonl": b"\n"}
_NOTHING: dict[Kind, bytes] = {"json": b"{}", "jsonl": b""}


class _RecordSink:
    """The stream of records: what stands before, between and behind the blocks' output."""

    def __init__(self, file: AtomicFile | StandardOutput, out: Format) -> None:
        self._file, self._out = file, out
        self._empty = True
        self.block_start = 0
        """Where the output of the last block begins."""

    def write(self, data: Buffer, *, new_block: bool) -> None:
        """Append the output of a block."""
        if new_block:
            self._write((_OPENINGS if self._empty else SEPARATORS)[self._out.kind])
            self._empty = False
            self.block_start = self._file.written_bytes
        self._file.write(data)

    def finish(self) -> None:
        """Write what stands behind the last record."""
        self._write((_NOTHING if self._empty else _CLOSINGS)[self._out.kind])

    def _write(self, text: bytes) -> None:
        self._file.write(compressed(text) if self._out.gz else text)


class _RejectSink:
    """The stream of records left out: a side file opened at the first of them, or standard error."""

    def __init__(self, open_file: Callable[[], AtomicFile] | None) -> None:
        self._open_file = open_file
        self._file: AtomicFile | None = None

    def write(self, data: Buffer, *, new_block: bool) -> None:  # noqa: ARG002  # lines need nothing between blocks
        """Append lines of JSON."""
        if self._open_file is None:
            text = bytes(data).decode(errors="backslashreplace")
            sys.stderr.write("".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text))  # still JSON
            return
        self._file = self._file or self._open_file()
        self._file.write(data)


class _Sample(NamedTuple):
    """What the first records tell of the rest."""

    growth: float
    """Output bytes over input bytes."""
    resolutions: set[tuple[int, int]]
    """[width, height] in px."""


def _sample(source: Source, layout: Layout, options: RewriteOptions) -> _Sample:
    """The first `_SAMPLE_RECORDS` records, fewer when they are long, rewritten and thrown away; all can be read again."""
    rewriter = Rewriter(source.name, layout, options.merge, options.on_error, options.format)
    records, read_bytes, written_bytes = 0, 0, 0
    resolutions = set()
    for piece in iter_source(source, layout, keep=True):
        body, _ = rewriter.rewrite(piece)
        records += len(piece.records.pairs)
        read_bytes += len(piece.data)
        written_bytes += len(compressed(body) if options.format.gz else body)
        for _, record in piece.records.pairs:
            match record:
                case {"train_resolution": [int(width), int(height)]}:
                    resolutions.add((width, height))
        if records >= _SAMPLE_RECORDS or read_bytes >= _SAMPLE_BYTES:
            break
    return _Sample(written_bytes / max(1, read_bytes), resolutions)


def _check_room(target: Path, source: Source, growth: float) -> None:
    """Raise `OutputError` when the disk has less room than the output will take."""
    if source.path is None or source.total_bytes is None:
        return
    total, _, free = shutil.disk_usage(target.parent)
    needed = source.total_bytes * growth
    if needed > free and total:  # some network file systems tell no sizes
        raise OutputError(
            f"{printable(str(target))}: the output will take about {needed / 1e9:,.2f} GB, and {free / 1e9:,.2f} GB are free there. "
            "Free some room, choose another -o, or an output that ends in .gz."
        )
