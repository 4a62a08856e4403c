"""The command `capmerge index`: options to the index and its listings, and what they tell to a few lines."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from capmerge.cli.options import JobsOption, MaxRecordOption, QuietOption
from capmerge.cores import usable_cores
from capmerge.errors import UsageError, printable
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.terminal import count_bar, errors_as_exit_codes, progress_bar

if TYPE_CHECKING:
    from capmerge.index.latent_listing import Listing
    from capmerge.index.reader import Index


def index_command(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="What `rewrite` wrote: a .json or .jsonl file.", show_default=False
        ),
    ],
    latents: Annotated[
        list[Path] | None,
        typer.Option(
            "--latents",
            metavar="DIR",
            help="List this folder of cached latents too. Repeatable.",
            show_default=False,
        ),
    ] = None,
    relist: Annotated[
        bool,
        typer.Option(
            "--relist", help="List the folders of --latents anew, though a listing is there."
        ),
    ] = False,
    allow_outside: Annotated[
        bool,
        typer.Option(
            "--allow-outside",
            help="List the folders that keys lead out to as well, as allow_outside = true trains them.",
        ),
    ] = False,
    no_tokens: Annotated[
        bool,
        typer.Option(
            "--no-tokens",
            help="Count no tokens: twice as fast, but no text.dynamic_chunks in training.",
        ),
    ] = False,
    jobs: JobsOption = None,
    force: Annotated[
        bool, typer.Option("--force", help="Build the index anew, though one that fits is there.")
    ] = False,
    quiet: QuietOption = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Write the index by which a trainer reads the records of FILE one by one: FILE.index.

    An index that fits FILE is left as it is. A listing says which latents each record has, and lies
    beside it too.
    """
    with errors_as_exit_codes():
        folders = latents or []
        if not folders and (relist or allow_outside):
            raise UsageError(
                "--relist and --allow-outside say how folders of latents are listed. Give --latents DIR with them."
            )
        if missing := [folder for folder in folders if not folder.is_dir()]:
            raise UsageError(
                f"--latents {printable(str(missing[0]))}: there is no such folder. Name the folder of the cached latents."
            )
        from capmerge.index.build import build_index, ensure_index
        from capmerge.index.latent_listing import ensure_listing
        from capmerge.index.reader import open_indexable

        started = time.perf_counter()
        with open_indexable(file) as source, progress_bar(source, quiet=quiet) as progress:
            if force:
                found = build_index(
                    file,
                    jobs=jobs or usable_cores(),
                    progress=progress,
                    tokens=not no_tokens,
                    max_record_bytes=max_record,
                )
            else:
                tokens = None if no_tokens else True
                found = ensure_index(
                    file,
                    jobs=jobs or usable_cores(),
                    progress=progress,
                    tokens=tokens,
                    max_record_bytes=max_record,
                )
        if not quiet:
            _print_index(found, time.perf_counter() - started)
        for folder in folders:
            with count_bar(folder, quiet=quiet) as seen:
                listing = ensure_listing(
                    found, folder, relist=relist, allow_outside=allow_outside, progress=seen
                )
            if not quiet:
                _print_listing(listing)


def _print_index(index: "Index", seconds: float) -> None:
    size = index.path.stat().st_size
    rows = [
        ("records", f"{len(index):,}"),
        *([("repeated keys", f"{index.repeated:,}")] if index.repeated else []),
        *([("without size", f"{index.without_size:,}")] if index.without_size else []),
        ("token lengths", "yes" if index.has_tokens else "no"),
        ("bytes", f"{size:,}"),
        ("seconds", f"{seconds:.2f}"),
    ]
    print("\n".join(f"{name:<18} {value:>16}" for name, value in rows))
    if index.repeated:
        print(
            "note: of a repeated key only the last record is trained, as json.load keeps it; the ones before it are left out."
        )
    if index.without_size:
        print(
            "note: records without a usable train_resolution or image_size have 0 x 0 in the index and cannot be trained."
        )
    print(f"index: {printable(str(index.path))}")


def _print_listing(listing: "Listing") -> None:
    print(
        f"latents: {listing.found:,} of {len(listing):,} records have a file in {printable(str(listing.folder))}"
    )
    if listing.unlisted:
        print(
            f"note: {listing.unlisted:,} records without one have keys that lead out of that folder; --allow-outside lists where they lead."
        )
