"""The command `capmerge pack-latents`: from its options to the shards and their table."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from capmerge.cli.options import JobsOption, MaxRecordOption, QuietOption, SourceFileArgument
from capmerge.cores import usable_cores
from capmerge.errors import printable
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.terminal import count_bar, errors_as_exit_codes, progress_bar, warn

if TYPE_CHECKING:
    from capmerge.commands.pack_latents import PackOptions, PackSummary


def pack_latents_command(
    src: SourceFileArgument,
    *,
    latents: Annotated[
        Path,
        typer.Option(
            "--latents",
            metavar="DIR",
            help="The folder of the cached latents. Nothing in it is changed.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "-o",
            "--out",
            metavar="SHARDS",
            help="The folder of shards to write, which must not exist.",
            show_default=False,
        ),
    ],
    dtype: Annotated[
        Literal["keep", "fp16"],
        typer.Option(
            "--dtype",
            help="keep: every file as it is, byte for byte. fp16: the latents as float16, for half "
            "the bytes; files with numbers beyond its range are kept as they are, and told.",
        ),
    ] = "keep",
    shard_mb: Annotated[
        int,
        typer.Option(
            "--shard-mb",
            metavar="N",
            min=1,
            help="The files of one shard take at most N million bytes, before --dtype.",
        ),
    ] = 1000,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Read every packed file back and compare it with the loose one, before the "
            "shards take their name.",
        ),
    ] = False,
    jobs: JobsOption = None,
    quiet: QuietOption = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Pack the latents of SRC into tar shards that training reads at random.

    SRC is a .json or .jsonl file of metadata, rewritten or not, whose records name the latents.
    Training takes the folder of shards as data.latents. Files that are missing or broken are left
    out, and listed in left-out.jsonl beside the shards. An interrupted run goes on when it is
    started again.
    """
    with errors_as_exit_codes():
        from capmerge.commands.pack_latents import PackOptions, check_pack, pack
        from capmerge.index.reader import open_indexable

        options = PackOptions(
            latents,
            out.absolute(),
            dtype,
            shard_mb * 1_000_000,
            verify,
            jobs or usable_cores(),
            max_record,
        )
        with open_indexable(src) as source:
            check_pack(options)
            with (
                progress_bar(source, quiet=quiet) as indexing,
                count_bar(latents, quiet=quiet) as listing,
                count_bar(out, quiet=quiet) as packing,
                count_bar(out, quiet=quiet) as verifying,
            ):
                summary = pack(src, options, indexing, listing, packing, verifying)
        _print(summary, options, quiet=quiet)
        if not quiet:
            print(f"shards: {printable(str(out))}")


def _print(summary: "PackSummary", options: "PackOptions", *, quiet: bool) -> None:
    left_out = summary.missing + summary.broken
    if left_out or summary.unchanged:
        from capmerge.commands.pack_latents import LEFT_OUT

        told = [f"{summary.missing:,} records without a latents file"] * bool(summary.missing)
        told += [f"{summary.broken:,} broken files left out"] * bool(summary.broken)
        told += [f"{summary.unchanged:,} files kept their type, since float16 cannot hold them"] * (
            bool(summary.unchanged)
        )
        first = "; ".join(printable(text) for text in summary.first)
        more = "; ..." if left_out + summary.unchanged > len(summary.first) else ""
        warn(
            f"{', '.join(told)}. The first: {first}{more}. "
            f"All of them: {printable(str(options.out / LEFT_OUT))}"
        )
    if quiet:
        return
    rows = [
        ("records", f"{summary.records:,}"),
        ("records without a file", f"{summary.missing:,}"),
        ("files", f"{summary.files:,}"),
        ("files packed", f"{summary.members:,}"),
        ("files left out", f"{summary.broken:,}"),
        ("shards", f"{summary.shards:,}"),
        *([("shards finished before", f"{summary.reused:,}")] if summary.reused else []),
        ("bytes", f"{summary.size:,}"),
        *([("files verified", f"{summary.verified:,}")] if options.verify else []),
        ("seconds", f"{summary.seconds:.2f}"),
        ("files per second", f"{summary.files / max(1e-9, summary.seconds):,.0f}"),
    ]
    print("\n".join(f"{name:<24} {value:>14}" for name, value in rows))
