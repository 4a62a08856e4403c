"""The command `capmerge check-latents`: from its options to the findings and their counts."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from capmerge.cli.options import JobsOption, MaxRecordOption, QuietOption, SourceFileArgument
from capmerge.commands.targets import check_target
from capmerge.cores import usable_cores
from capmerge.errors import CapmergeError, printable
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.terminal import count_bar, errors_as_exit_codes, progress_bar

if TYPE_CHECKING:
    from capmerge.commands.check_latents import CheckOptions, CheckSummary, Finding

_MOST_PRINTED = 20
"""The findings that are printed where a report has all of them."""


def check_latents_command(
    src: SourceFileArgument,
    *,
    latents: Annotated[
        Path,
        typer.Option(
            "--latents",
            metavar="DIR",
            help="The folder of the cached latents, loose or packed.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--out",
            metavar="FILE",
            help="Write every finding to FILE as a line of JSON. An interrupted check with the "
            "same FILE then goes on: files of the same size and time are not read again.",
            show_default=False,
        ),
    ] = None,
    quarantine: Annotated[
        Path | None,
        typer.Option(
            "--quarantine",
            metavar="DIR",
            help="Move files whose contents are at fault to DIR, under the same path as below the "
            "folder of latents. Nothing is replaced and nothing is deleted.",
            show_default=False,
        ),
    ] = None,
    jobs: JobsOption = None,
    quiet: QuietOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a report that exists.")] = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Read every latents file of SRC whole, and name those that a run could not train with.

    SRC is a .json or .jsonl file of metadata, rewritten or not. Checked are the layout of the zip,
    every checksum, names, shapes and types of the arrays, that all numbers are finite, and that the
    latents have the size of their record. Exit with 1 if anything is broken or missing.
    """
    with errors_as_exit_codes():
        from capmerge.commands.check_latents import CheckOptions, check_folders, check_latents
        from capmerge.index.reader import open_indexable

        printed = 0

        def show(finding: "Finding") -> None:
            nonlocal printed
            printed += 1
            if out is None or printed <= _MOST_PRINTED:
                print(_text(finding))
            elif printed == _MOST_PRINTED + 1:
                print(f"and more, which are listed in {printable(str(out))}.")

        def show_moved(finding: "Finding") -> None:
            where = printable(str(finding.file))
            if finding.moved_to:
                print(f"moved: {where}: to {printable(finding.moved_to)}")
            else:
                print(f"not moved: {where}: {printable(str(finding.not_moved))}")

        with open_indexable(src) as source:
            report = check_target(out, source, force=force) if out else None
            options = CheckOptions(latents, report, quarantine, jobs or usable_cores(), max_record)
            check_folders(options)
            with (
                progress_bar(source, quiet=quiet) as indexing,
                count_bar(latents, quiet=quiet) as listing,
                count_bar(latents, quiet=quiet) as checking,
            ):
                summary = check_latents(src, options, show, show_moved, indexing, listing, checking)
        if not quiet:
            _print(summary, options)
            if out:
                print(f"report: {printable(str(out))}")
        if summary.found:
            raise CapmergeError(_verdict(summary, options))


def _text(finding: "Finding") -> str:
    where = f"record {printable(finding.key)}" if finding.file is None else printable(finding.file)
    return f"{finding.fault}: {where}: {printable(finding.problem)}."


def _print(summary: "CheckSummary", options: "CheckOptions") -> None:
    rows = [
        ("records", f"{summary.records:,}"),
        ("records without a file", f"{summary.faults['missing']:,}"),
        ("files", f"{summary.files:,}"),
        *([("files known before", f"{summary.known:,}")] if summary.known else []),
        ("files broken", f"{summary.faults['broken']:,}"),
        ("files of another size", f"{summary.faults['other size']:,}"),
        ("files unreadable", f"{summary.faults['unreadable']:,}"),
        *([("files moved", f"{summary.moved:,}")] if options.quarantine else []),
        ("seconds", f"{summary.seconds:.2f}"),
        ("files per second", f"{summary.files / max(1e-9, summary.seconds):,.0f}"),
    ]
    print("\n".join(f"{name:<24} {value:>10}" for name, value in rows))


def _verdict(summary: "CheckSummary", options: "CheckOptions") -> str:
    """What is wrong in all, and what to do about it."""
    counts = summary.faults
    told = [f"{counts['missing']:,} records have no latents file"] * bool(counts["missing"])
    faulty = summary.found - counts["missing"]
    told += [f"{faulty:,} latents files cannot be trained"] * bool(faulty)
    if summary.moved:
        told.append(f"{summary.moved:,} of them were moved")
    if summary.not_moved:
        told.append(f"{summary.not_moved:,} could not be moved")
    return (
        f"{printable(str(options.latents))}: {', '.join(told)}. Cache those latents again, or "
        "leave their records out: capmerge filter SRC --latents DIR drops records without a file."
    )
