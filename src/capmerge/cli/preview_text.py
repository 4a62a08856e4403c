"""Previews as text for a terminal: chunks in colour, or between plain marks.

Everything that comes from a file is escaped before it reaches the terminal.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from capmerge.captions.fields import STYLES
from capmerge.commands.preview import Preview, Previewer, Shown, iter_previews
from capmerge.commands.preview_options import PreviewOptions
from capmerge.errors import UsageError, printable
from capmerge.files.source import Source
from capmerge.terminal import warn
from capmerge.tokens.chunk_text import ChunkedText, Part

_CHUNK_COLOURS = ("36", "33", "35", "34")
"""Cyan, yellow, magenta and blue: two neighbours are never alike."""
_RED, _BOLD = "31", "1"


class Printed(NamedTuple):
    """The numbers of printed records that were not merged."""

    rewritten: int
    """Already rewritten in the source."""
    unmergeable: int


def print_previews(
    source: Source,
    options: PreviewOptions,
    *,
    progress: Callable[[int], None] | None = None,
    quiet: bool = False,
) -> Printed:
    """Print the records that `options` ask for and, unless `quiet`, the tokenizer that counted.

    `progress` is told the offset that is done; when it is given, its bar is on the terminal
    and the lines are written above it. Returns the numbers of records that were not merged. Raises
    `UsageError` when the source has no record of a key, and when standard output is closed.
    """
    if sys.stdout is None:
        raise UsageError("standard output is closed, and records are shown there. Open it.")
    previewer = Previewer(options)
    screen = Screen(
        colour=sys.stdout.isatty()
        and not os.environ.get("NO_COLOR")
        and os.environ.get("TERM") != "dumb",
        encoding=sys.stdout.encoding or "utf-8",
    )
    write = _write_beside_bar if progress else print
    shown = rewritten = unmergeable = 0
    for preview in iter_previews(source, options, previewer, progress):
        shown += 1
        rewritten += preview.rewritten
        unmergeable += preview.after is None
        for text in screen.lines(preview):
            write(text)
    if not shown:
        write(f"{printable(source.name)}: the file holds no records.")
    if not quiet:
        for note in previewer.notes():
            warn(note)
        write(previewer.readers.text())
    return Printed(rewritten, unmergeable)


def _write_beside_bar(line: str) -> None:
    """Write a line above the progress bar."""
    from tqdm import tqdm  # imported already, by the bar

    tqdm.write(line)


class Screen:
    """Turns previews into lines; `colour` says whether they are coloured.

    Without colour, chunks stand between the marks ⟦ and ⟧, or between [ and ] where `encoding`
    lacks those, as the code pages of Windows do.
    """

    def __init__(self, *, colour: bool, encoding: str = "utf-8") -> None:
        self._colour = colour
        self._open, self._close = "⟦⟧" if "⟦⟧".encode(encoding, "ignore") else "[]"

    def lines(self, preview: Preview) -> Iterator[str]:
        """The lines of one preview."""
        yield self._paint(_json_text(preview.key), _BOLD)
        yield "  already rewritten, shown as it is:" if preview.rewritten else "  before:"
        yield from _fields(preview.before)
        if not preview.rewritten and preview.after is not None:
            yield "  after:"
            yield from _fields(preview.after)
        if preview.problem:
            verb = "read" if preview.rewritten else "merged"
            yield f"  cannot be {verb}: {printable(preview.problem)}"
            return
        if not preview.alternatives:
            yield "  no alternatives: the empty caption is trained."
        yield from _changes(preview)
        for number, shown in enumerate(preview.alternatives):
            drawn = "  <- drawn" if number == preview.drawn_number else ""
            yield f"  {number + 1}. {_heading(shown)}{drawn}"
            yield f"     {self._cut(shown.cut)}"
            if shown.t5_cut:
                yield f"     T5, {_length(shown.t5_cut)}: {self._cut(shown.t5_cut)}"
        for unfit in preview.unfit:
            what = "left out" if unfit.left_out else "cut"
            yield f"  {what} by --fit: {STYLES[unfit.style]}, {unfit.tokens:,} tokens"
            yield f"     {self._part(Part(None, unfit.text, 0))}"
        if preview.drawn:
            yield f"  drawn: {printable(preview.drawn.text)}"

    def _cut(self, cut: ChunkedText) -> str:
        return " ".join(self._part(part) for part in cut.parts if part.tokens or part.chunk == 1)

    def _part(self, part: Part) -> str:
        text = printable(part.text.strip())
        if not self._colour:
            return f"{self._open}{part.chunk or 'dropped'}| {text} {self._close}"
        return self._paint(
            text, _CHUNK_COLOURS[(part.chunk - 1) % len(_CHUNK_COLOURS)] if part.chunk else _RED
        )

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour and text else text


def _changes(preview: Preview) -> Iterator[str]:
    """The lines on what was left out or replaced before the alternatives were made."""
    for what, names in (
        ("dropped by --drop-tags", preview.dropped_tags),
        ("replaced by --replace-tags", preview.replaced_tags),
        ("templates left out that name a missing field", preview.lacking_fields),
    ):
        if names:
            yield f"  {what}: {printable(', '.join(dict.fromkeys(names)))}"


def _heading(shown: Shown) -> str:
    """The line above an alternative: its style, its probability and its token length."""
    times = len(shown.written.places)
    repeated = f", on {times} lines" if times > 1 else ""
    longest = f", longest of {shown.texts:,} texts" if shown.texts > 1 else ""
    style, share = STYLES[shown.written.style], f"{float(shown.written.share):.2%}"
    return f"{style}, {share}{repeated}: {_length(shown.cut)}{longest}"


def _length(cut: ChunkedText) -> str:
    """The token length of a text, such as `80 tokens in 2 chunks, 5 dropped`."""
    used = sum(1 for part in cut.parts if part.chunk and part.tokens)
    dropped = f", {cut.dropped:,} dropped" if cut.dropped else ""
    return f"{_counted(cut.tokens, 'token')} in {_counted(max(1, used), 'chunk')}{dropped}"


def _counted(number: int, thing: str) -> str:
    """A number with its noun, such as `1 token` or `3 tokens`."""
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _json_text(value: Any) -> str:
    """`value` as one line of JSON, safe for a terminal."""
    return printable(json.dumps(value, ensure_ascii=False))


def _fields(record: Any) -> Iterator[str]:
    """The lines of a record, one field per line."""
    if not isinstance(record, dict):
        yield f"    {_json_text(record)}"
        return
    for name, value in record.items():
        yield f"    {_json_text(name)}: {_json_text(value)}"
