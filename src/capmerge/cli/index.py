"""The command `capmerge index`: from its options to the index, its listings and their table."""

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
    wrote. An index that fits FILE is kept as it is. With --latents, a listing beside the index says
    which latents each record has.
    """
    with errors_as_exit_codes():
        # Checks
        folders = latents or []
        if not folders and (relist or allow_outside):
            raise UsageError(
                "--relist and --allow-outside say how folders of latents are listed. "
                "Give --latents DIR with them."
            )
        if missing := [folder for folder in folders if not folder.is_dir()]:
            raise UsageError(
                f"--latents {printable(str(missing[0]))}: there is no such folder. "
                "Name the folder of the cached latents."
            )

        # Index
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

        # Listings
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
            "note: only the last record of a repeated key is trained, because json.load keeps "
            "that one."
        )
    if index.without_size:
        print(
            "note: records without a usable train_resolution or image_size have the size 0 x 0 "
            "in the index and cannot be trained."
        )
    print(f"index: {printable(str(index.path))}")


def _print_listing(listing: "Listing") -> None:
    print(
        f"latents: {listing.found:,} of {len(listing):,} records have a file in "
        f"{printable(str(listing.folder))}"
    )
    if listing.unlisted:
        print(
            f"note: the keys of {listing.unlisted:,} records without a file lead out of that "
            "folder. --allow-outside lists the folders that they lead to."
        )
