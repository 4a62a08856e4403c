"""The command `capmerge rewrite`: from its options to the run and the table at its end."""

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from capmerge.cli.merge_options import MergeChoice, with_merge_options
from capmerge.cli.options import (
    ForceOption,
    JobsOption,
    MaxRecordOption,
    PlotOption,
    QuietOption,
    ReportOption,
    SourceArgument,
    TokenizerOption,
)
from capmerge.cli.shards import (
    EngineOption,
    ExecutorOption,
    OnlyTaskOption,
    SbatchOption,
    ShardChoice,
    TasksOption,
    refuse_for_shards,
    rewrite_shards,
)
from capmerge.commands.latent_files import count_names, with_image_size
from capmerge.commands.rewrite import RewriteOptions, rewrite
from capmerge.commands.rewrite_summary import Summary
from capmerge.cores import usable_cores
from capmerge.errors import UsageError, printable
from capmerge.files.backup import backup_path
from capmerge.files.compression import without_compression
from capmerge.files.source import Source
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.metadata.format import DATASET, Format, FormatName
from capmerge.metadata.opened import open_metadata
from capmerge.shards.places import is_place
from capmerge.terminal import count_bar, errors_as_exit_codes, progress_bar, warn

if TYPE_CHECKING:
    from capmerge.stats.collector import Tokenizers


