"""The work of `capmerge rewrite`: source -> blocks -> workers merge each record -> ordered output.

This module owns the whole run, from the first look at the source to the rename of the output. What
a worker does with a block is in `merge_blocks`.
"""

import json
import shutil
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from capmerge.captions.tally import Tally
from capmerge.captions.templates import MergeOptions
from capmerge.commands.dataset_config import dataset_config
from capmerge.commands.latent_files import Evidence, count_names, evidence, with_image_size
from capmerge.commands.merge_blocks import BlockMerger, Counted, OnError
from capmerge.commands.receipt import receipt
from capmerge.commands.rewrite_sample import check_room, growth_warning, take_sample
from capmerge.commands.targets import check_in_place, check_target
from capmerge.errors import DataError, UsageError, printable
from capmerge.files.atomic import AtomicFile, Buffer, OutputFiles, StandardOutput
from capmerge.files.backup import backup_path, keep_backup
from capmerge.files.source import Source, fingerprint
from capmerge.metadata.blocks import MAX_RECORD_BYTES, read_layout
from capmerge.metadata.format import (
    DATASET,
    INDEX,
    RECEIPT,
    REJECTS,
    SIDE_FILES,
    Format,
    RecordWriter,
)
from capmerge.metadata.parallel import run_blocks, useful_jobs
from capmerge.stats.repeated_keys import KeyCheck, KeyNotes, RepeatedKeys

if TYPE_CHECKING:
    from capmerge.index.build import Indexing
    from capmerge.metadata.work import Sink, Stream
    from capmerge.stats.collector import Gathered, Tokenizers
    from capmerge.stats.document import Document

_JSON = Format("json")


