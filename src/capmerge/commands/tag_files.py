"""The files of `--drop-tags` and `--replace-tags`: one entry per line, as UTF-8 text."""

import re
from collections.abc import Callable
from pathlib import Path

from capmerge.captions.tag_edits import parse_dropped, parse_replacement
from capmerge.errors import UsageError, printable

_MOST_BYTES = 1 << 24
_LINE_BREAK = re.compile(r"\r\n|\r|\n")


def read_drop_tags(path: Path) -> tuple[str, ...]:
    """Return the tags of a file for `--drop-tags`, one from each line that is not blank.

    Raises `UsageError` for a file that cannot be read, one without tags, and a line that is not
    a single tag.
    """
    return _entries(path, "a tag per line", parse_dropped)


def read_replace_tags(path: Path) -> tuple[str, ...]:
    """Return the lines of a file for `--replace-tags` that are not blank: old tag, tab, new tag.

    Raises `UsageError` as `read_drop_tags` does.
    """
    return _entries(path, "an old tag, a tab and a new tag per line", parse_replacement)


def _entries(path: Path, expected: str, parse: Callable[[str], object]) -> tuple[str, ...]:
    name = printable(str(path))
    found = [
        (number, line)
        for number, line in enumerate(_LINE_BREAK.split(_text(path, name, expected)), start=1)
        if line.strip()
    ]
    if not found:
        raise UsageError(f"{name}: found no line with a tag, expected {expected}.")
    for number, line in found:
        try:
            parse(line)
        except ValueError as error:
            raise UsageError(f"{name}, line {number:,}: {error}") from None
    return tuple(line for _, line in found)


def _text(path: Path, name: str, expected: str) -> str:
    """The text of a file, without a byte order mark."""
    wanted = f"expected a text file with {expected}."
    try:
        if path.exists() and not path.is_file():  # it may never end, or nobody may write to it
            raise UsageError(f"{name}: found a folder, a pipe or a device, {wanted}")
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UsageError(f"{name}: longer than {_MOST_BYTES:,} bytes, {wanted}")
        return content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(f"{name}: {error.strerror}, {wanted}") from None
    except UnicodeDecodeError as error:
        raise UsageError(
            f"{name}, byte {error.start:,}: this is not UTF-8, {wanted} Save it as UTF-8."
        ) from None
    except ValueError as error:  # a path with a NUL
        raise UsageError(f"{name}: {error}, {wanted}") from None
