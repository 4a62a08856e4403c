r"""sd-scripts' caption grammar: what its `enable_wildcard` makes of a caption, and how to write text that survives it.

With `enable_wildcard`, `process_caption` (library/train_util.py) draws one line of the caption at random, then replaces
each `{a|b}` of that line by one option, after hiding doubled braces behind stand-ins. This module is the only home of
that grammar. It knows nothing of records, tags or files.
"""

import re
from fractions import Fraction
from itertools import product

_GROUP = re.compile(r"\{([^}]+)\}")
# The grammar hides "{{" behind U+2985 and "}}" behind U+2986, each repeated until it does not occur in the line.
_OPEN, _CLOSE = "\u2985", "\u2986"
_FUSES_OPEN, _FUSES_CLOSE = re.compile(_OPEN + r"(?=\{\{)"), re.compile(_CLOSE + r"(?=\}\})")

MOST_OUTCOMES = 4096


class TooManyOutcomesError(ValueError):
    """A caption whose wildcards multiply to more than `MOST_OUTCOMES` texts."""


def has_brace(text: str) -> bool:
    """Whether `text` holds a brace, the only character that the grammar reads inside a line."""
    return "{" in text or "}" in text


def escape(text: str) -> str:
    """`text` with its braces doubled, so that the grammar gives back `text` itself.

    >>> escape("a {b|c}")
    'a {{b|c}}'

    U+2985 right before an opening brace and U+2986 right before a closing one get a space between: the stand-in for
    the doubled brace would swap places with them (measured on the real code: the only failures among 9,330 strings).
    """
    if not has_brace(text):
        return text
    return space_stand_ins(text.replace("{", "{{").replace("}", "}}"))


def space_stand_ins(line: str) -> str:
    """A written `line` with a space between a stand-in character and the doubled brace right behind it."""
    if _OPEN in line or _CLOSE in line:
        line = _FUSES_CLOSE.sub(_CLOSE + " ", _FUSES_OPEN.sub(_OPEN + " ", line))
    return line


def outcomes(caption: str) -> dict[str, Fraction]:
    r"""Every text that sd-scripts can train on for `caption`, with its probability; they sum to 1.

    >>> outcomes("a\nb\nb") == {"a": Fraction(1, 3), "b": Fraction(2, 3)}
    True

    Raises `TooManyOutcomesError` when the wildcards of a line multiply past `MOST_OUTCOMES`.
    Source: `process_caption` with `enable_wildcard` on and all else off, sd-scripts since f4a4c11c (2024-03-23).
    """
    lines = caption.split("\n")
    found: dict[str, Fraction] = {}
    for line in lines:
        for text, probability in line_outcomes(line).items():
            found[text] = found.get(text, Fraction(0)) + probability / len(lines)
    return found


def line_outcomes(line: str) -> dict[str, Fraction]:
    """Every text that one `line` can become through its brace groups, with its probability."""
    if not has_brace(line):
        return {line: Fraction(1)}
    choices, hidden_open, hidden_close = _choices(line)
    count = 1
    for options in choices:
        count *= len(options)
    if count > MOST_OUTCOMES:
        raise TooManyOutcomesError(f"the wildcards of one line give {count} texts, at most {MOST_OUTCOMES} are listed")
    found: dict[str, Fraction] = {}
    for drawn in product(*choices):
        text = "".join(drawn).replace(hidden_open, "{").replace(hidden_close, "}")
        found[text] = found.get(text, Fraction(0)) + Fraction(1, count)
    return found


def line_extremes(line: str) -> tuple[str, str]:
    """The outcome of `line` with the longest option of every brace group, and the one with the shortest, in characters.

    >>> line_extremes("a {b|cc}")
    ('a cc', 'a b')
    """
    choices, hidden_open, hidden_close = _choices(line)
    longest, shortest = ("".join(pick(options, key=len) for options in choices) for pick in (max, min))
    return (
        longest.replace(hidden_open, "{").replace(hidden_close, "}"),
        shortest.replace(hidden_open, "{").replace(hidden_close, "}"),
    )


def _choices(line: str) -> tuple[list[list[str]], str, str]:
    """The parts of a line in their order, each with its options, and what hides "{{" and "}}" in them."""
    hidden_open, hidden_close = _OPEN, _CLOSE
    while hidden_open in line or hidden_close in line:
        hidden_open, hidden_close = hidden_open + _OPEN, hidden_close + _CLOSE
    # split() with one group alternates: literal, options, literal, options, ..., literal.
    parts = _GROUP.split(line.replace("{{", hidden_open).replace("}}", hidden_close))
    return [part.split("|") if i % 2 else [part] for i, part in enumerate(parts)], hidden_open, hidden_close
