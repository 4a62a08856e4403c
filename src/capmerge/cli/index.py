"""The command `capmerge index`: from its options to the index, its listings and their table."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from capmerge.cli.options import JobsOption, MaxRecordOption, QuietOption
from capmerge.cores import usable_cores
from capmerge.errors import CapmergeError, UsageError, printable
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.terminal import count_bar, errors_as_exit_codes, progress_bar

if TYPE_CHECKING:
    from capmerge.index.latent_listing import Listing
    from capmerge.index.reader import Index


def index_command(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False)],
    *,
    latents: Annotated[
        list[Path] | None,
        typer.Option(
            "--latents",
            metavar="DIR",
            help="List this folder of cached latents too. Repeat the option for more folders.",
            show_default=False,
        ),
    ] = None,
    relist: Annotated[
        bool,
        typer.Option(
            "--relist", help="List the folders of --latents again, even if a listing exists."
        ),
    ] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Read every file of the latents whole, and name the broken ones. Exit with 1 if "
            "there are any.",
        ),
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            metavar="PATH",
            help="Write the index to PATH, and listings beside it, in place of FILE.index. "
            "Training takes it with data.index = PATH.",
            show_default=False,
        ),
    ] = None,
    allow_outside: Annotated[
        bool,
        typer.Option(
            "--allow-outside",
            help="Also list the folders outside of DIR that keys lead to. Training needs it for "
            "allow_outside = true.",
        ),
    ] = False,
    no_tokens: Annotated[
        bool,
        typer.Option(
            "--no-tokens",
            help="Do not count tokens. This is twice as fast, but text.dynamic_chunks cannot be "
            "used in training.",
        ),
    ] = False,
    jobs: JobsOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Build the index again, even if one that fits exists.")
    ] = False,
    quiet: QuietOption = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Write FILE.index, so that the trainer need not parse FILE.

    The index tells the trainer where each record is in FILE, a .json or .jsonl file that `rewrite`
    wrote, or a folder of .jsonl files, which count as one. An index that fits FILE is kept as it
    is. With --latents, a listing beside the index says which latents each record has.
    """
    with errors_as_exit_codes():
        # Checks
        folders = latents or []
        if not folders and (relist or allow_outside or check):
            raise UsageError(
                "--relist, --allow-outside and --check say what is done with folders of latents. "
                "Give --latents DIR with them."
            )
        if missing := [folder for folder in folders if not folder.is_dir()]:
            raise UsageError(
                f"--latents {printable(str(missing[0]))}: there is no such folder. "
                "Name the folder of the cached latents."
            )

        # Index
        from capmerge.index.build import build_index, ensure_index
        from capmerge.index.latent_build import ensure_listing
        from capmerge.index.reader import open_indexable

        started, notes = time.perf_counter(), list[str]()
        with open_indexable(file) as source, progress_bar(source, quiet=quiet) as progress:
            if force:
                found = build_index(
                    file,
                    at=out,
                    jobs=jobs or usable_cores(),
                    progress=progress,
                    tokens=not no_tokens,
                    max_record_bytes=max_record,
                )
            else:
                tokens = None if no_tokens else True
                found = ensure_index(
                    file,
                    at=out,
                    jobs=jobs or usable_cores(),
                    progress=progress,
                    tokens=tokens,
                    max_record_bytes=max_record,
                    tell=notes.append,
                )
        if not quiet:
            _print_index(found, time.perf_counter() - started, notes)

        # Listings
        broken = 0
        for folder in folders:
            notes.clear()
            with count_bar(folder, quiet=quiet) as seen:
                listing = ensure_listing(
                    found,
                    folder,
                    relist=relist,
                    allow_outside=allow_outside,
                    jobs=jobs or usable_cores(),
                    progress=seen,
                    tell=notes.append,
                )
            if not quiet:
                _print_listing(listing, notes)
            if check:
                broken += _check(found, listing, jobs or usable_cores(), quiet=quiet)
        if broken:
            raise CapmergeError(
                f"{broken:,} latents files are broken. Cache them again, or train with "
                'data.on_missing = "skip", which leaves up to 1 % of the records out.'
            )


def _print_index(index: "Index", seconds: float, notes: list[str]) -> None:
    size = index.path.stat().st_size
    rows = [
        ("records", f"{len(index):,}"),
        *([("repeated keys", f"{index.repeated:,}")] if index.repeated else []),
        *(
            [("without train_resolution", f"{index.without_resolution:,}")]
            if index.without_resolution
            else []
        ),
        ("token lengths", "yes" if index.has_tokens else "no"),
        ("bytes", f"{size:,}"),
        ("seconds", f"{seconds:.2f}"),
    ]
    print("\n".join(f"{name:<24} {value:>10}" for name, value in rows))
    for note in notes:
        print(f"note: {note}")
    if index.repeated:
        print(
            "note: only the last record of a repeated key is trained, because json.load keeps "
            "that one."
        )
    if index.without_resolution:
        print(
            "note: the buckets of records without a usable train_resolution are those of their "
            "latents. List the folder of the latents to see them (--latents DIR)."
        )
    print(f"index: {printable(str(index.path))}")


def _check(index: "Index", listing: "Listing", jobs: int, *, quiet: bool) -> int:
    """Print each broken file of a listing and a summary, and return how many are broken."""
    from capmerge.index.latent_check import iter_checked

    started, files, broken = time.perf_counter(), 0, 0

    def count(done: int) -> None:
        nonlocal files
        files = done
        if seen:
            seen(done)

    with count_bar(listing.folder, quiet=quiet) as seen:
        for place, _, _, answer in iter_checked(index, listing, jobs, count):
            if answer.problem:
                broken += 1
                print(f"broken: {printable(str(place))}: {printable(answer.problem)}.")
    if not quiet:
        rate = files / (time.perf_counter() - started)
        print(f"checked: {files:,} files, {broken:,} of them broken, {rate:,.0f} files per second")
    return broken


def _print_listing(listing: "Listing", notes: list[str]) -> None:
    for note in notes:
        print(f"note: {note}")
    print(
        f"latents: {listing.found:,} of {listing.records:,} records have a file in "
        f"{printable(str(listing.folder))}"
    )
    if listing.differing:
        print(
            f"note: the latents of {listing.differing:,} records have another size than their "
            "train_resolution. The size of the latents is their bucket."
        )
    if listing.broken:
        print(
            f"note: no latents were found in {listing.broken:,} of the opened files. "
            "--check names them."
        )
    if listing.unlisted:
        print(
            f"note: the keys of {listing.unlisted:,} records without a file lead out of that "
            "folder. --allow-outside lists the folders that they lead to."
        )
