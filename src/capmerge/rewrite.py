"""The story of `capmerge rewrite`: source -> blocks -> workers merge each record -> one ordered output.

`Rewriter` is what a worker does with a block. `rewrite` is the whole run, from the first look at the source to the
rename of the output.
"""

import json
import shutil
import sys
import zlib
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

from capmerge.blocks import MAX_RECORD_BYTES, Block, Kind, Layout, read_layout
from capmerge.caption import Merger, Record, RewrittenError, UnmergeableError, copy_of
from capmerge.caption_stats import CaptionStats
from capmerge.codec import IMAGE_PATH, MiscutError, Piece, Records, Stray, encode, iter_block, iter_source, place_of, to_json
from capmerge.document import Document
from capmerge.duplicates import RecordPlaces
from capmerge.errors import DataError, OutputError, RecordError, UsageError, printable
from capmerge.gather import Gathered, Tokenizers
from capmerge.marks import MARK
from capmerge.observe import Observer
from capmerge.output import AtomicFile, Buffer, OutputFiles, StandardOutput, check_target
from capmerge.parallel import run_blocks, useful_jobs
from capmerge.side_files import DATASET, RECEIPT, REJECTS, SIDE_FILES, dataset_config, receipt
from capmerge.source import Source, fingerprint
from capmerge.tally import Tally
from capmerge.templates import MergeOptions

_SAMPLE_RECORDS, _SAMPLE_BYTES = 1000, 8 << 20  # a pipe's bytes are held meanwhile
_OUT, _REJECTS, *STATS_STREAMS = range(5)


OnError = Literal["stop", "skip"]
FormatName = Literal["json", "jsonl", "json.gz", "jsonl.gz"]


class Format(NamedTuple):
    """What the output is written as."""

    kind: Kind
    gz: bool = False

    @classmethod
    def choose(cls, name: FormatName | None, target: Path | None) -> "Format":
        """The format that `--format` asks for, or the target's ending, or JSON.

        Raises `UsageError` when the two disagree: sd-scripts goes by the ending.
        """
        asked = cls("jsonl" if name.startswith("jsonl") else "json", name.endswith(".gz")) if name else None
        if target is None:
            return asked or cls("json")
        endings = [suffix.lower() for suffix in target.suffixes[-2:]]
        gz = endings[-1:] == [".gz"]
        ending = (endings[:-1] if gz else endings)[-1:]
        by_name = cls("jsonl" if ending == [".jsonl"] else "json", gz)
        if asked is None or asked == by_name:
            return by_name
        if ending in ([".json"], [".jsonl"]) or asked.kind == "jsonl" or gz:
            expected = f".{name}"
            raise UsageError(
                f"{printable(str(target))}: --format {name} writes a file that ends in {expected}, and readers go by the ending. "
                f"Name the output *{expected}, or leave --format out."
            )
        return asked


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


def reserved_fields(out: Format) -> tuple[str, ...]:
    """The names that a record must not have in this format."""
    return (IMAGE_PATH,) if out.kind == "jsonl" else ()


class Counted(NamedTuple):
    """What a worker has counted."""

    tally: Tally
    stats: CaptionStats


