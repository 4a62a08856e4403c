"""The command line: options to a story of the floor below, errors to exit codes. Nothing is decided here."""

import io
import json
import os
import signal
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, TextIO

import typer

import capmerge
from capmerge.blocks import MAX_RECORD_BYTES
from capmerge.cli_frame import JobsOption, MaxRecordOption, QuietOption, cores, errors_as_exit_codes, progress_bar, warn
from capmerge.cli_index import index_file
from capmerge.cut import Chunking
from capmerge.document import Document
from capmerge.errors import UsageError, printable
from capmerge.families import Family
from capmerge.gather import Tokenizers
from capmerge.measure import MeasureOptions, measure
from capmerge.output import side_path, write_whole
from capmerge.report import text_table
from capmerge.rewrite import RewriteOptions, first_records, rewrite
from capmerge.rewriter import Format, FormatName, OnError
from capmerge.side_files import DATASET, SIDE_FILES, load_receipt
from capmerge.source import Source, open_source
from capmerge.stats_files import StatsFiles, default_document
from capmerge.summary import Summary
from capmerge.templates import CaptionLines, Layout, MergeOptions, Underscores, Weights
from capmerge.verify import verify
from capmerge.wildcard import Pick

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    help="Rewrite sd-scripts metadata of any size into wildcard-ready captions.",
)

SourceArgument = Annotated[
    str, typer.Argument(metavar="SRC", help="A .json or .jsonl metadata file, .gz of either, or - for standard input.", show_default=False)
]
LayoutOption = Annotated[
    Layout | None,
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
        "--weights", help="repeat (default): by repeated lines. field: a list capmerge_weights in the record.", show_default=False
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
    typer.Option("--underscores", help="Tags keep underscores (default) or get spaces; emoticons stay.", show_default=False),
]
CaptionWildcardsOption = Annotated[
    bool | None, typer.Option("--caption-wildcards", help="Captions hold intended {a|b}: their braces stay.", show_default=False)
]
PrefixOption = Annotated[str | None, typer.Option("--prefix", metavar="S", help="Text before every line.", show_default=False)]
SuffixOption = Annotated[str | None, typer.Option("--suffix", metavar="S", help="Text after every line.", show_default=False)]
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
        "--on-error", help="A record that cannot be merged stops the run (default), or is left out and listed whole.", show_default=False
    ),
]
AllowRewrittenOption = Annotated[
    bool | None, typer.Option("--allow-rewritten", help="Pass records that are rewritten already through unchanged.", show_default=False)
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
    Family | None, typer.Option("--family", help="Whose CLIP tokenizer counts (default sd1, the same as sdxl).", show_default=False)
]
TokenizerOption = Annotated[
    str | None,
    typer.Option(
        "--tokenizer", metavar="PATH", help="A Hugging Face tokenizer: another CLIP, or the T5 of sd3 and flux.", show_default=False
    ),
]
PlotOption = Annotated[Path | None, typer.Option("--plot", metavar="FILE", help="Draw the lengths as .png or .svg.", show_default=False)]
ReportOption = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write one HTML page that needs nothing else.", show_default=False)
]


@app.callback(invoke_without_command=True)
def _capmerge(version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False) -> None:
    if version:
        print(capmerge.__version__)
        raise typer.Exit


