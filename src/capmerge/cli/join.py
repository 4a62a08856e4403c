"""The command `capmerge join`: from its options to the counts of the run."""

from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from capmerge.cli.options import (
    ForceOption,
    JobsOption,
    MaxRecordOption,
    OutFileOption,
    QuietOption,
)
from capmerge.commands.join import JoinOptions, Outcome, join
from capmerge.commands.join_fields import OnConflict
from capmerge.cores import usable_cores
from capmerge.errors import UsageError, printable
from capmerge.files.open_files import allow_open_files
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.metadata.opened import open_metadata
from capmerge.terminal import errors_as_exit_codes, progress_bar

if TYPE_CHECKING:
    from capmerge.files.source import Source


def join_command(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", show_default=False)],
    *,
    out: OutFileOption,
    key_prefix: Annotated[
        list[str] | None,
        typer.Option(
            "--key-prefix",
            metavar="TEXT=FILE",
            help="Put TEXT before every key of FILE, such as danbooru/=A.json. Repeat the option "
            "for more files.",
            show_default=False,
        ),
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option(
            "--fields",
            metavar="NAME=FILE",
            help="Join records field by field, and take the field NAME from FILE alone. Fields "
            "that are not named come from every file. Repeat the option for more fields.",
            show_default=False,
        ),
    ] = None,
    on_conflict: Annotated[
        OnConflict,
        typer.Option(
            "--on-conflict",
            help="What to do with records that have one key but differ, or with --fields, with "
            "fields that differ. error: end the run. first: keep the first. last: keep the last. "
            "Default: error.",
            show_default=False,
        ),
    ] = "error",
    missing: Annotated[
        Path | None,
        typer.Option(
            "--missing",
            metavar="FILE",
            help="Write one line of JSON for each record that lacks a field of --fields.",
            show_default=False,
        ),
    ] = None,
    jobs: JobsOption = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Join metadata files: all their records, or with --fields the fields of equal keys.

    Records come in the order of the first file; then come those that only the second has, and so
    on. Files are .json, .jsonl or .parquet, or .gz or .zst files of the first two, in any mixture
    and order; - is standard input. A record that several files hold unchanged is written once.
    """
    with errors_as_exit_codes():
        options = JoinOptions(
            out,
            {number: text for text, number in _of_files("--key-prefix", key_prefix, files)},
            dict(_of_files("--fields", fields, files)),
            on_conflict,
            missing,
            jobs or usable_cores(),
            force=force,
            max_record_bytes=max_record,
        )
        allow_open_files(8 * len(files))  # each file, where its records are, and their keys
        with ExitStack() as stack:
            sources: list[Source] = []
            for file in files:
                sources.append(open_metadata(file))
                stack.enter_context(sources[-1])
            outcome = join(sources, options, progress=partial(progress_bar, quiet=quiet))
        if not quiet:
            _print_outcome(outcome, out)


def _of_files(
    option: str, values: Sequence[str] | None, files: Sequence[str]
) -> list[tuple[str, int]]:
    """The text of each value `TEXT=FILE` of an option, and the number of FILE among `files`."""
    found = list[tuple[str, int]]()
    for value in values or ():
        # Both may hold an equals sign.
        places = [place for place, letter in enumerate(value) if letter == "="]
        pairs = [(value[:place], value[place + 1 :]) for place in places]
        known = [(text, files.index(file)) for text, file in pairs if text and file in files]
        if not known:
            raise UsageError(
                f"{option} {printable(value)}: expected TEXT=FILE, where FILE is one of the files "
                f"to join: {', '.join(map(printable, files))}."
            )
        part = {"--key-prefix": 1, "--fields": 0}[option]
        if any(pair[part] == known[0][part] for pair in found):
            again = known[0][0] if part == 0 else files[known[0][1]]
            raise UsageError(
                f"{option} {printable(value)}: {printable(again)} is given twice. Give it once."
            )
        found.append(known[0])
    return found


def _print_outcome(outcome: Outcome, out: Path) -> None:
    rows = [(printable(Path(name).name), count) for name, count in outcome.records]
    rows += [("written", outcome.written), ("equal, written once", outcome.equal)]
    if outcome.conflicts:
        rows.append(("given way to others", outcome.conflicts))
    for name, count in outcome.missing.items():
        rows.append((f"without {printable(name)}", count))
    width = max(len(name) for name, _ in rows)
    print("\n".join(f"{name:<{width}} {count:>16,}" for name, count in rows))
    for name, count in outcome.without_record.items():
        if count:
            print(
                f"note: {count:,} of the records without {printable(name)} have no record at all "
                "in the file that gives it."
            )
    if outcome.doubled:
        print(
            f"note: {outcome.doubled:,} records have a field more than once. The last one is kept, "
            "as json.load does."
        )
    print(f"written: {printable(str(out))}")
