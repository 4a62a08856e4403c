"""Scans one record in a JSON text and tells where it ends, or what is wrong with it.

The scanner is Python's own, so nothing is lost. This module works on texts alone: it knows neither
files nor blocks, and its offsets count characters.
"""

import re
from json import JSONDecodeError, JSONDecoder
from typing import Any

from capmerge.errors import quoted

IMAGE_PATH = "image_path"
"""The field of a JSONL record that holds its key."""
DECODE = JSONDecoder().raw_decode

MAX_NESTING = 900
"""The number of objects and lists inside each other that a record may have, itself included.

Python's json reads some 960, fewer where more calls are under way. A limit of its own makes every
command, in any process, refuse the same records."""

# A parser that runs out of text complains at most this far before the end of the text.
_UNFINISHED_CHARS = 16
_SPACE = re.compile(r"[ \t\n\r]*")


class UnfinishedError(Exception):
    """The window ends inside a record."""

    def __init__(self, key: str | None) -> None:
        self.key = key


class InvalidError(Exception):
    """The text is not valid JSON at `place`."""

    def __init__(self, place: int, key: str | None, problem: str, next_step: str) -> None:
        self.place, self.key, self.problem, self.next_step = place, key, problem, next_step


_LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_FIX = "Fix the file there, or write it again from its source."
_JSONL = (
    f'If this is JSONL, every line needs an "{IMAGE_PATH}" string. Otherwise fix the file there.'
)
_CUT_OFF = "It was probably cut off while being written or copied: write or copy it again."


def nests_too_deep(value: Any) -> bool:
    """True when there are more than `MAX_NESTING` objects and lists inside each other."""
    level = [value] if isinstance(value, (dict, list)) else []
    for _ in range(MAX_NESTING):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, (dict, list))
        ]
        if not level:
            return False
    return True


def scan_member(
    text: str, place: int, *, at_end: bool, first: bool
) -> tuple[str | None, int, int, bool]:
    """One `"key": value` of the top-level object, which starts at `place`.

    Returns the key, the offset where the value ends, the offset of the next member, and whether the
    object ends there. The key is None for an empty object, whose first member is its closing brace.

    Raises `UnfinishedError` when the text ends inside the member and `at_end` is false, and
    `InvalidError` when the text is not valid JSON.
    """
    key: str | None = None

    # Read the key, the colon and the value. Only an empty object has none of them.
    if text[place : place + 1] == "}" and first:
        end = place
    else:
        if text[place : place + 1] != '"':
            trailing = text[place : place + 1] == "}"
            problem = "found } after a comma" if trailing else f"found {_found(text, place)}"
            problem += ", expected the quoted key of a record."
            raise _missing(text, place, None, problem, at_end=at_end)
        key, place = _scan_value(text, place, None, at_end=at_end)
        place = _skip(text, place)
        if text[place : place + 1] != ":":
            problem = f"found {_found(text, place)}, expected a colon after the key."
            raise _missing(text, place, key, problem, at_end=at_end)
        _, end = _scan_value(text, _skip(text, place + 1), key, at_end=at_end)
        place = _skip(text, end)

    # A comma leads to the next member, a closing brace to the end of the file.
    match text[place : place + 1]:
        case ",":
            next_place = _skip(text, place + 1)
            if next_place == len(text) and not at_end:
                raise UnfinishedError(key)  # the white space may go on
            return key, end, next_place, False
        case "}":
            beyond = _skip(text, place + 1)
            if beyond < len(text):
                problem = (
                    f"found {_found(text, beyond)} after the end of the top-level object, "
                    "expected the end of the file."
                )
                raise InvalidError(beyond, None, problem, _JSONL if text[beyond] == "{" else _FIX)
            if not at_end:
                raise UnfinishedError(key)
            return key, end, beyond, True
        case _:
            problem = f"found {_found(text, place)}, expected a comma or }} after the record."
            raise _missing(text, place, key, problem, at_end=at_end)


