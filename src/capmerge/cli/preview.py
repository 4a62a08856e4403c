"""The command `capmerge preview`: from its options to the records that it shows."""

from typing import Annotated

import typer

from capmerge.captions.draw import Pick
from capmerge.cli.merge_options import MergeChoice, with_merge_options
from capmerge.cli.options import MaxRecordOption, QuietOption, SourceArgument, TokenizerOption
from capmerge.errors import UsageError
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.metadata.opened import open_metadata
from capmerge.terminal import errors_as_exit_codes, progress_bar, warn
from capmerge.tokens.chunks import Splitting


@with_merge_options("on_error", "allow_rewritten")
def preview_command(
    src: SourceArgument,
    *,
    key: Annotated[
        list[str] | None,
        typer.Option(
            "--key",
            metavar="KEY",
            help="Show the first record with this key. Repeat the option for more records.",
            show_default=False,
        ),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            "-n",
            "--count",
            metavar="N",
            min=1,
            help="Show the first N records. Default: 5.",
            show_default=False,
        ),
    ] = None,
    random: Annotated[
        int | None,
        typer.Option(
            "--random",
            metavar="N",
            min=1,
            help="Show N records from anywhere in SRC, drawn by --seed (default: 0).",
            show_default=False,
        ),
    ] = None,
    longest: Annotated[
        int | None,
        typer.Option(
            "--longest",
            metavar="N",
            min=1,
            help="Show the N records whose longest alternative has the most tokens.",
            show_default=False,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            help="The number of tokens that the model reads, a multiple of 75. Default: 225, no "
            "limit with --chunking a1111, 75 with --family sd3 or flux.",
            show_default=False,
        ),
    ] = None,
    chunking: Annotated[
        Splitting,
        typer.Option(
            "--chunking",
            help="How to cut captions into chunks. kohya: as sd-scripts does. a1111: as "
            "AUTOMATIC1111 does. Default: kohya.",
            show_default=False,
        ),
    ] = "kohya",
    tokenizer: TokenizerOption = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed",
            metavar="N",
            help="The seed of a training run. Together with --epoch it shows the line that is "
            "drawn.",
            show_default=False,
        ),
    ] = None,
    epoch: Annotated[
        int | None,
        typer.Option(
            "--epoch",
            metavar="N",
            help="The epoch whose line is shown, counted from 0. Goes together with --seed.",
            show_default=False,
        ),
    ] = None,
    pick: Annotated[
        Pick | None,
        typer.Option(
            "--pick",
            help="How the line is picked. random: at random in every epoch. cycle: in turn. "
            "Default: random.",
            show_default=False,
        ),
    ] = None,
    dataset: Annotated[
        int | None,
        typer.Option(
            "--dataset",
            metavar="N",
            min=0,
            help="The number of the data set in the training run, counted from 0. Default: 0.",
            show_default=False,
        ),
    ] = None,
    repeat: Annotated[
        int | None,
        typer.Option(
            "--repeat",
            metavar="N",
            min=0,
            help="The number of the repeat within the epoch, counted from 0. Default: 0.",
            show_default=False,
        ),
    ] = None,
    merge: MergeChoice,
    quiet: QuietOption = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Show records before and after the merge, as CLIP sees them.

    Each alternative is shown cut into chunks, with its tokens and with the part that is dropped.
    SRC is a .json or .jsonl metadata file, a .gz or .zst file of either, a .parquet file,
    or - for standard input. Records
    that are already rewritten are shown as they are. No file is written.
    """
    with errors_as_exit_codes():
        from capmerge.cli.preview_text import print_previews
        from capmerge.commands.preview_options import PreviewOptions, Sampling

        # Checks
        if seed is None if epoch is not None else seed is not None and random is None:
            raise UsageError(
                "--seed and --epoch belong together. Give both, or --seed with --random alone."
            )
        given = {"--key": key or None, "-n": count, "--random": random, "--longest": longest}
        choices = [name for name, value in given.items() if value is not None]
        if len(choices) > 1:
            raise UsageError(
                f"{choices[0]} and {choices[1]} both say which records to show. Give one of them."
            )
        if epoch is None and (pick or dataset is not None or repeat is not None):
            raise UsageError(
                "--pick, --dataset and --repeat say what is drawn. "
                "Give --seed and --epoch with them."
            )
        sampling = (
            None
            if seed is None or epoch is None
            else Sampling(seed, epoch, dataset or 0, repeat or 0, pick or "random")
        )
        options = PreviewOptions(
            merge.options(counts_tokens=True),
            keys=tuple(key or ()),
            count=count or random or longest or 5,
            selection="random" if random else "longest" if longest else "first",
            seed=seed or 0,
            family=merge.family or "sd1",
            chunking=chunking,
            max_tokens=max_tokens,
            tokenizer=tokenizer,
            sampling=sampling,
            max_record_bytes=max_record,
        )

        # Run
        reads_all = key or random or longest
        with (
            open_metadata(src) as source,
            progress_bar(source, quiet=quiet or not reads_all) as progress,
        ):
            printed = print_previews(source, options, progress=progress, quiet=quiet)

        # Report
        if merge.is_given and printed.rewritten:
            warn(
                "records that are already rewritten are shown as they are "
                f"({printed.rewritten} here); the merge options change nothing in them."
            )
