"""A preview as text for a terminal: chunks in colour, or between plain marks. Nothing a file holds reaches the terminal raw."""

import json
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from capmerge.captions.fields import STYLES
from capmerge.commands.preview import Preview, Shown
from capmerge.errors import printable
from capmerge.tokens.chunk_text import ChunkedText, Part

_CHUNK_COLOURS = (
    "36",
    "33",
    "35",
    "34",
)  # cyan, yellow, magenta, blue: two in a row are never alike
_RED, _BOLD, _DIM = "31", "1", "2"


class Screen:
    """Turns previews into lines; `colour` says whether the terminal shows it."""

    def __init__(self, *, colour: bool) -> None:
        self._colour = colour

    def lines(self, preview: Preview) -> Iterator[str]:
        """The lines of one preview."""
        yield self._paint(json_text(preview.key), _BOLD)
        yield "  rewritten already, as it is there:" if preview.rewritten else "  before:"
        yield from _fields(preview.before)
        if not preview.rewritten and preview.after is not None:
            yield "  after:"
            yield from _fields(preview.after)
        if preview.problem:
            yield f"  cannot be {'read' if preview.rewritten else 'merged'}: {printable(preview.problem)}"
            return
        if not preview.alternatives:
            yield "  no alternatives: the empty caption is trained."
        for number, shown in enumerate(preview.alternatives):
            yield f"  {number + 1}. {_heading(shown)}{'  <- drawn' if number == preview.drawn_number else ''}"
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
            return f"⟦{part.chunk or 'dropped'}| {text} ⟧"
        return self._paint(
            text, _CHUNK_COLOURS[(part.chunk - 1) % len(_CHUNK_COLOURS)] if part.chunk else _RED
        )

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour and text else text


def _heading(shown: Shown) -> str:
    times = len(shown.written.places)
    repeated = f", on {times} lines" if times > 1 else ""
    longest = f", longest of {shown.texts:,} texts" if shown.texts > 1 else ""
    return f"{STYLES[shown.written.style]}, {_percent(shown.written.share)}{repeated}: {_length(shown.cut)}{longest}"


def _length(cut: ChunkedText) -> str:
    used = sum(1 for part in cut.parts if part.chunk and part.tokens)
    dropped = f", {cut.dropped:,} dropped" if cut.dropped else ""
    return f"{_counted(cut.tokens, 'token')} in {_counted(max(1, used), 'chunk')}{dropped}"


def _counted(number: int, thing: str) -> str:
    return f"{number:,} {thing}{'' if number == 1 else 's'}"


def _percent(share: Fraction) -> str:
    return f"{float(share):.2%}"


def json_text(value: Any) -> str:
    """`value` as one line of JSON, safe for a terminal."""
    return printable(json.dumps(value, ensure_ascii=False))


def _fields(record: Any) -> Iterator[str]:
    """A record with one field a line."""
    if not isinstance(record, dict):
        yield f"    {json_text(record)}"
        return
    for name, value in record.items():
        yield f"    {json_text(name)}: {json_text(value)}"
