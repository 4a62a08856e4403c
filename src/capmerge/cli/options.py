"""The arguments and options that several commands share, each of them declared once."""

from pathlib import Path
from typing import Annotated

import typer

from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.metadata.format import ConvertFormat
from capmerge.tokens.families import TokenizerFamily

SourceArgument = Annotated[str, typer.Argument(metavar="SRC", show_default=False)]
SourceFileArgument = Annotated[Path, typer.Argument(metavar="SRC", show_default=False)]
"""A source that is read at many places, and so has to be a file."""
OutOption = Annotated[
    str,
    typer.Option(
        "-o",
        "--out",
        metavar="OUT",
        help="The file to write; - is standard output.",
        show_default=False,
    ),
]
OutFileOption = Annotated[
    Path,
    typer.Option(
        "-o",
        "--out",
        metavar="OUT",
        help="The file to write: .json or .jsonl, or either with .gz or .zst.",
        show_default=False,
    ),
]
FormatOption = Annotated[
    ConvertFormat | None,
    typer.Option("--format", help="The format to write. Default: by the ending of OUT."),
]
ForceOption = Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")]
FamilyOption = Annotated[
    TokenizerFamily | None,
    typer.Option(
        "--family",
        help="The model family whose CLIP tokenizer counts tokens; sd1 and sdxl count alike. "
        "Default: sd1.",
        show_default=False,
    ),
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer",
        metavar="PATH",
        help="Count with this Hugging Face tokenizer: another CLIP tokenizer, or for sd3 and flux "
        "the T5 tokenizer.",
        show_default=False,
    ),
]
PlotOption = Annotated[
    Path | None,
    typer.Option(
        "--plot",
        metavar="FILE",
        help="Draw the token lengths as a .png, .svg or .pdf figure.",
        show_default=False,
    ),
]
ReportOption = Annotated[
    Path | None,
    typer.Option(
        "--report",
        metavar="FILE",
        help="Write the statistics as one self-contained HTML page.",
        show_default=False,
    ),
]
JobsOption = Annotated[
    int | None,
    typer.Option(
        "-j",
        "--jobs",
        metavar="N",
        min=1,
        help="The number of worker processes. Default: one per core.",
        show_default=False,
    ),
]
MaxRecordOption = Annotated[
    int,
    typer.Option(
        "--max-record",
        metavar="BYTES",
        min=1 << 21,
        help=f"The length of the longest record that is read. Default: {MAX_RECORD_BYTES}.",
        show_default=False,
    ),
]
QuietOption = Annotated[bool, typer.Option("--quiet", help="Print only errors.")]
