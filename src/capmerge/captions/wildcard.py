r"""The caption grammar of sd-scripts' `enable_wildcard`, and how to write text that survives it.

With `enable_wildcard`, `process_caption` (library/train_util.py) draws one line of the caption at
random, then replaces each `{a|b}` of that line by one option, after hiding doubled braces behind
stand-ins. This module is the only home of that grammar; `draw` draws by it. It knows nothing of
records, tags or files.
"""

import re
from collections.abc import Iterable, Sequence
from fractions import Fraction
from itertools import chain, pairwise, product
from math import prod
from typing import NamedTuple

_GROUP = re.compile(r"\{([^}]+)\}")
_UNBREAKABLE = re.compile(r"\{\{|\}\}|\{(?:\}\}|[^}])++\}")
_DOUBLED = re.compile(r"\{\{|\}\}")
# The grammar hides "{{" behind U+2985 and "}}" behind U+2986, each repeated until it does not occur
# in the line.
_OPEN, _CLOSE = "\u2985", "\u2986"
_STAND_INS = re.compile(f"{_OPEN}+|{_CLOSE}+")
_FUSES_OPEN, _FUSES_CLOSE = re.compile(_OPEN + r"(?=\{\{)"), re.compile(_CLOSE + r"(?=\}\})")

MOST_OUTCOMES = 4096
_MOST_LETTERS = 1 << 24  # in all outcomes of a line together


class TooManyOutcomesError(ValueError):
    """Raised for a caption whose wildcards multiply to more than `MOST_OUTCOMES` texts.

    It is also raised for fewer texts that are so long that they would fill the memory.
    """


def has_brace(text: str) -> bool:
    """Return whether `text` holds a brace: without one the grammar leaves a line as it is."""
    return "{" in text or "}" in text


def has_stand_in(text: str) -> bool:
    """Whether `text` holds a character that the grammar hides doubled braces behind."""
    return _OPEN in text or _CLOSE in text


def escape(text: str) -> str:
    """Return `text` with its braces doubled, so that the grammar gives back `text` itself.

    >>> escape("a {b|c}")
    'a {{b|c}}'

    A space goes between U+2985 and an opening brace right after it, and between U+2986 and a
    closing one: the stand-in for the doubled brace would swap places with them (measured on the
    real code: the only failures among 9,330 strings).
    """
    if not has_brace(text):
        return text
    return space_stand_ins(text.replace("{", "{{").replace("}", "}}"))


def space_stand_ins(line: str) -> str:
    """Return `line` with a space between a stand-in and the doubled brace right after it."""
    if has_stand_in(line):
        line = _FUSES_CLOSE.sub(_CLOSE + " ", _FUSES_OPEN.sub(_OPEN + " ", line))
    return line


def space_groups(line: str) -> tuple[str, list[int]]:
    """Return a written `line` with a space where drawing could join stand-ins, and where it went.

    A group vanishes when one of its options is drawn, so that its neighbours and the option touch.
    In `{x|y}` with U+2986 as the last character of `y` and another U+2986 after the group, the two
    meet, and the grammar takes them for a hidden brace. The list holds the indexes in `line` before
    which a space was put. A line without these characters is returned as it is.
    """
    if not has_stand_in(line):
        return line, []
    spaces: list[int] = []
    for stand_in, brace in ((_OPEN, "{{"), (_CLOSE, "}}")):
        starts = (stand_in, brace)  # behind a stand-in, a hidden brace would swap places with it
        may_end_so, done = False, 0  # whether what is drawn up to `done` may end with the stand-in
        for start, end in [*_group_spans(line), (len(line), len(line))]:
            if start > done:  # literal text
                if may_end_so and line.startswith(starts, done):
                    spaces.append(done)
                may_end_so = line[start - 1] == stand_in
            options = line[start + 1 : end - 1].split("|") if end > start else [""]
            if may_end_so and any(option.startswith(starts) for option in options):
                spaces.append(start)
                may_end_so = False
            may_end_so = (may_end_so and "" in options) or any(
                option.endswith(stand_in) for option in options
            )
            done = end
    spaces = sorted(set(spaces))
    parts = [line[start:end] for start, end in pairwise([0, *spaces, len(line)])]
    return " ".join(parts), spaces


def _group_spans(line: str) -> list[tuple[int, int]]:
    """Return [start, end) of each `{a|b}` in `line`."""
    return [m.span() for m in _unbreakable(line) if m[0] not in {"{{", "}}"}]


