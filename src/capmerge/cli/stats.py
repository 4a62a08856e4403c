"""The command `capmerge stats`: options to the statistics, and what is printed of them."""

import sys
from pathlib import Path
from typing import Annotated, TextIO

import typer

from capmerge.captions.templates import MergeOptions
from capmerge.cli.options import (
    CaptionLinesOption,
    CaptionWildcardsOption,
    FamilyOption,
    FitOption,
    JobsOption,
    LayoutOption,
    LineOption,
    MaxRecordOption,
    OnErrorOption,
    PlotOption,
    PrefixOption,
    QuietOption,
    ReportOption,
    SuffixOption,
    TokenizerOption,
    UnderscoresOption,
    WeightsOption,
    _asked,
    _asked_fit,
)
from capmerge.commands.stats import MeasureOptions, measure
from capmerge.commands.stats_outputs import StatsFiles, default_document
from capmerge.cores import usable_cores
from capmerge.errors import printable
from capmerge.files.source import open_source
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.stats.collector import Tokenizers
from capmerge.stats.document import Document
from capmerge.stats.tables import text_table
from capmerge.terminal import errors_as_exit_codes, progress_bar, warn


def stats_command(
    src: Annotated[
        str,
        typer.Argument(
            metavar="[SRC]", help="A metadata file, as for rewrite, or what rewrite made of one."
        ),
    ] = "meta_lat.json",
    layout: LayoutOption = None,
    line: LineOption = None,
    weights: WeightsOption = None,
    caption_lines: CaptionLinesOption = None,
    underscores: UnderscoresOption = None,
    caption_wildcards: CaptionWildcardsOption = None,
    prefix: PrefixOption = None,
    suffix: SuffixOption = None,
    on_error: OnErrorOption = None,
    fit: FitOption = None,
    family: FamilyOption = None,
    tokenizer: TokenizerOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="FILE",
            help="The figures as JSON. Default: <stem>.stats.json beside SRC.",
            show_default=False,
        ),
    ] = None,
    plot: PlotOption = None,
    report: ReportOption = None,
    per_record: Annotated[
        Path | None,
        typer.Option(
            "--per-record",
            metavar="FILE",
            help="A line of JSON a record: the tokens of each alternative.",
            show_default=False,
        ),
    ] = None,
    jobs: JobsOption = None,
    quiet: QuietOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Count the tokens that CLIP will see: how long, how many are cut, and what else a file of captions holds.

    SRC is a metadata file as for rewrite, or what rewrite made of one; default: meta_lat.json here.
    A rewritten record is counted as it is, any other as rewrite would write it with the same
    options.
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
            None,
            None,
        )
        asked |= _asked_fit(fit, family if fit else None)
        merge, tokenizers = MergeOptions(**asked), Tokenizers(family or "sd1", tokenizer)
        with open_source(src) as source:
            document = out or (None if src == "-" else default_document(Path(src)))
            files = StatsFiles(document, plot, report, per_record).checked(source, force=force)
            options = MeasureOptions(
                merge,
                tokenizers,
                files.per_record,
                on_error or "stop",
                jobs or usable_cores(),
                max_record,
            )
            with progress_bar(source, quiet=quiet) as progress:
                statistics = measure(source, options, progress=progress)
        if asked and statistics["records"]["rewritten_before"]:
            warn(
                "records that are rewritten already are counted as they are; the merge options change nothing in them."
            )
        written = files.save(statistics)
        if not quiet:
            _print_statistics(
                statistics,
                [*written, *([files.per_record] if files.per_record else [])],
                to=sys.stdout,
            )


def _print_statistics(statistics: Document, written: list[Path], *, to: TextIO) -> None:
    """The table of statistics, and the files they went to."""
    print(f"\n{text_table(statistics)}\n", file=to)
    for path in written:
        print(f"written: {printable(str(path))}", file=to)
