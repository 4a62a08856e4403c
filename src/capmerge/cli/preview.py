"""The command `capmerge preview`: options to the records that are shown."""

import os
import sys
from typing import Annotated

import typer

from capmerge.captions.draw import Pick
from capmerge.captions.templates import MergeOptions
from capmerge.cli.options import (
    CaptionLinesOption,
    CaptionWildcardsOption,
    FamilyOption,
    FitOption,
    ImageSizeOption,
    LayoutOption,
    LineOption,
    MaxRecordOption,
    PrefixOption,
    QuietOption,
    SourceArgument,
    SuffixOption,
    TokenizerOption,
    UnderscoresOption,
    WeightsOption,
    _asked,
    _asked_fit,
)
from capmerge.errors import UsageError
from capmerge.files.source import open_source
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.terminal import errors_as_exit_codes, progress_bar, warn
from capmerge.tokens.chunks import Splitting


def preview_command(
    src: SourceArgument,
    key: Annotated[
        list[str] | None,
        typer.Option(
            "--key",
            metavar="K",
            help="Show the record of this key. Repeatable.",
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
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens",
            metavar="N",
            help="What a model reads: a multiple of 75. Default: 225; a1111: no limit.",
            show_default=False,
        ),
    ] = None,
    chunking: Annotated[
        Splitting,
        typer.Option(
            "--chunking",
            help="How captions are cut into chunks: as sd-scripts or as AUTOMATIC1111 does.",
        ),
    ] = "kohya",
    family: FamilyOption = None,
    tokenizer: TokenizerOption = None,
    seed: Annotated[
        int | None,
        typer.Option(
            "--seed", help="With --epoch: show the very line that is drawn.", show_default=False
        ),
    ] = None,
    epoch: Annotated[
        int | None, typer.Option("--epoch", help="The epoch of --seed.", show_default=False)
    ] = None,
    pick: Annotated[
        Pick | None,
        typer.Option("--pick", help="How it is drawn. Default: random.", show_default=False),
    ] = None,
    dataset: Annotated[
        int | None,
        typer.Option(
            "--dataset", min=0, help="Number of the data set. Default: 0.", show_default=False
        ),
    ] = None,
    repeat: Annotated[
        int | None,
        typer.Option(
            "--repeat", min=0, help="Number of the repeat. Default: 0.", show_default=False
        ),
    ] = None,
    layout: LayoutOption = None,
    line: LineOption = None,
    weights: WeightsOption = None,
    caption_lines: CaptionLinesOption = None,
    underscores: UnderscoresOption = None,
    caption_wildcards: CaptionWildcardsOption = None,
    prefix: PrefixOption = None,
    suffix: SuffixOption = None,
    image_size: ImageSizeOption = None,
    fit: FitOption = None,
    quiet: QuietOption = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Show records before and after, with what CLIP sees of every alternative."""
    with errors_as_exit_codes():
        from capmerge.cli.preview_text import Screen
        from capmerge.commands.preview import Previewer, PreviewOptions, Sampling, iter_previews

        asked = _asked(
            layout,
            line,
            weights,
            caption_lines,
            underscores,
            caption_wildcards,
            prefix,
            suffix,
            image_size,
            None,
        )
        asked |= _asked_fit(fit, family if fit else None)
        if (seed is None) != (epoch is None):
            raise UsageError("--seed and --epoch belong together: give both, or neither.")
        if key and count is not None:
            raise UsageError("--key and -n both say which records to show. Give one of them.")
        if seed is None and (pick or dataset is not None or repeat is not None):
            raise UsageError(
                "--pick, --dataset and --repeat say what is drawn. Give --seed and --epoch with them."
            )
        sampling = (
            None
            if seed is None or epoch is None
            else Sampling(seed, epoch, dataset or 0, repeat or 0, pick or "random")
        )
        options = PreviewOptions(
            MergeOptions(**asked),
            tuple(key or ()),
            count or 5,
            family or "sd1",
            chunking,
            max_tokens,
            tokenizer,
            sampling,
            max_record,
        )
        previewer = Previewer(options)
        screen = Screen(
            colour=sys.stdout.isatty()
            and not os.environ.get("NO_COLOR")
            and os.environ.get("TERM") != "dumb"
        )
        unread = 0
        write = _write_beside_bar if key and not quiet and sys.stderr.isatty() else print
        with open_source(src) as source, progress_bar(source, quiet=quiet or not key) as progress:
            for preview in iter_previews(source, options, previewer, progress):
                unread += preview.rewritten
                for text in screen.lines(preview):
                    write(text)
        if not quiet:
            print(previewer.readers.text())
        if asked and unread:
            warn(
                f"records that are rewritten already are shown as they are ({unread} here); the merge options change nothing in them."
            )


def _write_beside_bar(line: str) -> None:
    from tqdm import tqdm  # the bar needs it anyway

    tqdm.write(line)