def outcomes(caption: str) -> dict[str, Fraction]:
    r"""Return every text that sd-scripts can train for `caption`, with its probability.

    >>> outcomes("a\nb\nb") == {"a": Fraction(1, 3), "b": Fraction(2, 3)}
    True

    The probabilities sum to 1. Raises `TooManyOutcomesError` when the wildcards of a line multiply
    past `MOST_OUTCOMES`.
    Source: `process_caption` with `enable_wildcard` on and all else off, sd-scripts since f4a4c11c
    (2024-03-23).
    """
    lines = caption.split("\n")
    found: dict[str, Fraction] = {}
    for line in lines:
        for text, probability in line_outcomes(line).items():
            found[text] = found.get(text, Fraction(0)) + probability / len(lines)
    return found


def only_outcome(line: str) -> str | None:
    """Return the text that one `line` always becomes; None if there are groups to draw from.

    >>> only_outcome("a {{b|c}}")
    'a {b|c}'
    """
    if not has_brace(line):
        return line
    parsed = parse_line(line)
    return None if parsed.groups else parsed.text(())


def line_outcomes(line: str) -> dict[str, Fraction]:
    """Return every text that one `line` can become through its groups, with its probability."""
    if not has_brace(line):
        return {line: Fraction(1)}
    parsed = parse_line(line)
    count = parsed.ways
    if not parsed.is_listable():
        raise TooManyOutcomesError(
            f"the wildcards of one line give {count} texts, at most {MOST_OUTCOMES} are listed"
        )
    found: dict[str, Fraction] = {}
    for drawn in product(*(range(len(options)) for options in parsed.groups)):
        text = parsed.text(drawn)
        found[text] = found.get(text, Fraction(0)) + Fraction(1, count)
    return found


class ParsedLine(NamedTuple):
    """A line as the grammar reads it: literal, group, literal, group, ..., literal."""

    literals: list[str]
    groups: list[list[str]]
    """The options of each `{a|b}`."""
    hidden: tuple[str, str]
    """The stand-ins for the doubled opening and closing brace in literals and options."""

    @property
    def ways(self) -> int:
        """The number of ways to draw one option from each group."""
        return prod(map(len, self.groups))

    def is_listable(self) -> bool:
        """Return whether the texts are at most `MOST_OUTCOMES` and fit into memory."""
        letters = sum(map(len, self.literals)) + sum(
            max(map(len, options)) for options in self.groups
        )
        return self.ways <= MOST_OUTCOMES and self.ways * letters <= _MOST_LETTERS

    def text(self, drawn: Sequence[int]) -> str:
        """Return the text with the option of each group that `drawn` numbers, braces unescaped."""
        pieces = [self.literals[0]]
        for options, number, literal in zip(self.groups, drawn, self.literals[1:], strict=True):
            pieces += options[number], literal
        # Unescaped only after joining: a stand-in may fuse with its neighbour across the seam, and
        # the real code would read it so.
        return self._shown("".join(pieces))

    def option(self, group: int, number: int) -> str:
        """Return one option of a group by itself, braces unescaped."""
        return self._shown(self.groups[group][number])

    def _shown(self, text: str) -> str:
        return text.replace(self.hidden[0], "{").replace(self.hidden[1], "}")


def parse_line(line: str) -> ParsedLine:
    """Return the literals and groups of one `line`."""
    if not has_brace(line):
        return ParsedLine([line], [], ("{", "}"))
    hidden_open, hidden_close = _OPEN, _CLOSE
    if has_stand_in(line):
        longest = max(len(run[0]) for run in _STAND_INS.finditer(line))
        hidden_open, hidden_close = _OPEN * (longest + 1), _CLOSE * (longest + 1)
    line = line.replace("{{", hidden_open).replace("}}", hidden_close)
    # split() with one group alternates: literal, options, literal, options, ..., literal. It sees
    # no opening brace behind the last closing one, from where it would read to the end of the line.
    end = line.rfind("}") + 1
    parts = _GROUP.split(line[:end])
    parts[-1] += line[end:]
    return ParsedLine(
        parts[::2], [options.split("|") for options in parts[1::2]], (hidden_open, hidden_close)
    )


def unbreakable_spans(line: str) -> list[tuple[int, int]]:
    """Return the [start, end) of each doubled brace and of each `{a|b}` in `line`.

    A text cut inside one of them would read differently.
    """
    return [match.span() for match in _unbreakable(line)]


def _unbreakable(line: str) -> Iterable[re.Match[str]]:
    """Return each doubled brace and each `{a|b}` in `line`, in order."""
    # Behind the last single closing brace no group can end. The search for one would read from each
    # opening brace to the end of the line.
    end = line.replace("}}", "__").rfind("}") + 1
    within = _UNBREAKABLE.finditer(line, 0, end)
    return within if end == len(line) else chain(within, _DOUBLED.finditer(line, end))
