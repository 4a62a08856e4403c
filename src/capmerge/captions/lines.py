"""The lines of a record: how a draw becomes text that sd-scripts reads back as it was meant.

`LineWriter` puts the texts of a draw between the fixed texts of its template, doubles braces, and
keeps them from fusing with their neighbours.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from capmerge.captions.line_template import Template
from capmerge.captions.templates import Draw, MergeOptions
from capmerge.captions.wildcard import (
    TooManyOutcomesError,
    escape,
    has_brace,
    has_stand_in,
    outcomes,
    space_groups,
    space_stand_ins,
)

_MOST_KNOWN = 256


@dataclass(frozen=True, slots=True)
class Alternative:
    """One alternative that can be drawn for a record."""

    line: str
    """The line as written, with braces doubled."""
    text: str
    """The text meant to be trained: nothing doubled, no spaces that `wildcard.escape` adds."""
    style: str
    """The letter of the line in the mark: `t`, `c` or `b`."""
    tag_span: tuple[int, int] | None
    """The [start, end) of the tags in `line`, for style `b`; else None."""
    share: Fraction
    """Its share of the probability; the shares of a record sum to 1."""


class Tail(NamedTuple):
    """The one field of a line which ends with that field, so that a cut of it cuts the line."""

    start: int
    """The number of characters before the field."""
    commas_from: int
    """The bytes before the first comma of tags that a cut may be at; -1 for a caption."""


class LineWriter:
    """Writes the lines of draws under one set of options."""

    def __init__(self, options: MergeOptions) -> None:
        self._options = options
        self._literals: dict[Template, list[str]] = {}
        self._by_identity: dict[int, tuple[Template, list[str]]] = {}

    def literals(self, template: Template) -> list[str]:
        """Return the texts before, between and after the fields of a line.

        Fields are stripped and not blank, so stripping the line affects only its first and last
        literal.
        """
        texts = list(template.literals)
        if "tags" in template.fields:
            texts[template.fields.index("tags")] += self._options.tags_prefix
        texts[0] = self._options.prefix + texts[0]
        texts[-1] += self._options.suffix
        return [texts[0].lstrip(), *texts[1:-1], texts[-1].rstrip()]

    def tail(self, template: Template) -> Tail | None:
        """Return the only field of a template whose lines end with it; None for another one."""
        before, *others = self._literals_of(template)
        if len(template.fields) > 1 or others != [""]:
            return None
        # A cut leaves at least one byte of the tags.
        least = len(before.encode("utf-8", "surrogatepass")) + 1
        return Tail(len(before), least if template.fields == ("tags",) else -1)

    def line(self, draw: Draw) -> str:
        """Return the line of one draw, as written."""
        literals, fields = self._literals_of(draw.template), draw.template.fields
        line = f"{literals[0]}{draw.value(fields[0])}{literals[1]}"
        for number in range(1, len(fields)):
            line += draw.value(fields[number]) + literals[number + 1]
        # Without a brace there is nothing to escape.
        return self.fill(draw).line if has_brace(line) else line

    def _literals_of(self, template: Template) -> list[str]:
        """Return `literals`, computed once per template."""
        # Nearly all draws share a few templates, which are known again without computing a hash of
        # their texts. They are held here, so that no other object gets the identity of one.
        known = self._by_identity.get(id(template))
        if known is None:
            found = self._literals.get(template)
            if found is None:
                found = self._literals[template] = self.literals(template)
            if len(self._by_identity) >= _MOST_KNOWN:
                self._by_identity.clear()
            known = self._by_identity[id(template)] = template, found
        return known[1]

    def fill(self, draw: Draw) -> Alternative:
        """Return the alternative of one draw."""
        template = draw.template
        first, *others = self._literals_of(template)
        line, text, start, end = escape(first), first, 0, 0
        for field, literal in zip(template.fields, others, strict=True):
            value = draw.value(field)
            written = (
                space_stand_ins(value)
                if field == "caption" and self._options.caption_wildcards
                else escape(value)
            )
            line += _seam(line, written)
            start, end = (len(line), len(line) + len(written)) if field == "tags" else (start, end)
            line += written
            line += _seam(line, escape(literal)) + escape(literal)
            text += value + literal
        if self._options.caption_wildcards:
            line, spaces = space_groups(line)
            start += sum(space <= start for space in spaces)
            end += sum(space < end for space in spaces)
        return Alternative(
            line, text, template.style, (start, end) if template.style == "b" else None, draw.share
        )

    def wildcard(self, repeated: Sequence[Alternative]) -> str | None:
        """Return some alternatives as one in-line wildcard; None where it would read otherwise."""
        wildcard = "{" + "|".join(alternative.line for alternative in repeated) + "}"
        return wildcard if self._reads_as_meant(wildcard, repeated) else None

    def _reads_as_meant(self, wildcard: str, repeated: Sequence[Alternative]) -> bool:
        """Return whether the grammar reads the in-line `wildcard` as these alternatives.

        The grammar itself decides, because braces of neighbours may fuse.
        """
        if any("|" in alternative.line for alternative in repeated):
            return False
        if self._options.caption_wildcards and any(
            alternative.style != "t" and has_brace(alternative.text) for alternative in repeated
        ):
            return False
        if not any(has_brace(alternative.line) for alternative in repeated):
            return True
        # Doubled braces can only fuse with the outer ones, or with stand-ins.
        inside = wildcard[1:-1]
        if not (has_stand_in(inside) or inside.startswith("{") or inside.endswith("}")):
            return True
        try:
            return outcomes(wildcard) == outcomes(
                "\n".join(alternative.line for alternative in repeated)
            )
        except TooManyOutcomesError:
            return False


def _seam(line: str, written: str) -> str:
    """Return a space where the grammar would read a brace across the seam, else "".

    The seam is that between `line` and the text `written` after it.
    """
    if written.startswith("{{"):
        return " " if line.rstrip("{").endswith("\u2985") else ""
    if written.startswith("}}"):
        closing = len(line) - len(line.rstrip("}"))
        return " " if closing % 2 or line.endswith("\u2986") else ""
    return ""
