"""The command `capmerge collect`: from its options to the run and the table at its end."""

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from capmerge.cli.options import ForceOption, FormatOption, MaxRecordOption, OutOption, QuietOption
from capmerge.commands.collect import CollectOptions, collect
from capmerge.commands.collect_lines import LinesOptions, collect_lines
from capmerge.commands.collect_summary import folder_text, lines_text
from capmerge.commands.convert import choose_format
from capmerge.commands.merge_blocks import OnError
from capmerge.commands.pictures import PICTURE_ENDINGS
from capmerge.errors import UsageError, quoted
from capmerge.files.source import open_source
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.terminal import count_bar, errors_as_exit_codes, progress_bar

_FIELDS = {"caption": ".caption", "tags": ".txt"}
"""The fields that texts are collected for, and the endings that sd-scripts has as defaults."""
_READERS = 8


def collect_command(
    src: Annotated[str, typer.Argument(metavar="DIR", show_default=False)],
    *,
    out: OutOption,
    caption: Annotated[
        str | None,
        typer.Option(
            "--caption",
            metavar="ENDING",
            help="Read captions from files with this ending. Default: .caption, unless --tags is "
            "given alone.",
            show_default=False,
        ),
    ] = None,
    tags: Annotated[
        str | None,
        typer.Option(
            "--tags",
            metavar="ENDING",
            help="Read tags from files with this ending. Default: .txt, unless --caption is given "
            "alone.",
            show_default=False,
        ),
    ] = None,
    recursive: Annotated[
        bool,
        typer.Option("--recursive", help="Look into the folders in DIR too. It needs --full-path."),
    ] = False,
    full_path: Annotated[
        bool,
        typer.Option("--full-path", help="Make the paths of pictures the keys, not their stems."),
    ] = False,
    encoding: Annotated[
        list[str] | None,
        typer.Option(
            "--encoding",
            metavar="NAME",
            help="Read texts in this encoding. Repeat the option for encodings that are tried "
            "where the first does not fit. Default: utf-8.",
            show_default=False,
        ),
    ] = None,
    on_error: Annotated[
        OnError | None,
        typer.Option(
            "--on-error",
            help="What to do with a text that cannot be read. stop: end the run. skip: leave it "
            "out, and list it in OUT.rejects.jsonl. Default: stop.",
            show_default=False,
        ),
    ] = None,
    key_field: Annotated[
        str | None,
        typer.Option(
            "--key-field",
            metavar="NAME",
            help="In JSON lines, the field with the name of the picture. Default: file_name.",
            show_default=False,
        ),
    ] = None,
    caption_field: Annotated[
        str | None,
        typer.Option(
            "--caption-field",
            metavar="NAME",
            help="In JSON lines, the field that becomes the caption. Default: text.",
            show_default=False,
        ),
    ] = None,
    format_name: FormatOption = None,
    readers: Annotated[
        int | None,
        typer.Option(
            "-j",
            "--jobs",
            metavar="N",
            min=1,
            max=256,
            help=f"How many texts are read at once. Default: {_READERS}.",
            show_default=False,
        ),
    ] = None,
    force: ForceOption = False,
    quiet: QuietOption = False,
    max_record: MaxRecordOption = MAX_RECORD_BYTES,
) -> None:
    """Make metadata of the text files beside pictures, or of JSON lines of another kind.

    DIR is a folder of pictures, for which the file is the one that sd-scripts' own two scripts
    make: a record per picture, with the text of <stem>.caption as its caption and that of
    <stem>.txt as its tags. DIR may also be a file of JSON lines such as {"file_name": "1.png",
    "text": "a cat"}; then the file name becomes the key and the text the caption.
    """
    with errors_as_exit_codes():
        target = None if out == "-" else Path(out)
        form = choose_format(format_name, target)
        started = time.perf_counter()
        if Path(src).is_dir():
            _refuse("a folder", {"--key-field": key_field, "--caption-field": caption_field})
            if recursive and not full_path:
                raise UsageError(
                    "--recursive needs --full-path, because pictures in different folders may "
                    "have one stem."
                )
            options = CollectOptions(
                target,
                form,
                _endings(caption, tags),
                recursive=recursive,
                full_path=full_path,
                encodings=tuple(encoding or ("utf-8",)),
                on_error=on_error or "stop",
                readers=readers or _READERS,
                force=force,
            )
            with count_bar(Path(src), quiet=quiet) as progress:
                done = collect(Path(src), options, progress=progress)
            text = folder_text(done, options, time.perf_counter() - started)
        else:
            given: dict[str, object] = {"--caption": caption, "--tags": tags, "-j": readers}
            given |= {"--recursive": recursive, "--encoding": encoding, "--on-error": on_error}
            _refuse("a file", given)
            lines_options = LinesOptions(
                target,
                form,
                key_field or "file_name",
                caption_field or "text",
                Path(src).parent if full_path else None,
                force=force,
                max_record_bytes=max_record,
            )
            with open_source(src) as source, progress_bar(source, quiet=quiet) as progress:
                lines = collect_lines(source, lines_options, progress=progress)
            text = lines_text(lines, time.perf_counter() - started)
        if not quiet:
            print(text, file=sys.stdout if target else sys.stderr)


def _endings(caption: str | None, tags: str | None) -> dict[str, str]:
    """The ending of the texts of each field that is asked for; both fields if none is."""
    given = {"caption": caption, "tags": tags}
    endings = {name: ending for name, ending in given.items() if ending is not None} or _FIELDS
    for name, ending in endings.items():
        if len(ending) < 2 or not ending.startswith(".") or "/" in ending or "\0" in ending:
            raise UsageError(
                f"--{name} {quoted(ending)}: expected the ending of a file with its dot, such as "
                f"{_FIELDS[name]}."
            )
        if any(ending.endswith(picture) for picture in PICTURE_ENDINGS):
            raise UsageError(f"--{name} {quoted(ending)}: that is the ending of a picture.")
    if len(set(endings.values())) < len(endings):
        raise UsageError(
            f"--caption and --tags are both {quoted(endings['tags'])}. Give the one that it is."
        )
    return endings


def _refuse(what: str, options: dict[str, object]) -> None:
    """Raise `UsageError` for an option that has no effect on `what` is collected."""
    given = [name for name, value in options.items() if value not in (None, False, [])]
    if given:
        raise UsageError(
            f"{given[0]} has no effect on {what}. Leave it out, or give "
            f"{'a file of JSON lines' if what == 'a folder' else 'a folder of pictures'}."
        )
