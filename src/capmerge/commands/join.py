"""The work of `capmerge join`: surveys of all files -> links of equal keys -> the joined records.

A first pass notes where the records of each file are, and their keys. Records with equal keys are
then linked on disk. The second pass goes over the files in their order; at the first record with a
key it looks up the others. So no file is in memory, and files may be in any order.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from capmerge.captions.fields import MARK
from capmerge.commands.join_blocks import Joiner
from capmerge.commands.join_fields import FieldRules, OnConflict
from capmerge.commands.join_reader import JoinedFile
from capmerge.commands.records_output import check_is_file
from capmerge.commands.targets import check_target
from capmerge.errors import UsageError, printable, quoted
from capmerge.files.atomic import AtomicFile, Buffer, OutputFiles
from capmerge.files.scratch import ScratchFolder, spooled
from capmerge.files.source import FileSource, Source
from capmerge.metadata.blocks import MAX_RECORD_BYTES, FileLayout, read_layout
from capmerge.metadata.format import SIDE_FILES, Format, RecordWriter
from capmerge.metadata.key_bytes import key_bytes
from capmerge.metadata.key_links import KeyedSource, link_keys
from capmerge.metadata.parallel import run_blocks, useful_jobs
from capmerge.metadata.raw_records import Origin
from capmerge.metadata.survey import Survey, survey

if TYPE_CHECKING:
    from capmerge.metadata.work import Sink, Stream


@dataclass(frozen=True, slots=True)
class JoinOptions:
    """The options of one run of `capmerge join`, where sources are numbered from 0."""

    target: Path
    prefixes: Mapping[int, str] = field(default_factory=dict)
    """What is put before the keys of a source."""
    fields: Mapping[str, int] = field(default_factory=dict)
    """The source that gives a field; if there are any, records are joined field by field."""
    on_conflict: OnConflict = "error"
    missing: Path | None = None
    """The file that gets a line of JSON for each record that lacks one of `fields`."""
    jobs: int = 1
    force: bool = False
    max_record_bytes: int = MAX_RECORD_BYTES
    start_method: str | None = None


class Outcome(NamedTuple):
    """The result of a finished run."""

    records: list[tuple[str, int]]
    """The number of records in each file."""
    written: int
    """The number of records in the output."""
    equal: int
    """The records that were left out because an equal one with their key is there."""
    conflicts: int
    """The records, or fields, that gave way to others by `on_conflict`."""
    doubled: int
    """The records that were written again and have a field more than once; the last one counts."""
    missing: dict[str, int]
    """For each of the fields that a file gives, the number of records that lack it."""
    without_record: dict[str, int]
    """How many of these have no record in that file at all."""
    written_bytes: int


Progress = Callable[[Source], AbstractContextManager[Callable[[int], None] | None]]


def _silent(_: Source) -> AbstractContextManager[None]:
    return nullcontext()


def join(
    sources: Sequence[Source], options: JoinOptions, *, progress: Progress | None = None
) -> Outcome:
    """Join `sources` into `options.target`, and return the counts of the run.

    `progress` is called for each pass over a source, and gives a context with a function that is
    told the offset that is done. Raises `UsageError`, `DataError`, `OutputError` or `WorkerError`;
    then no file was written or replaced.
    """
    bar = progress or _silent
    names = [source.name for source in sources]
    rules = _rules(names, options)
    target, missing = _checked_targets(sources, options)
    out = Format.choose(None, target)
    with ExitStack() as stack:
        files = stack.enter_context(OutputFiles(target, SIDE_FILES))
        output = files.open()
        lines = files.another(missing) if missing else None
        scratch = stack.enter_context(ScratchFolder(target))

        # Find the records of every file, and their keys.
        opened: list[tuple[FileSource, FileLayout, Survey]] = []
        for number, source in enumerate(sources):
            layout = read_layout(source, options.max_record_bytes, may_be_empty=True)
            with bar(source) as done:
                file = (
                    source
                    if isinstance(source, FileSource)
                    else stack.enter_context(spooled(source, scratch, f"{number}.copy", done))
                )
            with bar(file) as done:
                found = survey(
                    file,
                    layout,
                    scratch,
                    str(number),
                    keys=True,
                    jobs=options.jobs,
                    progress=done,
                    start_method=options.start_method,
                )
            opened.append((file, layout, found))

        # Link the records with equal keys.
        prefixes = [options.prefixes.get(number, "") for number in range(len(sources))]
        keyed = [
            KeyedSource(found.keys, found.spans.count, key_bytes(prefix))
            for (_, _, found), prefix in zip(opened, prefixes, strict=True)
            if found.keys
        ]
        linked = link_keys(keyed, scratch)

        # Write the records, each where its key comes first.
        records = RecordWriter(output, out)
        sinks: dict[Stream, Sink] = {"records": records, "missing": _Lines(lines)}
        joined = [
            JoinedFile(Origin(file.name, layout, prefix), file.path, file.identity, found.spans)
            for (file, layout, found), prefix in zip(opened, prefixes, strict=True)
            if file.path
        ]
        total: Counter[str] = Counter()
        for number, (file, layout, _) in enumerate(opened):
            if not linked.firsts[number]:
                continue
            with bar(file) as done:
                run_blocks(
                    file,
                    layout,
                    partial(Joiner, number, joined, linked.links, out, options.on_conflict, rules),
                    sinks,
                    collect=total.update,
                    jobs=useful_jobs(file, options.jobs),
                    progress=done,
                    start_method=options.start_method,
                )
        records.finish()
        for file, _, _ in opened:
            file.check_unchanged()
        files.publish()
    return Outcome(
        [(name, one.records) for name, one in zip(names, keyed, strict=True)],
        sum(linked.firsts),
        total["equal"],
        total["conflicts"],
        total["doubled"],
        {name: total[f"missing {name}"] for name in options.fields},
        {name: total[f"no record {name}"] for name in options.fields},
        output.written_bytes,
    )


def _rules(names: Sequence[str], options: JoinOptions) -> FieldRules | None:
    """The rules of a join of fields; None for a join of whole records."""
    for name in names:
        if names.count(name) > 1:
            raise UsageError(
                f"{printable(name)}: the file is given twice. Name each file once, or copy it."
            )
    if options.missing and not options.fields:
        raise UsageError(
            "--missing lists the records that lack a field of --fields. Give --fields too, or "
            "leave --missing out."
        )
    for prefix in options.prefixes.values():
        if not prefix.isascii() and prefix != prefix.encode("utf-8", "replace").decode():
            raise UsageError(f"--key-prefix {quoted(prefix)}: expected text in UTF-8.")
    for name in options.fields:
        if name.startswith(MARK):
            raise UsageError(
                f"--fields {printable(name)}: the fields that a rewrite adds come with the "
                "caption. Say which file gives the caption."
            )
    if not options.fields:
        return None
    return FieldRules(names, options.fields, options.on_conflict)


def _checked_targets(sources: Sequence[Source], options: JoinOptions) -> tuple[Path, Path | None]:
    """The real paths of the output and of the list of what is missing."""
    check_is_file(options.target)
    target, missing = options.target, options.missing
    for source in sources:
        target = check_target(options.target, source, force=options.force, side_suffixes=SIDE_FILES)
        missing = options.missing and check_target(options.missing, source, force=options.force)
    if missing == target:
        raise UsageError(
            f"{printable(str(options.missing))}: the output and the list of what is missing have "
            "one name. Give each its own."
        )
    return target, missing


class _Lines:
    """The sink of the lines of JSON on what is missing; without a file they are thrown away."""

    def __init__(self, file: AtomicFile | None) -> None:
        self._file = file

    def write(self, data: Buffer, *, new_block: bool) -> None:  # noqa: ARG002  # a sink
        """Append lines."""
        if self._file:
            self._file.write(data)
