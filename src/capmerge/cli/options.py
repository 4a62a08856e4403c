"""The options that several commands share."""

from pathlib import Path
from typing import Annotated, Any

import typer

from capmerge.captions.templates import CaptionLayout, CaptionLines, Underscores, Weights
from capmerge.commands.merge_blocks import OnError
from capmerge.errors import UsageError
from capmerge.tokens.families import TokenizerFamily

SourceArgument = Annotated[
    str,
    typer.Argument(
        metavar="SRC",
        help="A .json or .jsonl metadata file, .gz of either, or - for standard input.",
        show_default=False,
    ),
]
LayoutOption = Annotated[
    CaptionLayout | None,
    typer.Option(
        "--layout",
        help="lines (default): one of tags and caption is drawn. concat, concat-caption-first: both. inline: {tags|caption}.",
        show_default=False,
    ),
]
LineOption = Annotated[
    list[str] | None,
    typer.Option(
        "--line",
        metavar="TEMPLATE[=WEIGHT]",
        help="A line over {tags}, {caption} and literal text, drawn with this whole-number weight. Repeatable.",
        show_default=False,
    ),
]
WeightsOption = Annotated[
    Weights | None,
    typer.Option(
        "--weights",
        help="repeat (default): by repeated lines. field: a list capmerge_weights in the record.",
        show_default=False,
    ),
]
CaptionLinesOption = Annotated[
    CaptionLines | None,
    typer.Option(
        "--caption-lines",
        help="A multi-line caption is several alternatives (each, default), one joined line, or its first line.",
        show_default=False,
    ),
]
UnderscoresOption = Annotated[
    Underscores | None,
    typer.Option(
        "--underscores",
        help="Tags keep underscores (default) or get spaces; emoticons stay.",
        show_default=False,
    ),
]
CaptionWildcardsOption = Annotated[
    bool | None,
    typer.Option(
        "--caption-wildcards",
        help="Captions hold intended {a|b}: their braces stay.",
        show_default=False,
    ),
]
PrefixOption = Annotated[
    str | None,
    typer.Option("--prefix", metavar="S", help="Text before every line.", show_default=False),
]
SuffixOption = Annotated[
    str | None,
    typer.Option("--suffix", metavar="S", help="Text after every line.", show_default=False),
]
ImageSizeOption = Annotated[
    bool | None,
    typer.Option(
        "--image-size/--no-image-size",
        help="Add image_size = train_resolution where absent (default on). Right only beside legacy <stem>.npz latents.",
        show_default=False,
    ),
]
OnErrorOption = Annotated[
    OnError | None,
    typer.Option(
        "--on-error",
        help="A record that cannot be merged stops the run (default), or is left out and listed whole.",
        show_default=False,
    ),
]
AllowRewrittenOption = Annotated[
    bool | None,
    typer.Option(
        "--allow-rewritten",
        help="Pass records that are rewritten already through unchanged.",
        show_default=False,
    ),
]
FitOption = Annotated[
    tuple[int, str] | None,
    typer.Option(
        "--fit",
        metavar="N drop|trim",
        help="An alternative longer than N tokens is left out where a shorter one exists, or cut at a whole tag or sentence.",
        show_default=False,
    ),
]
FamilyOption = Annotated[
    TokenizerFamily | None,
    typer.Option(
        "--family",
        help="Whose CLIP tokenizer counts (default sd1, the same as sdxl).",
        show_default=False,
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="PATH",
        help="A Hugging Face tokenizer: another CLIP, or the T5 of sd3 and flux.",
        show_default=False,
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot", metavar="FILE", help="Draw the lengths as .png or .svg.", show_default=False
    ),
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Write one HTML page that needs nothing else.",
        show_default=False,
    ),
]


def _asked(  # the merge options, in the order of MergeOptions
    layout: CaptionLayout | None,
    line: list[str] | None,
    weights: Weights | None,
    caption_lines: CaptionLines | None,
    underscores: Underscores | None,
    caption_wildcards: bool | None,
    prefix: str | None,
    suffix: str | None,
    image_size: bool | None,
    allow_rewritten: bool | None,
) -> dict[str, Any]:
    """The merge options that the command line gives, by their names in `MergeOptions`."""
    given = {
        "layout": layout,
        "lines": tuple(line) if line else None,
        "weights": weights,
        "caption_lines": caption_lines,
        "underscores": underscores,
        "caption_wildcards": caption_wildcards,
        "prefix": prefix,
        "suffix": suffix,
        "image_size": image_size,
        "allow_rewritten": allow_rewritten,
    }
    return {name: value for name, value in given.items() if value is not None}


def _asked_fit(fit: tuple[int, str] | None, family: TokenizerFamily | None) -> dict[str, Any]:
    """The options of `--fit` that the command line gives, by their names in `MergeOptions`."""
    if fit is None:
        if family:
            raise UsageError(
                f"--family {family} says whose tokens --fit counts. Give --fit N drop or --fit N trim, or leave it out."
            )
        return {}
    return {"fit_tokens": fit[0], "fit_by": fit[1], **({"fit_family": family} if family else {})}


JobsOption = Annotated[
    int | None,
    typer.Option(
        "-j",
        "--jobs",
        metavar="N",
        min=1,
        help="Worker processes. Default: all cores.",
        show_default=False,
    ),
]
MaxRecordOption = Annotated[
    int,
    typer.Option(
        "--max-record", metavar="BYTES", min=1 << 21, help="The longest record that is read."
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print only errors.")]
