"""The command `capmerge rewrite`: options to the story of a rewrite, and the end table."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from capmerge.captions.templates import MergeOptions
from capmerge.cli.options import (
    AllowRewrittenOption,
    CaptionLinesOption,
    CaptionWildcardsOption,
    FamilyOption,
    FitOption,
    ImageSizeOption,
    JobsOption,
    LayoutOption,
    LineOption,
    MaxRecordOption,
    OnErrorOption,
    PlotOption,
    PrefixOption,
    QuietOption,
    ReportOption,
    SourceArgument,
    SuffixOption,
    TokenizerOption,
    UnderscoresOption,
    WeightsOption,
    _asked,
    _asked_fit,
)
from capmerge.cli.stats import _print_statistics
from capmerge.commands.rewrite import RewriteOptions, first_records, rewrite
from capmerge.commands.rewrite_summary import Summary
from capmerge.commands.stats_outputs import StatsFiles, default_document
from capmerge.cores import usable_cores
from capmerge.errors import UsageError, printable
from capmerge.files.atomic import side_path, write_whole
from capmerge.files.source import Source, open_source
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.metadata.format import DATASET, SIDE_FILES, Format, FormatName
from capmerge.stats.collector import Tokenizers
from capmerge.terminal import errors_as_exit_codes, progress_bar, warn


def rewrite_command(  # one parameter an option
    src: SourceArgument,
    out: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--out",
            metavar="OUT",
            help="Default: <stem>_wildcard.json beside SRC. - is standard output.",
            show_default=False,
        ),
    ] = None,
    format_name: Annotated[
        FormatName | None,
        typer.Option(
            "--format",
            help="What to write. Default: by OUT's ending, else json.",
            show_default=False,
        ),
    ] = None,
    layout: LayoutOption = None,
    line: LineOption = None,
    weights: WeightsOption = None,
    caption_lines: CaptionLinesOption = None,
    underscores: UnderscoresOption = None,
    caption_wildcards: CaptionWildcardsOption = None,
    prefix: PrefixOption = None,
    suffix: SuffixOption = None,
    image_size: ImageSizeOption = None,
    on_error: OnErrorOption = None,
    allow_rewritten: AllowRewrittenOption = None,
    fit: FitOption = None,
    jobs: JobsOption = None,
    dry_run: Annotated[
        int | None,
        typer.Option(
            "--dry-run",
            metavar="N",
            min=1,
            help="Print the first N records before and after; write nothing.",
            show_default=False,
        ),
    ] = None,
    summary: Annotated[
        Path | None,
        typer.Option(
            "--summary", metavar="FILE", help="Write the end table as JSON.", show_default=False
        ),
    ] = None,
    stats: Annotated[
        bool,
        typer.Option(
            "--stats",
            help="Count tokens in the same pass: a table, and <stem>.stats.json beside OUT.",
        ),
    ] = False,
    family: FamilyOption = None,
    tokenizer: TokenizerOption = None,
    plot: PlotOption = None,
    report: ReportOption = None,
    quiet: QuietOption = False,
    index: Annotated[
        bool,
        typer.Option(
            "--index", help="Write the index that a trainer reads in the same pass: OUT.index."
        ),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Merge caption and tags of every record into caption lines that sd-scripts draws from.

    SRC is a .json or .jsonl metadata file, .gz of either, or - for standard input.
    """
    with errors_as_exit_codes():
        asked = _asked(
            layout,
            line,
            weights,
            caption_lines,
            underscores,
            caption_wildcards,
            prefix,
            suffix,
            image_size,
            allow_rewritten,
        )
        asked |= _asked_fit(fit, None if stats and not fit else family)
        target = (
            None if out == "-" else _default_target(src, format_name) if out is None else Path(out)
        )
        options = RewriteOptions(
            target,
            Format.choose(format_name, target),
            MergeOptions(**asked),
            on_error or "stop",
            jobs or usable_cores(),
            force=force,
            stats=Tokenizers(family or "sd1", tokenizer) if stats else None,
            index=index,
            max_record_bytes=max_record,
        )
        if not stats and (plot or report or tokenizer):
            raise UsageError(
                "--plot, --report and --tokenizer show and choose what --stats counts. Give --stats too."
            )
        with open_source(src) as source:
            files = StatsFiles(
                default_document(target) if target and stats else None, plot, report
            ).checked(source, force=force)
            if summary:
                _check_summary(summary, source, target)
            if dry_run is not None:
                _print_records(source, options, dry_run)
                return
            started = time.perf_counter()
            with progress_bar(source, quiet=quiet) as progress:
                outcome = rewrite(
                    source, options, warn=_silent if quiet else warn, progress=progress
                )
            config = target.name + DATASET if target else None
            written = files.save(outcome.statistics) if outcome.statistics else []
            end = Summary(
                outcome.tally,
                outcome.read_bytes,
                outcome.written_bytes,
                time.perf_counter() - started,
                config,
            )
        if summary:
            write_whole(summary, json.dumps(end.as_dict(), indent=2) + "\n")
        if not quiet:
            screen = sys.stdout if target else sys.stderr
            print(end.text(), file=screen)
            if outcome.statistics:
                _print_statistics(outcome.statistics, written, to=screen)


def _default_target(src: str, format_name: FormatName | None) -> Path:
    if src == "-":
        raise UsageError(
            "standard input has no name to derive the output's from. Give -o OUT, or -o - for standard output."
        )
    path = Path(src)
    unzipped = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return path.with_name(f"{unzipped.stem}_wildcard.{format_name or 'json'}")


def _check_summary(summary: Path, source: Source, target: Path | None) -> None:
    """Raise `UsageError` when `--summary` would replace the source or the output."""
    ours = [target, *(side_path(target, suffix) for suffix in SIDE_FILES)] if target else []
    if source.is_file(summary) or summary.resolve() in [path.resolve() for path in ours]:
        raise UsageError(
            f"--summary {printable(str(summary))}: this is the source, the output or a side file. Choose another file."
        )
    if summary.is_dir() or not summary.resolve().parent.is_dir():
        raise UsageError(
            f"--summary {printable(str(summary))}: found a folder, or no folder to write into, expected a file name."
        )


def _silent(_message: str) -> None:
    """Nothing: --quiet prints only errors."""


def _print_records(source: Source, options: RewriteOptions, count: int) -> None:
    for key, before, after in first_records(source, options, count):
        print(printable(json.dumps(key, ensure_ascii=False)))
        for title, record in (("before", before), ("after", after)):
            text = (
                record
                if isinstance(record, str)
                else json.dumps(record, indent=2, ensure_ascii=False)
            )
            print(f"  {title}:")
            for line in text.split("\n"):
                print(f"    {printable(line)}")
