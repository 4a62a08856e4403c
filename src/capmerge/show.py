"""A preview as text for a terminal: chunks in colour, or between plain marks. Nothing a file holds reaches the terminal raw."""

import json
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

from capmerge.cut import Cut, Part
from capmerge.errors import printable
from capmerge.preview import Preview, Shown

_STYLES = {"t": "tags", "c": "caption", "b": "both"}
_CHUNK_COLOURS = ("36", "33", "35", "34")  # cyan, yellow, magenta, blue: two in a row are never alike
_RED, _BOLD, _DIM = "31", "1", "2"


class Screen:
    """Turns previews into lines; `colour` says whether the terminal shows it."""

    def __init__(self, *, colour: bool) -> None:
        self._colour = colour

    def lines(self, preview: Preview) -> Iterator[str]:
        """The lines of one preview."""
        yield self._paint(json_text(preview.key), _BOLD)
        yield "  rewritten already:" if preview.rewritten else "  before:"
        yield from _json_lines(preview.before)
        if not preview.rewritten:
            yield "  after:"
            if preview.after is None:
                yield f"    {printable(preview.problem)}"
            else:
                yield from _json_lines(preview.after)
        elif preview.problem:
            yield f"  {printable(preview.problem)}"
        if preview.after is not None and not preview.problem:
            yield from self._alternatives(preview)

    def _alternatives(self, preview: Preview) -> Iterator[str]:
        yield f"  alternatives: {len(preview.alternatives)}"
        for number, shown in enumerate(preview.alternatives):
            mark = "  <- drawn" if number == preview.drawn_number else ""
            yield f"    {_heading(number, shown)}{mark}"
            yield f"       {self._cut(shown.cut)}"
        if preview.drawn:
            yield "  drawn:"
            yield f"    {printable(preview.drawn.text)}"

    def _cut(self, cut: Cut) -> str:
        return " ".join(self._part(part) for part in cut.parts if part.tokens or not cut.tokens)

    def _part(self, part: Part) -> str:
        text = printable(part.text.strip())
        if not self._colour:
            return f"⟦{part.chunk or 'dropped'}| {text} ⟧"
        return self._paint(text, _CHUNK_COLOURS[(part.chunk - 1) % len(_CHUNK_COLOURS)] if part.chunk else _RED)

    def _paint(self, text: str, code: str) -> str:
        return f"\x1b[{code}m{text}\x1b[0m" if self._colour and text else text


def _heading(number: int, shown: Shown) -> str:
    cut = shown.cut
    dropped = f", {cut.dropped:,} dropped" if cut.dropped else ""
    return f"{number + 1}  {_STYLES.get(shown.written.style, '?'):<8} {_percent(shown.written.share):>8}  {cut.tokens:,} tokens{dropped}"


def _percent(share: Fraction) -> str:
    return f"{float(share):.2%}"


def json_text(value: Any) -> str:
    """`value` as one line of JSON, safe for a terminal."""
    return printable(json.dumps(value, ensure_ascii=False))


def _json_lines(record: Any) -> Iterator[str]:
    for line in json.dumps(record, indent=2, ensure_ascii=False).split("\n"):
        yield f"    {printable(line)}"
