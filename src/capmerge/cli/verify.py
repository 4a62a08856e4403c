"""The command `capmerge verify`: from its options to the proof and its result as text."""

from pathlib import Path
from typing import Annotated

import typer

from capmerge.cli.merge_options import MergeChoice, with_merge_options
from capmerge.cli.options import JobsOption, MaxRecordOption, QuietOption, SourceArgument
from capmerge.commands.receipt import load_receipt
from capmerge.commands.verify import verify
from capmerge.cores import usable_cores
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.metadata.opened import open_metadata
from capmerge.proof.parquet import read_rows
from capmerge.terminal import errors_as_exit_codes, progress_bar


@with_merge_options()
def verify_command(
    src: SourceArgument,
    out: Annotated[str, typer.Argument(metavar="OUT", show_default=False)],
    *,
    merge: MergeChoice,
    jobs: JobsOption = None,
    quiet: QuietOption = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Prove that OUT is what `rewrite` makes of SRC, record by record.

    SRC and OUT are .json or .jsonl files, .gz or .zst files of either, or .parquet files. The merge
    options are read from OUT.capmerge.json. If you give any of them here, that file is not read:
    give all the options that OUT was made with.
    """
    with errors_as_exit_codes():
        options, skips = merge.options(counts_tokens=False), merge.on_error == "skip"
        if not merge.is_given and not merge.on_error:
            options, skips = load_receipt(Path(out))
        with (
            open_metadata(src, read_rows) as source,
            open_metadata(out, read_rows) as written,
            progress_bar(source, quiet=quiet) as progress,
        ):
            verified = verify(
                source,
                written,
                options,
                skips=skips,
                max_record_bytes=max_record,
                jobs=jobs or usable_cores(),
                progress=progress,
            )
        if not quiet:
            print(verified.text())
