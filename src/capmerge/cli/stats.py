"""The command `capmerge stats`: from its options to the statistics and their table."""

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, TextIO

import typer

from capmerge.cli.merge_options import MergeChoice, with_merge_options
from capmerge.cli.options import (
    JobsOption,
    MaxRecordOption,
    PlotOption,
    QuietOption,
    ReportOption,
    TokenizerOption,
)
from capmerge.commands.stats import MeasureOptions, measure
from capmerge.commands.stats_outputs import StatsFiles, default_document
from capmerge.cores import usable_cores
from capmerge.errors import printable
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.metadata.opened import open_metadata
from capmerge.stats.collector import Tokenizers
from capmerge.stats.document import Document
from capmerge.stats.terminal_table import text_table
from capmerge.terminal import errors_as_exit_codes, progress_bar, warn


@with_merge_options("image_size", "allow_rewritten")
def stats_command(
    src: Annotated[str, typer.Argument(metavar="[SRC]", show_default=False)] = "meta_lat.json",
    *,
    merge: MergeChoice,
    tokenizer: TokenizerOption = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="FILE",
            help="Write the statistics as JSON to FILE. Default: <stem>.stats.json beside SRC.",
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
            help="Write one line of JSON per record with the token count of each alternative.",
            show_default=False,
        ),
    ] = None,
    jobs: JobsOption = None,
    quiet: QuietOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Count the tokens of captions, and those that a max length cuts.

    The statistics also show tags, duplicates and sizes. SRC is a metadata file as for `rewrite`, or
    a file that `rewrite` wrote. Default: meta_lat.json in this folder. Records that are already
    rewritten are counted as they are, all others as `rewrite` would write them with the same
    options.
    """
    with errors_as_exit_codes():
        options = merge.options(counts_tokens=True)
        with open_metadata(src) as source:
            # Checks
            document = out or (None if src == "-" else default_document(Path(src)))
            files = StatsFiles(document, plot, report, per_record).checked(source, force=force)

            # Run
            measuring = MeasureOptions(
                options,
                Tokenizers(merge.family or "sd1", tokenizer),
                files.per_record,
                merge.on_error or "stop",
                jobs or usable_cores(),
                max_record,
            )
            with progress_bar(source, quiet=quiet) as progress:
                statistics = measure(
                    source, measuring, warn=None if quiet else warn, progress=progress
                )

        # Report
        if merge.is_given and statistics["records"]["rewritten_before"]:
            warn(
                "records that are already rewritten are counted as they are; "
                "the merge options change nothing in them."
            )
        written = files.save(statistics, command_line())
        if files.per_record:
            written.append(files.per_record)
        if not quiet:
            print_statistics(statistics, written, to=sys.stdout)


def command_line() -> str:
    """Return the command line of this run, as a shell reads it."""
    return shlex.join(["capmerge", *sys.argv[1:]])


def print_statistics(statistics: Document, written: Sequence[Path | str], *, to: TextIO) -> None:
    """Print the table of statistics and the files that were written."""
    encoding = getattr(to, "encoding", None) or "utf-8"  # `to` is None where the stream is closed
    print(f"\n{text_table(statistics, encoding)}\n", file=to)
    for path in written:
        print(f"written: {printable(str(path))}", file=to)
