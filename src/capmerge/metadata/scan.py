"""One record at a place of a JSON text: where it ends, or what is wrong there. By Python's own scanner, so nothing is lost.

Knows texts alone: neither files nor blocks, and offsets only in characters.
"""

import re
from json import JSONDecodeError, JSONDecoder
from typing import Any

from capmerge.errors import quoted

IMAGE_PATH = "image_path"
"""The field of a JSONL record that holds its key."""
DECODE = JSONDecoder().raw_decode

_UNFINISHED_CHARS = 16  # a parser that ran out of text complains at most this far before its end
_SPACE = re.compile(r"[ \t\n\r]*")


class UnfinishedError(Exception):
    """The window ends inside a record."""

    def __init__(self, key: str | None) -> None:
        self.key = key


class InvalidError(Exception):
    """The text is no JSON at `place`."""

    def __init__(self, place: int, key: str | None, problem: str, next_step: str) -> None:
        self.place, self.key, self.problem, self.next_step = place, key, problem, next_step


_LITERALS = ("true", "false", "null", "NaN", "Infinity", "-Infinity")
_MEND = "Mend the file there, or write it again from its source."
_JSONL = (
    f'If this is JSONL, each of its lines needs an "{IMAGE_PATH}" string. Else mend the file there.'
)
_CUT_OFF = "It was probably cut off while being written or copied: write or copy it again."


def scan_member(
    text: str, place: int, *, at_end: bool, first: bool
) -> tuple[str | None, int, int, bool]:
    """One `"key": value` of the top-level object: key, its end, the next one's place, whether the object ends there."""
    key: str | None = None
    if text[place : place + 1] == "}" and first:
        end = place
    else:
        if text[place : place + 1] != '"':
            problem = (
                "found } after a comma"
                if text[place : place + 1] == "}"
                else f"found {_found(text, place)}"
            )
            raise _missing(
                text, place, None, f"{problem}, expected the quoted key of a record.", at_end=at_end
            )
        key, place = _scan_value(text, place, None, at_end=at_end)
        place = _skip(text, place)
        if text[place : place + 1] != ":":
            raise _missing(
                text,
                place,
                key,
                f"found {_found(text, place)}, expected a colon after the key.",
                at_end=at_end,
            )
        _, end = _scan_value(text, _skip(text, place + 1), key, at_end=at_end)
        place = _skip(text, end)
    match text[place : place + 1]:
        case ",":
            next_place = _skip(text, place + 1)
            if next_place == len(text) and not at_end:
                raise UnfinishedError(key)  # the white space may go on
            return key, end, next_place, False
        case "}":
            beyond = _skip(text, place + 1)
            if beyond < len(text):
                problem = f"found {_found(text, beyond)} after the end of the top-level object, expected the end of the file."
                raise InvalidError(beyond, None, problem, _JSONL if text[beyond] == "{" else _MEND)
            if not at_end:
                raise UnfinishedError(key)
            return key, end, beyond, True
        case _:
            raise _missing(
                text,
                place,
                key,
                f"found {_found(text, place)}, expected a comma or }} after the record.",
                at_end=at_end,
            )


def scan_line(text: str, place: int, *, at_end: bool) -> tuple[str | None, int, int, bool]:
    """One line of JSONL: key, its end, the next one's place, whether it is the last."""
    end = text.find("\n", place)
    last = end < 0
    if last and not at_end:
        raise UnfinishedError(None)
    line = text[place:] if last else text[place:end]
    key = None
    if line.strip(" \t\r"):
        begin = _skip(line, 0)
        try:
            value, behind = _scan_value(line, begin, None, at_end=True)
        except InvalidError as error:
            if error.place == len(line) and not last:
                raise InvalidError(
                    place + len(line),
                    None,
                    "the line ends inside a record, expected one object a line.",
                    _MEND,
                ) from None
            raise InvalidError(place + error.place, None, error.problem, error.next_step) from None
        if _skip(line, behind) < len(line):
            problem = f"found {_found(line, _skip(line, behind))} behind a value, expected one object a line."
            raise InvalidError(place + _skip(line, behind), None, problem, _MEND)
        key = value.get(IMAGE_PATH) if isinstance(value, dict) else None
    return (key, len(text), len(text), True) if last else (key, end, end + 1, False)


def _scan_value(text: str, place: int, key: str | None, *, at_end: bool) -> tuple[Any, int]:
    """The JSON value at `place` and its end."""
    try:
        return DECODE(text, place)
    except JSONDecodeError as error:
        ended = error.pos >= len(text) - _UNFINISHED_CHARS or error.msg.startswith(
            "Unterminated string"
        )
        rest = text[error.pos :]
        cut = ("escape" in error.msg and '"' not in rest) or any(
            literal.startswith(rest) for literal in _LITERALS
        )
        if ended and not at_end:
            raise UnfinishedError(key) from None
        if ended and (error.pos >= len(text) or error.msg.startswith("Unterminated string") or cut):
            raise InvalidError(len(text), key, "the file ends inside a record.", _CUT_OFF) from None
        if error.msg.startswith("Invalid control character"):
            problem = f"found {_found(text, error.pos)} inside a string, expected its closing quote before."
        else:
            problem = f"found {_found(text, error.pos)}: {error.msg[0].lower()}{error.msg[1:]}."
        raise InvalidError(error.pos, key, problem, _MEND) from None
    except RecursionError:
        raise InvalidError(
            place, key, "the record is nested deeper than a JSON parser follows.", _MEND
        ) from None
    except ValueError as error:  # an integer of more digits than Python converts
        raise InvalidError(
            place, key, f"found a number that Python's json does not read ({error}).", _MEND
        ) from None


def _missing(
    text: str, place: int, key: str | None, problem: str, *, at_end: bool
) -> UnfinishedError | InvalidError:
    """The error for something other than expected at `place`, which may be the end of the window or of the file."""
    if (
        not at_end and place >= len(text) - _UNFINISHED_CHARS
    ):  # a number in front of `place` may go on
        return UnfinishedError(key)
    if place < len(text):
        return InvalidError(place, key, problem, _MEND)
    return InvalidError(
        place,
        key,
        "the file ends before its top-level object does, expected a closing }.",
        _CUT_OFF,
    )


def _skip(text: str, place: int) -> int:
    """The place of the first character at or after `place` that is no JSON white space."""
    match = _SPACE.match(text, place)
    return match.end() if match else place


def _found(text: str, place: int) -> str:
    """The character at `place` for a message."""
    return quoted(text[place]) if place < len(text) else "the end of the file"