def scan_line(text: str, place: int, *, at_end: bool) -> tuple[str | None, int, int, bool]:
    """One line of JSONL, which starts at `place`.

    Returns its key, the offset where it ends, the offset of the next line, and whether it is the
    last. The key is None for a blank line and for a value that is not an object with a key.

    Raises as `scan_member`.
    """
    end = text.find("\n", place)
    last = end < 0
    if last and not at_end:
        raise UnfinishedError(None)
    line = text[place:] if last else text[place:end]
    key = None
    if line.strip(" \t\r"):
        begin = _skip(line, 0)
        try:
            value, after = _scan_value(line, begin, None, at_end=True)
        except InvalidError as error:
            if error.place == len(line) and not last:
                problem = "the line ends inside a record, expected one object per line."
                raise InvalidError(place + len(line), None, problem, _FIX) from None
            raise InvalidError(place + error.place, None, error.problem, error.next_step) from None
        beyond = _skip(line, after)
        if beyond < len(line):
            problem = f"found {_found(line, beyond)} after a value, expected one object per line."
            raise InvalidError(place + beyond, None, problem, _FIX)
        key = value.get(IMAGE_PATH) if isinstance(value, dict) else None
    return (key, len(text), len(text), True) if last else (key, end, end + 1, False)


def _scan_value(text: str, place: int, key: str | None, *, at_end: bool) -> tuple[Any, int]:
    """The JSON value at `place`, and the offset where it ends.

    Raises as `scan_member`.
    """
    too_deep = "the record is nested deeper than a JSON parser can follow."
    try:
        value, end = DECODE(text, place)
    except JSONDecodeError as error:
        # Python reports a text that ends too early like any other mistake. So a complaint near the
        # end of a window means to read on, and one at the end of the file that it was cut off.
        unterminated = error.msg.startswith("Unterminated string")
        ended = unterminated or error.pos >= len(text) - _UNFINISHED_CHARS
        rest = text[error.pos :]
        cut = ("escape" in error.msg and '"' not in rest) or any(
            literal.startswith(rest) for literal in _LITERALS
        )
        if ended and not at_end:
            raise UnfinishedError(key) from None
        if ended and (error.pos >= len(text) or unterminated or cut):
            raise InvalidError(len(text), key, "the file ends inside a record.", _CUT_OFF) from None
        found = _found(text, error.pos)
        if error.msg.startswith("Invalid control character"):
            problem = f"found {found} inside a string, expected the closing quote before it."
        else:
            problem = f"found {found}: {error.msg[0].lower()}{error.msg[1:]}."
        raise InvalidError(error.pos, key, problem, _FIX) from None
    except RecursionError:
        raise InvalidError(place, key, too_deep, _FIX) from None
    except ValueError as error:  # an integer with more digits than Python converts
        problem = f"found a number that Python's json cannot read ({error})."
        raise InvalidError(place, key, problem, _FIX) from None
    opened = text.count("{", place, end) + text.count("[", place, end)
    if opened > MAX_NESTING and nests_too_deep(value):
        raise InvalidError(place, key, too_deep, _FIX)
    return value, end


def _missing(
    text: str, place: int, key: str | None, problem: str, *, at_end: bool
) -> UnfinishedError | InvalidError:
    """The error for a character at `place` that is not the expected one.

    `place` may also be the end of the window or of the file.
    """
    # A number before `place` may go on after the window, so its last characters prove nothing.
    if not at_end and place >= len(text) - _UNFINISHED_CHARS:
        return UnfinishedError(key)
    if place < len(text):
        return InvalidError(place, key, problem, _FIX)
    problem = "the file ends before its top-level object does, expected a closing }."
    return InvalidError(place, key, problem, _CUT_OFF)


def _skip(text: str, place: int) -> int:
    """The offset of the first character at or after `place` that is not JSON white space."""
    match = _SPACE.match(text, place)
    return match.end() if match else place


def _found(text: str, place: int) -> str:
    """The character at `place`, as an error message shows it."""
    return quoted(text[place]) if place < len(text) else "the end of the file"