@app.command("rewrite")
def _rewrite(  # one parameter an option
    src: SourceArgument,
    out: Annotated[
        str | None,
        typer.Option(
            "-o", "--out", metavar="OUT", help="Default: <stem>_wildcard.json beside SRC. - is standard output.", show_default=False
        ),
    ] = None,
    format_name: Annotated[
        FormatName | None, typer.Option("--format", help="What to write. Default: by OUT's ending, else json.", show_default=False)
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
    on_error: OnErrorOption = None,
    allow_rewritten: AllowRewrittenOption = None,
    fit: FitOption = None,
    jobs: JobsOption = None,
    dry_run: Annotated[
        int | None,
        typer.Option(
            "--dry-run", metavar="N", min=1, help="Print the first N records before and after; write nothing.", show_default=False
        ),
    ] = None,
    summary: Annotated[
        Path | None, typer.Option("--summary", metavar="FILE", help="Write the end table as JSON.", show_default=False)
    ] = None,
    stats: Annotated[
        bool, typer.Option("--stats", help="Count tokens in the same pass: a table, and <stem>.stats.json beside OUT.")
    ] = False,
    family: FamilyOption = None,
    tokenizer: TokenizerOption = None,
    plot: PlotOption = None,
    report: ReportOption = None,
    quiet: QuietOption = False,
    index: Annotated[bool, typer.Option("--index", help="Write the index that a trainer reads in the same pass: OUT.index.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Merge caption and tags of every record into caption lines that sd-scripts draws from.

    SRC is a .json or .jsonl metadata file, .gz of either, or - for standard input.
    """
    with errors_as_exit_codes():
        asked = _asked(layout, line, weights, caption_lines, underscores, caption_wildcards, prefix, suffix, image_size, allow_rewritten)
        asked |= _asked_fit(fit, None if stats and not fit else family)
        target = None if out == "-" else _default_target(src, format_name) if out is None else Path(out)
        options = RewriteOptions(
            target,
            Format.choose(format_name, target),
            MergeOptions(**asked),
            on_error or "stop",
            jobs or cores(),
            force=force,
            stats=Tokenizers(family or "sd1", tokenizer) if stats else None,
            index=index,
            max_record_bytes=max_record,
        )
        if not stats and (plot or report or tokenizer):
            raise UsageError("--plot, --report and --tokenizer show and choose what --stats counts. Give --stats too.")
        with open_source(src) as source:
            files = StatsFiles(default_document(target) if target and stats else None, plot, report).checked(source, force=force)
            if summary:
                _check_summary(summary, source, target)
            if dry_run is not None:
                _print_records(source, options, dry_run)
                return
            started = time.perf_counter()
            with progress_bar(source, quiet=quiet) as progress:
                outcome = rewrite(source, options, warn=_silent if quiet else warn, progress=progress)
            config = target.name + DATASET if target else None
            written = files.save(outcome.statistics) if outcome.statistics else []
            end = Summary(outcome.tally, outcome.read_bytes, outcome.written_bytes, time.perf_counter() - started, config)
        if summary:
            write_whole(summary, json.dumps(end.as_dict(), indent=2) + "\n")
        if not quiet:
            screen = sys.stdout if target else sys.stderr
            print(end.text(), file=screen)
            if outcome.statistics:
                _print_statistics(outcome.statistics, written, to=screen)


@app.command("verify")
def _verify(
    src: SourceArgument,
    out: Annotated[str, typer.Argument(metavar="OUT", help="What `rewrite` made of SRC.", show_default=False)],
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
        asked = _asked(layout, line, weights, caption_lines, underscores, caption_wildcards, prefix, suffix, image_size, allow_rewritten)
        asked |= _asked_fit(fit, family)
        if asked or on_error:
            merge, skips = MergeOptions(**asked), on_error == "skip"
        else:
            merge, skips = load_receipt(Path(out))
        with open_source(src) as source, open_source(out) as written, progress_bar(source, quiet=quiet) as progress:
            verified = verify(source, written, merge, skips=skips, max_record_bytes=max_record, progress=progress)
        if not quiet:
            print(verified.text())


@app.command("stats")
def _stats(
    src: Annotated[
        str, typer.Argument(metavar="[SRC]", help="A metadata file, as for rewrite, or what rewrite made of one.")
    ] = "meta_lat.json",
    layout: LayoutOption = None,
    line: LineOption = None,
    weights: WeightsOption = None,
    caption_lines: CaptionLinesOption = None,
    underscores: UnderscoresOption = None,
    caption_wildcards: CaptionWildcardsOption = None,
    prefix: PrefixOption = None,
    suffix: SuffixOption = None,
    on_error: OnErrorOption = None,
    fit: FitOption = None,
    family: FamilyOption = None,
    tokenizer: TokenizerOption = None,
    out: Annotated[
        Path | None,
        typer.Option("-o", "--out", metavar="FILE", help="The figures as JSON. Default: <stem>.stats.json beside SRC.", show_default=False),
    ] = None,
    plot: PlotOption = None,
    report: ReportOption = None,
    per_record: Annotated[
        Path | None,
        typer.Option("--per-record", metavar="FILE", help="A line of JSON a record: the tokens of each alternative.", show_default=False),
    ] = None,
    jobs: JobsOption = None,
    quiet: QuietOption = False,
    force: Annotated[bool, typer.Option("--force", help="Replace files that exist.")] = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Count the tokens that CLIP will see: how long, how many are cut, and what else a file of captions holds.

    SRC is a metadata file as for rewrite, or what rewrite made of one; default: meta_lat.json here. A rewritten record is
    counted as it is, any other as rewrite would write it with the same options.
    """
    with errors_as_exit_codes():
        asked = _asked(layout, line, weights, caption_lines, underscores, caption_wildcards, prefix, suffix, None, None)
        asked |= _asked_fit(fit, family if fit else None)
        merge, tokenizers = MergeOptions(**asked), Tokenizers(family or "sd1", tokenizer)
        with open_source(src) as source:
            document = out or (None if src == "-" else default_document(Path(src)))
            files = StatsFiles(document, plot, report, per_record).checked(source, force=force)
            options = MeasureOptions(merge, tokenizers, files.per_record, on_error or "stop", jobs or cores(), max_record)
            with progress_bar(source, quiet=quiet) as progress:
                statistics = measure(source, options, progress=progress)
        if asked and statistics["records"]["rewritten_before"]:
            warn("records that are rewritten already are counted as they are; the merge options change nothing in them.")
        written = files.save(statistics)
        if not quiet:
            _print_statistics(statistics, [*written, *([files.per_record] if files.per_record else [])], to=sys.stdout)


@app.command("preview")
def _preview(
    src: SourceArgument,
    key: Annotated[
        list[str] | None, typer.Option("--key", metavar="K", help="Show the record of this key. Repeatable.", show_default=False)
    ] = None,
    count: Annotated[
        int | None, typer.Option("-n", "--count", metavar="N", min=1, help="Show the first N records. Default: 5.", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-tokens", metavar="N", help="What a model reads: a multiple of 75. Default: 225; a1111: no limit.", show_default=False
        ),
    ] = None,
    chunking: Annotated[
        Chunking, typer.Option("--chunking", help="How captions are cut into chunks: as sd-scripts or as AUTOMATIC1111 does.")
    ] = "kohya",
    family: FamilyOption = None,
    tokenizer: TokenizerOption = None,
    seed: Annotated[int | None, typer.Option("--seed", help="With --epoch: show the very line that is drawn.", show_default=False)] = None,
    epoch: Annotated[int | None, typer.Option("--epoch", help="The epoch of --seed.", show_default=False)] = None,
    pick: Annotated[Pick | None, typer.Option("--pick", help="How it is drawn. Default: random.", show_default=False)] = None,
    dataset: Annotated[int | None, typer.Option("--dataset", min=0, help="Number of the data set. Default: 0.", show_default=False)] = None,
    repeat: Annotated[int | None, typer.Option("--repeat", min=0, help="Number of the repeat. Default: 0.", show_default=False)] = None,
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
        from capmerge.preview import Previewer, PreviewOptions, Sampling, iter_previews
        from capmerge.show import Screen

        asked = _asked(layout, line, weights, caption_lines, underscores, caption_wildcards, prefix, suffix, image_size, None)
        asked |= _asked_fit(fit, family if fit else None)
        if (seed is None) != (epoch is None):
            raise UsageError("--seed and --epoch belong together: give both, or neither.")
        if key and count is not None:
            raise UsageError("--key and -n both say which records to show. Give one of them.")
        if seed is None and (pick or dataset is not None or repeat is not None):
            raise UsageError("--pick, --dataset and --repeat say what is drawn. Give --seed and --epoch with them.")
        sampling = None if seed is None or epoch is None else Sampling(seed, epoch, dataset or 0, repeat or 0, pick or "random")
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
        screen = Screen(colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb")
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
            warn(f"records that are rewritten already are shown as they are ({unread} here); the merge options change nothing in them.")


app.command("index")(index_file)


def main() -> None:
    """The console script. Exit codes: 0, 1 data, 2 usage, 130 Ctrl-C, 141 closed pipe, 143 terminated."""
    signal.signal(signal.SIGTERM, _terminated)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # no terminal lacks a character so badly that a run must end
    app(prog_name="capmerge")


def _terminated(_signal: int, _frame: FrameType | None) -> None:
    raise SystemExit(143)  # through every `finally`, so that nothing temporary stays


def _asked(  # the merge options, in the order of MergeOptions
    layout: Layout | None,
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


def _asked_fit(fit: tuple[int, str] | None, family: Family | None) -> dict[str, Any]:
    """The options of `--fit` that the command line gives, by their names in `MergeOptions`."""
    if fit is None:
        if family:
            raise UsageError(f"--family {family} says whose tokens --fit counts. Give --fit N drop or --fit N trim, or leave it out.")
        return {}
    return {"fit_tokens": fit[0], "fit_by": fit[1], **({"fit_family": family} if family else {})}


def _default_target(src: str, format_name: FormatName | None) -> Path:
    if src == "-":
        raise UsageError("standard input has no name to derive the output's from. Give -o OUT, or -o - for standard output.")
    path = Path(src)
    unzipped = path.with_suffix("") if path.suffix.lower() == ".gz" else path
    return path.with_name(f"{unzipped.stem}_wildcard.{format_name or 'json'}")


def _print_statistics(statistics: Document, written: list[Path], *, to: TextIO) -> None:
    """The table of statistics, and the files they went to."""
    print(f"\n{text_table(statistics)}\n", file=to)
    for path in written:
        print(f"written: {printable(str(path))}", file=to)


def _check_summary(summary: Path, source: Source, target: Path | None) -> None:
    """Raise `UsageError` when `--summary` would replace the source or the output."""
    ours = [target, *(side_path(target, suffix) for suffix in SIDE_FILES)] if target else []
    if source.is_file(summary) or summary.resolve() in [path.resolve() for path in ours]:
        raise UsageError(f"--summary {printable(str(summary))}: this is the source, the output or a side file. Choose another file.")
    if summary.is_dir() or not summary.resolve().parent.is_dir():
        raise UsageError(f"--summary {printable(str(summary))}: found a folder, or no folder to write into, expected a file name.")


def _silent(_message: str) -> None:
    """Nothing: --quiet prints only errors."""


def _print_records(source: Source, options: RewriteOptions, count: int) -> None:
    for key, before, after in first_records(source, options, count):
        print(printable(json.dumps(key, ensure_ascii=False)))
        for title, record in (("before", before), ("after", after)):
            text = record if isinstance(record, str) else json.dumps(record, indent=2, ensure_ascii=False)
            print(f"  {title}:")
            for line in text.split("\n"):
                print(f"    {printable(line)}")


def _write_beside_bar(line: str) -> None:
    from tqdm import tqdm  # imported already: a bar stands there

    tqdm.write(line)
