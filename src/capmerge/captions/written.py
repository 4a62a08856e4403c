r"""Reading a rewritten record back: its caption, mark, weights and tag spans, checked in one place.

`verify`, `stats`, `index`, `preview` and the trainer read through `read_written`, the reverse of
`merge`. `alternatives` says what can be drawn from the record, and `size` how large its image is.

>>> read_written({"caption": "1girl\nA girl.", "capmerge": "tc"}).lines
['1girl', 'A girl.']
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from capmerge.captions.draw import Drawn
from capmerge.captions.fields import MARK, STYLES, TAG_SPANS, WEIGHTS
from capmerge.captions.wildcard import escape, parse_line
from capmerge.errors import printable

Span = tuple[int, int]
"""A range [start, end) in code points."""
_LETTERS = "".join(STYLES)
_EXCERPT = 120  # characters of a wrong value that a message quotes


class BrokenRecordError(ValueError):
    """Raised when a record's fields are not as a rewrite writes them; the message says how."""


class WrittenRecord(NamedTuple):
    """The fields of a rewritten record, checked to belong together."""

    caption: str
    letters: str
    """The mark: `t`, `c` or `b` for each of `lines`."""
    lines: list[str]
    """The lines of `caption`, or the options of the in-line wildcard that it is; braces doubled."""
    weights: list[int] | None
    """One weight per line of `caption`, as `draw_line` takes them; None when each counts once."""
    spans: Sequence[Span]
    """The range of the tags in each line whose letter is `b`, in that order."""

    @property
    def is_inline(self) -> bool:
        """True when `caption` is one in-line wildcard, whose options have a letter each."""
        return len(self.letters) > 1 and "\n" not in self.caption

    def place_of(self, drawn: Drawn) -> int:
        """Return the position among `lines`, from 0, of what was drawn from `caption`."""
        return drawn.options[0] if self.is_inline else drawn.line

    def span_at(self, place: int) -> Span | None:
        """Return the range of the tags in the line at `place`; None unless its letter is `b`."""
        if self.letters[place] != "b":
            return None
        return self.spans[self.letters[:place].count("b")]


def is_rewritten(record: Any) -> bool:
    """Return whether a rewrite wrote this record, as its mark says."""
    return record.__class__ is dict and MARK in record


def read_written(record: dict[str, Any]) -> WrittenRecord:
    """Return the fields of a rewritten `record`; no lines or letters for an empty caption.

    Raises `BrokenRecordError` when caption, mark, weights and tag spans do not belong together.
    """
    caption, letters = record.get("caption"), record.get(MARK)
    if not isinstance(caption, str) or not isinstance(letters, str):
        raise BrokenRecordError(
            f'expected strings "caption" and "{MARK}", as a rewrite writes them.'
        )
    if not caption and not letters:
        return WrittenRecord("", "", [], None, ())
    lines = caption.split("\n")
    weights = _read_weights(record, len(lines))
    if len(lines) == 1 < len(letters):
        options = _inline_options(caption)
        lines = options if len(options) == len(letters) else lines
    if len(lines) != len(letters):
        raise BrokenRecordError(
            f'found {len(lines)} lines and {len(letters)} letters in "{MARK}", '
            "expected one letter per line."
        )
    if unknown := letters.strip(_LETTERS):
        raise BrokenRecordError(f'found the letter {unknown[0]!r} in "{MARK}", expected t, c or b.')
    return WrittenRecord(caption, letters, lines, weights, read_spans(record, letters.count("b")))


def read_spans(record: dict[str, Any], expected: int) -> Sequence[Span]:
    """Return the tag spans of a record whose mark has `expected` letters `b`.

    Raises `BrokenRecordError` unless there are that many pairs of whole numbers, each with
    0 <= start <= end.
    """
    if not expected:
        return ()
    spans = record.get(TAG_SPANS)
    if isinstance(spans, list) and len(spans) == expected and all(map(_is_span, spans)):
        return [(start, end) for start, end in spans]
    raise BrokenRecordError(
        f'expected "{TAG_SPANS}" to be {expected} pairs [start, end), one for each b of "{MARK}".'
    )


def _read_weights(record: dict[str, Any], expected: int) -> list[int] | None:
    """Return the weights of a record whose caption has `expected` lines; None without weights."""
    weights = record.get(WEIGHTS)
    if weights is None or (
        isinstance(weights, list)
        and len(weights) == expected
        and all(type(weight) is int and weight >= 0 for weight in weights)
        and any(weights)
    ):
        return weights
    raise BrokenRecordError(
        f'"{WEIGHTS}" is {printable(repr(weights)[:_EXCERPT])}, '
        "expected one whole number of 0 or more per line, not all 0."
    )


def _inline_options(caption: str) -> list[str]:
    """Return the options of a caption that is one in-line wildcard, braces doubled; else none."""
    parsed = parse_line(caption)
    if len(parsed.groups) != 1 or any(parsed.literals):
        return []
    return [escape(parsed.option(0, number)) for number in range(len(parsed.groups[0]))]


def _is_span(span: Any) -> bool:
    if not isinstance(span, list) or len(span) != 2:
        return False
    start, end = span
    return type(start) is int and type(end) is int and 0 <= start <= end
