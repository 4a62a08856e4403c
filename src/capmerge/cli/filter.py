"""The command `capmerge filter`: from its options to the counts of the run."""

from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from capmerge.cli.options import (
    FamilyOption,
    ForceOption,
    JobsOption,
    MaxRecordOption,
    OutFileOption,
    QuietOption,
    SourceArgument,
)
from capmerge.commands.filter import FilterOptions, Outcome, filter_records
from capmerge.cores import usable_cores
from capmerge.errors import UsageError, printable
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.metadata.opened import open_metadata
from capmerge.terminal import count_bar, errors_as_exit_codes, progress_bar


def filter_command(
    src: SourceArgument,
    *,
    out: OutFileOption,
    latents: Annotated[
        Path | None,
        typer.Option(
            "--latents",
            metavar="DIR",
            help="Keep records that have a latents file in DIR, which is listed once.",
            show_default=False,
        ),
    ] = None,
    require: Annotated[
        list[str] | None,
        typer.Option(
            "--require",
            metavar="FIELD",
            help="Keep records that have FIELD, not empty. Repeat the option for more fields.",
            show_default=False,
        ),
    ] = None,
    min_tokens: Annotated[
        int | None,
        typer.Option(
            "--min-tokens",
            metavar="N",
            min=0,
            help="Keep records of which every alternative has at least N tokens, as `stats` "
            "counts them.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            min=0,
            help="Keep records of which every alternative has at most N tokens.",
            show_default=False,
        ),
    ] = None,
    family: FamilyOption = None,
    keys: Annotated[
        Path | None,
        typer.Option(
            "--keys",
            metavar="FILE",
            help="Keep records whose key is in FILE: text with one key per line, a .jsonl file "
            "with a key or image_path in each line, or a .json metadata file.",
            show_default=False,
        ),
    ] = None,
    exclude: Annotated[
        Path | None,
        typer.Option(
            "--exclude",
            metavar="FILE",
            help="Drop records whose key is in FILE, which is of the same kind.",
            show_default=False,
        ),
    ] = None,
    jobs: JobsOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Keep the records that pass every test, and list the others with the reasons.

    The records that are kept are not changed. The others are listed in OUT.dropped.jsonl, one line
    of JSON each, with the key and all reasons. SRC is metadata, rewritten or not: a .json, .jsonl
    or .parquet file, a .gz or .zst file of the first two, or - for standard input.
    """
    with errors_as_exit_codes():
        if family and min_tokens is None and max_tokens is None:
            raise UsageError(
                f"--family {family} says whose tokens are counted, but nothing counts them. "
                "Give --min-tokens or --max-tokens, or leave --family out."
            )
        options = FilterOptions(
            out,
            latents,
            tuple(dict.fromkeys(require or ())),
            min_tokens,
            max_tokens,
            family or "sd1",
            keys,
            exclude,
            jobs or usable_cores(),
            force=force,
            max_record_bytes=max_record,
        )
        with open_metadata(src) as source, ExitStack() as bars:
            listing = bars.enter_context(count_bar(latents, quiet=quiet)) if latents else None
            progress = bars.enter_context(progress_bar(source, quiet=quiet))
            outcome = filter_records(source, options, progress=progress, listing=listing)
        if not quiet:
            _print_outcome(outcome, out)


def _print_outcome(outcome: Outcome, out: Path) -> None:
    rows = [
        ("records", outcome.records),
        ("kept", outcome.kept),
        ("dropped", outcome.records - outcome.kept),
        *((f"  {printable(reason)}", count) for reason, count in outcome.reasons.items()),
    ]
    if outcome.latents is not None:
        rows.append(("latents files", outcome.latents))
    width = max(18, *(len(name) for name, _ in rows))
    print("\n".join(f"{name:<{width}} {count:>16,}" for name, count in rows))
    print(f"written: {printable(str(out))}")
    if outcome.dropped:
        print(f"written: {printable(str(outcome.dropped))}")