@with_merge_options()
def rewrite_command(
    src: SourceArgument,
    *,
    out: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out",
            metavar="OUT",
            help="The file to write; - is standard output. Default: <stem>_wildcard.json beside "
            "SRC.",
            show_default=False,
        ),
    ] = None,
    in_place: Annotated[
        bool,
        typer.Option(
            "--in-place",
            help="Write over SRC itself, which is kept as SRC.bak. An existing SRC.bak is never "
            "replaced.",
        ),
    ] = False,
    format_name: Annotated[
        FormatName | None,
        typer.Option(
            "--format",
            help="The format to write. Default: by the ending of OUT, else json.",
            show_default=False,
        ),
    ] = None,
    merge: MergeChoice,
    jobs: JobsOption = None,
    dry_run: Annotated[
        int | None,
        typer.Option(
            "--dry-run",
            metavar="N",
            min=1,
            help="Show the first N records before and after, as `preview` does. Write nothing.",
            show_default=False,
        ),
    ] = None,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats",
            help="Count tokens in the same pass, as `stats` does: print a table, and write "
            "<stem>.stats.json beside OUT.",
        ),
    ] = False,
    tokenizer: TokenizerOption = None,
    plot: PlotOption = None,
    report: ReportOption = None,
    latents: Annotated[
        Path | None,
        typer.Option(
            "--latents",
            metavar="DIR",
            help="The folder of the cached latents. Their names decide whether image_size is added "
            "and which buckets OUT.dataset.toml asks for. Default: the sizes in the records "
            "decide.",
            show_default=False,
        ),
    ] = None,
    index: Annotated[
        bool,
        typer.Option(
            "--index",
            help="Write OUT.index in the same pass: the index that the trainer reads.",
        ),
    ] = False,
    engine: EngineOption = None,
    tasks: TasksOption = None,
    only_task: OnlyTaskOption = None,
    executor: ExecutorOption = None,
    sbatch: SbatchOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Merge the caption and tags of every record into caption lines.

    sd-scripts draws one of the lines each time that it trains the record. SRC is a .json or .jsonl
    metadata file, a .gz or .zst file of either, a .parquet file, or - for standard input. It is
    never changed, and OUT appears whole or not at all. With --in-place OUT is SRC, and what SRC was
    becomes SRC.bak.

    SRC may also be a folder of such files, or a URL such as s3://bucket/folder. They are shards:
    each is rewritten to the same name in the folder or URL OUT, several at a time. A second run
    does only what is missing.
    """
    with errors_as_exit_codes():
        # Shards
        if tokenizer and not stats and dry_run is None:
            raise UsageError(
                "--tokenizer belongs to --stats and --dry-run. Give one of them, or leave "
                "--tokenizer out."
            )
        tokenizers = None
        if stats or dry_run is not None:
            from capmerge.stats.collector import Tokenizers

            tokenizers = Tokenizers(merge.family or "sd1", tokenizer)
        counted = tokenizers if stats else None
        chosen = ShardChoice(engine, tasks, only_task, executor, sbatch)
        if is_place(src):
            of_files: dict[str, object] = {"--in-place": in_place, "--format": format_name}
            of_files |= {"--dry-run": dry_run, "--index": index}
            refuse_for_shards(src, of_files | {"--plot": plot, "--report": report})
            rewrite_shards(
                chosen.options(src, out, merge, counted, latents, max_record, jobs, force=force),
                quiet=quiet,
            )
            return
        chosen.refuse_for_file(src)

        # Options
        target = _target(src, out, format_name, in_place=in_place)
        options = RewriteOptions(
            target,
            Format.choose(format_name, target),
            merge.options(
                counts_tokens=stats or dry_run is not None, counters=("--stats", "--dry-run N")
            ),
            merge.on_error or "stop",
            jobs or usable_cores(),
            force=force,
            in_place=in_place,
            stats=counted,
            index=index,
            latents=latents,
            max_record_bytes=max_record,
        )

        # Checks
        if not stats and (plot or report):
            raise UsageError("--plot and --report belong to --stats. Give --stats too.")
        with open_metadata(src) as source:
            files = None
            if stats:
                from capmerge.commands.stats_outputs import StatsFiles, default_document

                document = default_document(target) if target else None
                files = StatsFiles(document, plot, report).checked(source, force=force)

            # Run
            if dry_run is not None and tokenizers:
                _show_first_records(source, options, dry_run, tokenizers, quiet=quiet)
                return
            started = time.perf_counter()
            with ExitStack() as bars:
                listing = bars.enter_context(count_bar(latents, quiet=quiet)) if latents else None
                progress = bars.enter_context(progress_bar(source, quiet=quiet))
                outcome = rewrite(
                    source,
                    options,
                    warn=None if quiet else warn,
                    progress=progress,
                    listing=listing,
                )
            written: list[Path] = []
            if files and outcome.statistics:
                from capmerge.cli.stats import command_line

                written = files.save(outcome.statistics, command_line())
            seconds = time.perf_counter() - started

        # Report
        if not quiet:
            screen = sys.stdout if target else sys.stderr
            config = target.name + DATASET if target else None
            summary = Summary(
                outcome.tally,
                outcome.read_bytes,
                outcome.written_bytes,
                seconds,
                outcome.latents,
                outcome.repeated,
                options.merge,
                config,
            )
            print(summary.text(), file=screen)
            if in_place and target:
                print(f"kept: {printable(str(backup_path(target.resolve())))}", file=screen)
            if outcome.statistics:
                from capmerge.cli.stats import print_statistics

                print_statistics(outcome.statistics, written, to=screen)


def _target(
    src: str, out: str | None, format_name: FormatName | None, *, in_place: bool
) -> Path | None:
    """The file that -o names, or a default beside `src`; None for standard output."""
    if in_place and out is not None:
        raise UsageError(
            f"--in-place writes over {printable(src)}, and -o names another file. Give one of them."
        )
    if in_place and src == "-":
        raise UsageError("--in-place needs a file, and standard input is none. Give -o OUT.")
    if in_place:
        return Path(src)
    if out is not None:
        return None if out == "-" else Path(out)
    if src == "-":
        raise UsageError(
            "standard input has no name from which the name of the output could be made. "
            "Give -o OUT, or -o - for standard output."
        )
    path = Path(src)
    return path.with_name(f"{without_compression(path).stem}_wildcard.{format_name or 'json'}")


def _show_first_records(
    source: Source, options: RewriteOptions, count: int, tokenizers: "Tokenizers", *, quiet: bool
) -> None:
    """Print the first `count` records as `capmerge preview` does, and warn of what stops a run."""
    from capmerge.cli.preview_text import print_previews
    from capmerge.commands.preview_options import PreviewOptions

    names = count_names(options.latents) if options.latents else None
    shown = PreviewOptions(
        with_image_size(options.merge, names),
        count=count,
        family=tokenizers.family,
        tokenizer=tokenizers.path,
        out=options.format,
        max_record_bytes=options.max_record_bytes,
    )
    printed = print_previews(source, shown, quiet=quiet)
    if quiet:
        return
    if printed.rewritten and not options.merge.allow_rewritten:
        warn(
            f"a rewrite stops at a record that is already rewritten ({printed.rewritten} above). "
            "Give the original file, or --allow-rewritten to pass such records through unchanged."
        )
    if printed.unmergeable and options.on_error == "stop":
        warn(
            f"a rewrite stops at a record that cannot be merged ({printed.unmergeable} above). "
            "Mend the record, or use --on-error skip to leave such records out and list them."
        )
