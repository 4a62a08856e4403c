"""The command `capmerge convert`: from its options to the run and the table at its end."""

import sys
import time
from pathlib import Path

from capmerge.cli.options import (
    ForceOption,
    FormatOption,
    JobsOption,
    MaxRecordOption,
    OutOption,
    QuietOption,
    SourceArgument,
)
from capmerge.commands.convert import ConvertOptions, choose_format, convert
from capmerge.cores import usable_cores
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.metadata.opened import open_metadata
from capmerge.terminal import errors_as_exit_codes, progress_bar


def convert_command(
    src: SourceArgument,
    *,
    out: OutOption,
    format_name: FormatOption = None,
    jobs: JobsOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Write metadata in another format, without loss.

    SRC and OUT are .json, .jsonl or .parquet files, or .gz or .zst files of the first two. The
    content of SRC tells its format, and the ending of OUT that of OUT. Parquet has a column for
    each field that sd-scripts and capmerge know, and keeps all else as JSON text, so that every
    record comes back as it was.
    """
    with errors_as_exit_codes():
        target = None if out == "-" else Path(out)
        options = ConvertOptions(
            target,
            choose_format(format_name, target),
            jobs or usable_cores(),
            force=force,
            max_record_bytes=max_record,
        )
        with open_metadata(src) as source, progress_bar(source, quiet=quiet) as progress:
            started = time.perf_counter()
            done = convert(source, options, progress=progress)
            seconds = time.perf_counter() - started
        if not quiet:
            rows = [
                ("records", f"{done.records:,}"),
                ("bytes read", f"{done.read_bytes:,}"),
                ("bytes written", f"{done.written_bytes:,}"),
                ("seconds", f"{seconds:.2f}"),
            ]
            lines = [f"{name:<18} {value:>16}" for name, value in rows]
            lines += [f"note: {note}" for note in done.repeated.notes()]
            print("\n".join(lines), file=sys.stdout if target else sys.stderr)
