"""The command `capmerge split`: from its options to the table of the parts."""

from pathlib import Path
from typing import Annotated

import typer

from capmerge.cli.options import JobsOption, MaxRecordOption, QuietOption, SourceArgument
from capmerge.commands.split import MOST_PARTS, By, Part, SplitOptions, split
from capmerge.commands.split_parts import PartFormat
from capmerge.cores import usable_cores
from capmerge.errors import printable
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.metadata.opened import open_metadata
from capmerge.terminal import errors_as_exit_codes, progress_bar

_SHOWN_PARTS = 20


def split_command(
    src: SourceArgument,
    *,
    parts: Annotated[
        int,
        typer.Option(
            "-n",
            "--parts",
            metavar="N",
            min=1,
            max=MOST_PARTS,
            help="The number of parts.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            metavar="DIR",
            help="The folder to write, which must be new or empty. It appears whole or not at all.",
            show_default=False,
        ),
    ],
    by: Annotated[
        By,
        typer.Option(
            "--by",
            help="How records are divided. count: as many records in each part, in the order of "
            "SRC. bytes: parts of about equal size, in the order of SRC. hash: by the hash of the "
            "key, so that a key is in the same part of every file. Default: count.",
            show_default=False,
        ),
    ] = "count",
    format_name: Annotated[
        PartFormat | None,
        typer.Option(
            "--format",
            help="The format of the parts. Default: jsonl if SRC has JSON lines, else json.",
            show_default=False,
        ),
    ] = None,
    jobs: JobsOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace DIR if it holds an earlier split.")
    ] = False,
    quiet: QuietOption = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Split a metadata file into N files that hold its records unchanged.

    DIR gets part-00000.json, part-00001.json and so on. `capmerge join` puts them together again.
    SRC is a .json, .jsonl or .parquet file, a .gz or .zst file of the first two, or - for standard
    input.
    """
    with errors_as_exit_codes():
        options = SplitOptions(
            out,
            parts,
            by,
            format_name,
            jobs or usable_cores(),
            force=force,
            max_record_bytes=max_record,
        )
        with open_metadata(src) as source, progress_bar(source, quiet=quiet) as progress:
            written = split(source, options, progress=progress)
        if not quiet:
            _print_parts(written, out)


def _print_parts(parts: list[Part], folder: Path) -> None:
    print(f"{'part':<18} {'records':>16} {'bytes':>16}")
    for part in parts[:_SHOWN_PARTS]:
        print(f"{part.path.name:<18} {part.records:>16,} {part.bytes:>16,}")
    if len(parts) > _SHOWN_PARTS:
        print(f"... and {len(parts) - _SHOWN_PARTS:,} more parts")
    records, size = sum(part.records for part in parts), sum(part.bytes for part in parts)
    print(f"{'all parts':<18} {records:>16,} {size:>16,}")
    print(f"written: {printable(str(folder))}")
