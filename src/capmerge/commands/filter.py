"""The work of `capmerge filter`: lists of what is wanted -> blocks -> records that are kept."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from capmerge.commands.filter_blocks import Filter, Wanted
from capmerge.commands.key_files import iter_listed_keys
from capmerge.commands.records_output import check_is_file
from capmerge.commands.targets import check_target
from capmerge.errors import UsageError, printable
from capmerge.files.atomic import AtomicFile, Buffer, OutputFiles, side_path
from capmerge.files.source import Source
from capmerge.metadata.blocks import MAX_RECORD_BYTES, read_layout
from capmerge.metadata.format import DROPPED, SIDE_FILES, Format, RecordWriter
from capmerge.metadata.parallel import run_blocks, useful_jobs
from capmerge.tokens.families import TokenizerFamily

if TYPE_CHECKING:
    from capmerge.files.digest_set import DigestSet
    from capmerge.metadata.work import Sink, Stream


@dataclass(frozen=True, slots=True)
class FilterOptions:
    """The options of one run of `capmerge filter`; None for a test that is not asked for."""

    target: Path
    latents: Path | None = None
    require: tuple[str, ...] = ()
    min_tokens: int | None = None
    max_tokens: int | None = None
    family: TokenizerFamily = "sd1"
    keys: Path | None = None
    exclude: Path | None = None
    jobs: int = 1
    force: bool = False
    max_record_bytes: int = MAX_RECORD_BYTES
    start_method: str | None = None


class Outcome(NamedTuple):
    """The result of a finished run."""

    records: int
    kept: int
    reasons: dict[str, int]
    """How many records were dropped for each reason; a record may have several."""
    latents: int | None
    """The number of latents files, if they were listed."""
    dropped: Path | None
    """The list of what was dropped; None if nothing was."""
    written_bytes: int


def filter_records(
    source: Source,
    options: FilterOptions,
    *,
    progress: Callable[[int], None] | None = None,
    listing: Callable[[int], None] | None = None,
) -> Outcome:
    """Write the records of `source` that `options` want, and list the others with the reasons.

    `progress` is told the offset that is done, and `listing` the number of latents files seen.
    Raises `UsageError`, `DataError`, `OutputError` or `WorkerError`; then no file was written or
    replaced.
    """
    # Checks
    least, most = options.min_tokens, options.max_tokens
    if least is not None and most is not None and least > most:
        raise UsageError(
            f"--min-tokens {least} is more than --max-tokens {most}, so no record could be kept."
        )
    asked = (options.latents, options.require, least, most, options.keys, options.exclude)
    if all(one is None or one == () for one in asked):
        raise UsageError(
            "nothing says which records to keep. Give --latents, --require, --min-tokens, "
            "--max-tokens, --keys or --exclude."
        )
    check_is_file(options.target)
    target = check_target(
        options.target, source, force=options.force, side_suffixes=(*SIDE_FILES, DROPPED)
    )
    layout = read_layout(source, options.max_record_bytes, may_be_empty=True)
    wanted = _wanted(options, listing)

    # Run
    with OutputFiles(target, (*SIDE_FILES, DROPPED)) as files:
        output = files.open()
        out = Format.choose(None, target)
        records = RecordWriter(output, out)
        dropped = _Dropped(partial(files.side, DROPPED))
        sinks: dict[Stream, Sink] = {"records": records, "dropped": dropped}
        total: Counter[str] = Counter()
        run_blocks(
            source,
            layout,
            partial(Filter, source.name, layout, wanted, out),
            sinks,
            collect=total.update,
            jobs=useful_jobs(source, options.jobs),
            progress=progress,
            start_method=options.start_method,
        )
        records.finish()
        source.check_unchanged()
        files.publish()
    count, kept = total.pop("records", 0), total.pop("kept", 0)
    return Outcome(
        count,
        kept,
        dict(total.most_common()),
        wanted.latents.files if wanted.latents else None,
        side_path(options.target, DROPPED) if dropped.file else None,
        output.written_bytes,
    )


def _wanted(options: FilterOptions, listing: Callable[[int], None] | None) -> Wanted:
    """What a record must be like, with the lists of keys and of latents files read."""
    latents = None
    if options.latents:
        from capmerge.index.latent_stems import LatentStems

        latents = LatentStems(options.latents, listing)
        if not latents.files:
            raise UsageError(
                f"--latents {printable(str(options.latents))}: found no latents (.npz) there, so "
                "no record could be kept. Name the folder of the cached latents."
            )
    return Wanted(
        latents,
        options.require,
        options.min_tokens,
        options.max_tokens,
        options.family,
        _listed(options.keys),
        _listed(options.exclude),
    )


def _listed(file: Path | None) -> "DigestSet | None":
    """The keys that a file lists."""
    if file is None:
        return None
    from capmerge.files.digest_set import DigestSet

    return DigestSet(iter_listed_keys(file))


class _Dropped:
    """The sink of the lines on records that are dropped: a file that the first of them opens."""

    def __init__(self, open_file: Callable[[], AtomicFile]) -> None:
        self._open_file = open_file
        self.file: AtomicFile | None = None

    def write(self, data: Buffer, *, new_block: bool) -> None:  # noqa: ARG002  # a sink
        """Append lines of JSON."""
        self.file = self.file or self._open_file()
        self.file.write(data)
