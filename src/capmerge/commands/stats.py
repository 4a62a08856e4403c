"""The work of `capmerge stats`: source -> blocks -> workers merge and count records -> a document.

The records go through the merge of a rewrite and are counted as they come out of it, so the figures
of an original file are those of the file that the same options would write.
"""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from capmerge.captions.tally import Tally
from capmerge.captions.tally_notes import missing_text_notes, tag_notes
from capmerge.captions.templates import MergeOptions
from capmerge.commands.latent_files import with_image_size
from capmerge.commands.merge_blocks import BlockMerger, Counted, OnError
from capmerge.files.atomic import AtomicFile
from capmerge.files.source import Source
from capmerge.metadata.blocks import MAX_RECORD_BYTES, read_layout
from capmerge.metadata.parallel import run_blocks, useful_jobs
from capmerge.stats.collector import Gathered, Tokenizers
from capmerge.stats.document import Document
from capmerge.stats.repeated_keys import KeyCheck, KeyNotes


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """The options of one run of `capmerge stats`; `merge` is for records not yet rewritten."""

    merge: MergeOptions = field(default_factory=MergeOptions)
    tokenizers: Tokenizers = field(default_factory=Tokenizers)
    per_record: Path | None = None
    """The file that gets one line of JSON per record."""
    on_error: OnError = "stop"
    jobs: int = 1
    max_record_bytes: int = MAX_RECORD_BYTES
    start_method: str | None = None


def measure(
    source: Source,
    options: MeasureOptions,
    *,
    warn: Callable[[str], None] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Document:
    """The statistics of `source`; `progress` is told the offset that is done.

    `warn` is given each note on equal keys, on texts that are missing, and on tags dropped and
    replaced.

    Raises `UsageError`, `DataError`, `OutputError` or `WorkerError`; then `options.per_record` is
    not written either.
    """
    layout = read_layout(source, options.max_record_bytes)
    with (
        AtomicFile(options.per_record) if options.per_record else nullcontext() as lines,
        KeyCheck(None) as keys,
    ):
        gathered = Gathered(options.tokenizers, lines)
        merge = replace(options.merge, allow_rewritten=True)
        work = partial(
            BlockMerger,
            source.name,
            layout,
            merge,
            options.on_error,
            None,
            gathered.make_observer(),
            make_keys=KeyNotes,
        )
        total = Counted(Tally(), gathered.stats)
        run_blocks(
            source,
            layout,
            work,
            gathered.sinks() | keys.sinks(),
            collect=total.add,
            jobs=useful_jobs(source, options.jobs),
            progress=progress,
            start_method=options.start_method,
        )
        source.check_unchanged()
        repeated = keys.result()
        used = with_image_size(options.merge, None)
        document = gathered.document(source.name, source, layout, used)
        if lines:
            lines.publish()
    if warn:
        for note in (
            *repeated.notes(),
            *missing_text_notes(total.tally),
            *tag_notes(total.tally, options.merge),
        ):
            warn(note)
    return document
