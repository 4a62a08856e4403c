"""The command `capmerge verify`."""

from pathlib import Path
from typing import Annotated

import typer

from capmerge.captions.templates import MergeOptions
from capmerge.cli.options import (
    AllowRewrittenOption,
    CaptionLinesOption,
    CaptionWildcardsOption,
    FamilyOption,
    FitOption,
    ImageSizeOption,
    LayoutOption,
    LineOption,
    MaxRecordOption,
    OnErrorOption,
    PrefixOption,
    QuietOption,
    SourceArgument,
    SuffixOption,
    UnderscoresOption,
    WeightsOption,
    _asked,
    _asked_fit,
)
from capmerge.commands.receipt import load_receipt
from capmerge.commands.verify import verify
from capmerge.files.source import open_source
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.terminal import errors_as_exit_codes, progress_bar


def verify_command(
    src: SourceArgument,
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="What `rewrite` made of SRC.", show_default=False)
    ],
    layout: LayoutOption = None,
    line: LineOption = None,
    weights: WeightsOption = None,
    caption_lines: CaptionLinesOption = None,
    underscores: UnderscoresOption = None,
    caption_wildcards: CaptionWildcardsOption = None,
    prefix: PrefixOption = None,
    suffix: SuffixOption = None,
    image_size: ImageSizeOption = None,
    on_error: OnErrorOption = None,
    allow_rewritten: AllowRewrittenOption = None,
    fit: FitOption = None,
    family: FamilyOption = None,
    quiet: QuietOption = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Prove record by record that OUT is SRC rewritten, with nothing lost.

    SRC and OUT are .json or .jsonl files, or .gz of either.
    The options are those of OUT.capmerge.json, unless any is given here.
    """
    with errors_as_exit_codes():
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
            allow_rewritten,
        )
        asked |= _asked_fit(fit, family)
        if asked or on_error:
            merge, skips = MergeOptions(**asked), on_error == "skip"
        else:
            merge, skips = load_receipt(Path(out))
        with (
            open_source(src) as source,
            open_source(out) as written,
            progress_bar(source, quiet=quiet) as progress,
        ):
            verified = verify(
                source, written, merge, skips=skips, max_record_bytes=max_record, progress=progress
            )
        if not quiet:
            print(verified.text())