class Rewriter:
    """What a worker does with each block of a rewrite, or of statistics alone when `out` is None.

    `make_observer` gives what counts the rewritten records, if anything does.
    """

    def __init__(
        self,
        name: str,
        layout: Layout,
        merge: MergeOptions,
        on_error: str,
        out: Format | None,
        make_observer: Callable[[], Observer] | None = None,
    ) -> None:
        self._name, self._layout, self._out = name, layout, out
        self._merger = Merger(merge, reserved_fields(out) if out else ())
        self._observer = make_observer and make_observer()
        self._kept = Counted(Tally(), CaptionStats())
        self._skips = on_error == "skip"

    def run(self, block: Block, data: bytes) -> Iterator[tuple[int, Buffer]]:
        """The rewritten records of a block, and the records that had to be left out."""
        miscut = None
        try:
            yield from self._run(block, data)
        except MiscutError as error:
            miscut = error  # the pieces before it stand
        if self._observer:
            yield from zip(STATS_STREAMS, self._observer.count(), strict=True)
        if miscut:
            raise miscut

    def _run(self, block: Block, data: bytes) -> Iterator[tuple[int, Buffer]]:
        separator = b""
        whole = self._merger.options.fit_tokens is not None  # the tokens of many records are counted at a time
        for piece in iter_block(data, self._layout, block, whole=whole):
            records, left_out, rejects = self.merge(piece)
            if self._observer:
                self._observe(self._observer, piece, left_out)
            body = encode(records, self._out.kind) if self._out else b""
            if body:
                parts = (separator, body)
                assert self._out is not None  # there is a body
                yield from ((_OUT, part) for part in ((_compressed(b"".join(parts)),) if self._out.gz else parts))
                separator = _SEPARATORS[self._out.kind]
            if rejects:
                yield _REJECTS, rejects

    def take(self) -> Counted:
        """The counts of the last block."""
        counted = Counted(self._merger.tally.take(), self._observer.take() if self._observer else CaptionStats())
        counted.stats.records.rewritten_before = counted.tally.passed
        return counted

    def keep(self, counted: Counted) -> None:
        """Add the counts of a block that stands."""
        self._kept.tally.add(counted.tally)
        self._kept.stats.merge(counted.stats)

    def is_full(self) -> bool:
        """Whether the counts that are kept take so much memory that the parent should add them up."""
        return self._kept.stats.is_large

    def result(self) -> Counted:
        """The counts of this process since the last call."""
        kept, self._kept = self._kept, Counted(Tally(), CaptionStats())
        kept.stats.count_tags()
        return kept

    def _observe(self, observer: Observer, piece: Piece, left_out: Collection[int]) -> None:
        """Note the records of a merged piece."""
        place = RecordPlaces.entry(piece.start, len(piece.data), len(piece.records.pairs), last=piece.last)
        failures = observer.note(piece.records.pairs, place, left_out)
        if failures and not self._skips:
            number, error = failures[0]
            raise self._error(RecordError, piece, number, str(error), "Rewrite the original again, or use --on-error skip.")

    def rewrite(self, piece: Piece) -> tuple[Buffer, bytes]:
        """A piece's records as they stand in the output, and a line of JSON for each that had to be left out."""
        records, _, rejects = self.merge(piece)
        return encode(records, self._out.kind) if self._out else b"", rejects

    def merge(self, piece: Piece) -> tuple[Records, Collection[int], bytes]:
        """A piece's records merged, the numbers of those that had to be left out, and a line of JSON for each of them."""
        records = piece.records
        failures = self._merger.merge_all(records.values())
        if not failures:
            return records, (), b""
        pairs, rejects = list(records.pairs), []
        for number, error in failures:
            key, record = pairs[number]
            if isinstance(error, RewrittenError):
                problem = f'found a field "{MARK}": the record is rewritten already, and its braces would double.'
                next_step = "Give the original file, or --allow-rewritten to pass such records through unchanged."
                raise self._error(DataError, piece, number, problem, next_step)
            value, problem = (record.value, record.problem) if isinstance(record, Stray) else (record, str(error))
            if not self._skips:
                next_step = "Mend the record, or use --on-error skip to leave such records out and list them."
                raise self._error(RecordError, piece, number, problem, next_step)
            rejects.append(to_json({"key": key, "reason": problem, "record": value}) + "\n")
        self._merger.tally.rejected += len(rejects)
        left_out = {number for number, _ in failures}
        kept = [pair for number, pair in enumerate(pairs) if number not in left_out]
        return Records(kept, records.exact), left_out, "".join(rejects).encode()

    def _error(self, kind: type[DataError], piece: Piece, number: int, problem: str, next_step: str) -> DataError:
        """The error for one record, with its place in the source."""
        place = place_of(self._name, self._layout, piece, number)
        return kind(self._name, place, list(piece.records.pairs)[number][0] or None, problem, next_step)


def rewrite(source: Source, options: RewriteOptions, *, warn: Callable[[str], None], progress: Callable[[int], None]) -> Outcome:
    """Rewrite `source` into `options.target` and its side files, which appear together when all is done.

    `warn` is given each warning, `progress` the offset that is done.
    Raises `UsageError`, `DataError`, `OutputError` or `WorkerError`; then nothing new is there.
    """
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
    try:
        records = _RecordSink(main := files.open(), options.format)
        rejects = _RejectSink(partial(files.side, REJECTS) if target else None)
        gathered = Gathered(options.stats) if options.stats else None
        make_observer = gathered.make_observer() if gathered else None
        work = partial(Rewriter, source.name, layout, options.merge, options.on_error, options.format, make_observer)
        sinks = [records, rejects, *(gathered.sinks() if gathered else ())]
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
        name = target.name if target else source.name
        statistics = gathered.document(name, source, layout, options.merge) if gathered else None
        if target:
            files.side(RECEIPT).write(receipt(source.name, fingerprint(source), options.merge, options.on_error, tally).encode())
            files.side(DATASET).write(dataset_config(target, (source.path or target).resolve().parent, sample.resolutions).encode())
        files.publish()
    except BaseException:
        files.discard()
        raise
    return Outcome(tally, read_bytes, main.written_bytes, statistics)


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


_SEPARATORS: dict[Kind, bytes] = {"json": b",\n", "jsonl": b"\n"}
_OPENINGS: dict[Kind, bytes] = {"json": b"{\n", "jsonl": b""}
_CLOSINGS: dict[Kind, bytes] = {"json": b"\n}", "jsonl": b"\n"}
_NOTHING: dict[Kind, bytes] = {"json": b"{}", "jsonl": b""}


class _RecordSink:
    """The stream of records: what stands before, between and behind the blocks' output."""

    def __init__(self, file: AtomicFile | StandardOutput, out: Format) -> None:
        self._file, self._out = file, out
        self._empty = True

    def write(self, data: Buffer, *, new_block: bool) -> None:
        """Append the output of a block."""
        if new_block:
            self._write((_OPENINGS if self._empty else _SEPARATORS)[self._out.kind])
            self._empty = False
        self._file.write(data)

    def finish(self) -> None:
        """Write what stands behind the last record."""
        self._write((_NOTHING if self._empty else _CLOSINGS)[self._out.kind])

    def _write(self, text: bytes) -> None:
        self._file.write(_compressed(text) if self._out.gz else text)


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
        written_bytes += len(_compressed(body) if options.format.gz else body)
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


def _compressed(data: Buffer) -> bytes:
    """`data` as a gzip member of its own, without a time stamp: members in a row are a gzip file."""
    return zlib.compress(data, 6, wbits=31)