@dataclass(frozen=True, slots=True)
class RewriteOptions:
    """The options of one run of `capmerge rewrite`.

    `merge` decides what a record becomes; the other options decide how the run is done.
    """

    target: Path | None
    """The file to write; None for standard output, and not looked at with `in_place`."""
    format: Format = _JSON
    merge: MergeOptions = field(default_factory=MergeOptions)
    on_error: OnError = "stop"
    jobs: int = 1
    force: bool = False
    in_place: bool = False
    """True to replace the source, which keeps the name of its backup."""
    stats: "Tokenizers | None" = None
    """The tokenizers that count the output in the same pass; None to count nothing."""
    index: bool = False
    """True to write the index of the output in the same pass."""
    shard_keys: "Sink | None" = None
    """For one of many shards: a sink that takes the keys of all records, as `joined_keys` does.

    The counts of all shards are merged later, so a shard gets no dataset config and no document of
    statistics of its own; `Outcome.gathered` has what these are made of."""
    latents: Path | None = None
    """The folder of the cached latents, whose names tell their kind; None to go by the records."""
    max_record_bytes: int = MAX_RECORD_BYTES
    start_method: str | None = None


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a finished run."""

    tally: Tally
    read_bytes: int
    """Bytes of the source as it is on disk or comes from the pipe, so before it is unzipped."""
    written_bytes: int
    latents: Evidence
    """The kind of the cached latents, by their names or by the sizes in the records."""
    repeated: RepeatedKeys
    """The keys, and the fields of records, that occur more than once."""
    statistics: "Document | None" = None
    """The statistics of the output; None for a shard, and when they were not asked for."""
    gathered: "Gathered | None" = None
    """What the statistics are made of; None when they were not asked for."""


def rewrite(
    source: Source,
    options: RewriteOptions,
    *,
    warn: Callable[[str], None] | None = None,
    progress: Callable[[int], None] | None = None,
    listing: Callable[[int], None] | None = None,
) -> Outcome:
    """Rewrite `source` into `options.target` and its side files, and return the counts of the run.

    The files appear together when all is done. `warn` is given each warning, `progress` the offset
    that is done, and `listing` the number of names seen in the folder of latents. Raises
    `UsageError`, `DataError`, `OutputError` or `WorkerError`; then no file was written or replaced.
    """
    # Check everything that can be checked before a file is opened.
    if options.index:
        _check_indexable(options)
    if options.in_place:
        target: Path | None = check_in_place(source)
    else:
        target = options.target and check_target(
            options.target, source, force=options.force, side_suffixes=SIDE_FILES
        )
    layout = read_layout(source, options.max_record_bytes)

    # The latents say whether records with a train_resolution alone get an image_size.
    names = count_names(options.latents, listing) if options.latents else None
    options = replace(options, merge=with_image_size(options.merge, names))

    # Rewrite a sample to estimate how large the output will be.
    sample = take_sample(source, layout, options.merge, options.on_error, options.format)
    if warn and sample.growth > 2:
        warn(growth_warning(sample, options.merge))
    if target:
        check_room(target, source, sample.growth)

    with ExitStack() as stack:
        # Open the outputs. Statistics and an index add sinks for the notes of the workers.
        files = stack.enter_context(OutputFiles(target, SIDE_FILES))
        output = files.open()
        records = RecordWriter(output, options.format)
        rejects = _RejectsFile(partial(files.side, REJECTS)) if target else _RejectsOnStderr()
        sinks: dict[Stream, Sink] = {"records": records, "rejects": rejects}
        indexing = gathered = None
        if target and options.index:
            indexing = stack.enter_context(_indexing(target, options.format, records))
            sinks["rows"] = indexing.rows
        if options.stats:
            from capmerge.stats.collector import Gathered

            gathered = Gathered(options.stats)
            sinks |= gathered.sinks()
        keys = stack.enter_context(KeyCheck(target))
        sinks |= keys.sinks()
        if options.shard_keys:
            sinks["keys"] = _Both(sinks["keys"], options.shard_keys)

        # Merge every block.
        work = partial(
            BlockMerger,
            source.name,
            layout,
            options.merge,
            options.on_error,
            options.format,
            gathered.make_observer() if gathered else None,
            indexing.make_rows() if indexing else None,
            KeyNotes,
        )
        total = Counted(Tally(), gathered.stats if gathered else None)
        end = run_blocks(
            source,
            layout,
            work,
            sinks,
            collect=total.add,
            jobs=useful_jobs(source, options.jobs),
            progress=progress,
            start_method=options.start_method,
        )
        records.finish()
        read_bytes = source.read_bytes(end)
        source.check_unchanged()

        found = evidence(total.tally, names, image_size=bool(options.merge.image_size))
        repeated = keys.result()

        # Finish the side files, and give all files their final names together.
        name = target.name if target else source.name
        statistics = None
        if gathered and not options.shard_keys:
            statistics = gathered.document(name, source, layout, options.merge)
        if indexing and isinstance(output, AtomicFile):
            with output.read_back() as written:
                indexing.write(files.side(INDEX), written)
        if target:
            counts = {
                **total.tally.as_dict(),
                "repeated_keys": repeated.records,
                "repeated_fields": repeated.doubled,
                "read_bytes": read_bytes,
                "written_bytes": output.written_bytes,
            }
            name = _name_of_source(source, target) if options.in_place else source.name
            made = receipt(name, fingerprint(source), options.merge, options.on_error, counts)
            folder = (source.path or target).resolve().parent
            files.side(RECEIPT).write(made.encode())
            if not options.shard_keys:
                config = dataset_config(target, folder, sample.resolutions, found)
                files.side(DATASET).write(config.encode())
        files.publish(partial(_swap, source, target, output) if options.in_place else None)
    return Outcome(
        total.tally, read_bytes, output.written_bytes, found, repeated, statistics, gathered
    )


def _name_of_source(source: Source, target: Path) -> str:
    """The name of the backup that a rewrite in place makes of its source, as the user names it."""
    is_link = Path(source.name).is_symlink()
    return str(backup_path(target if is_link else Path(source.name)))


def _swap(source: Source, target: Path | None, output: AtomicFile | StandardOutput) -> None:
    """Keep the source as its backup, just before the output takes its name.

    Raises `DataError` where another file has its name by now.
    """
    assert target is not None  # a source that is replaced has a path
    assert isinstance(output, AtomicFile)
    if not source.is_file(target):
        raise DataError(
            source.name,
            None,
            None,
            "another file took its place while it was read.",
            "Run again when nothing writes to it.",
        )
    shutil.copymode(target, output.temporary)
    keep_backup(target)
    if sys.platform == "win32":  # which replaces no open file
        source.close()


def _check_indexable(options: RewriteOptions) -> None:
    """Raise `UsageError` for an output that has no offsets."""
    if options.target is None:
        raise UsageError(
            "--index: standard output cannot be read by byte offsets. Give a file with -o OUT."
        )
    if options.format.compression:
        shown = printable(str(options.target))
        raise UsageError(
            f"{shown}: found a compressed output, but --index needs byte offsets, which it does "
            f"not have. Choose an -o that does not end in .{options.format.compression}."
        )


def _indexing(target: Path, out: Format, records: "RecordWriter") -> "Indexing":
    from capmerge.index.build import Indexing
    from capmerge.index.reader import index_path

    return Indexing(index_path(target), out.kind, lambda: records.block_start)


class _RejectsFile:
    """A sink for the records left out: a side file that is opened at the first of them."""

    def __init__(self, open_file: Callable[[], AtomicFile]) -> None:
        self._open_file = open_file
        self._file: AtomicFile | None = None

    def write(self, data: Buffer, *, new_block: bool) -> None:  # noqa: ARG002  # a sink
        """Append lines of JSON."""
        self._file = self._file or self._open_file()
        self._file.write(data)


class _RejectsOnStderr:
    """A sink for the records left out when OUT is standard output, which has no side files."""

    def write(self, data: Buffer, *, new_block: bool) -> None:  # noqa: ARG002  # a sink
        """Print lines of JSON on standard error, with characters that act on a terminal escaped."""
        text = bytes(data).decode(errors="backslashreplace")
        sys.stderr.write(
            "".join(c if c.isprintable() or c == "\n" else json.dumps(c)[1:-1] for c in text)
        )


class _Both:
    """A sink that hands everything on to two others."""

    def __init__(self, *sinks: "Sink") -> None:
        self._sinks = sinks

    def write(self, data: Buffer, *, new_block: bool) -> None:
        """Append `data` to both."""
        for sink in self._sinks:
            sink.write(data, new_block=new_block)
