"""Small text files, decoded by the first encoding that fits."""

import codecs
import os
from io import FileIO
from pathlib import Path
from typing import NamedTuple

from capmerge.errors import DataError, UsageError, in_words, quoted

MOST_BYTES = 16 << 20
"""The longest text that is read; a longer file is hardly one."""
_SKIP = "Use --on-error skip to leave such texts out and list them."


class Text(NamedTuple):
    """What was read of a text file."""

    text: str
    encoding: str
    has_mark: bool
    """True if the file began with a byte order mark of UTF-8."""


def check_encodings(names: tuple[str, ...]) -> None:
    """Raise `UsageError` for an encoding of text that Python does not know."""
    for name in names:
        try:
            " ".encode(name)
        except (LookupError, ValueError) as error:
            raise UsageError(
                f"--encoding {quoted(name)}: Python knows no such encoding of texts. "
                "Common ones are utf-8, utf-16, cp932, cp1252 and gb18030."
            ) from error


def read_text(path: Path, encodings: tuple[str, ...]) -> Text:
    """The text of a file as Python's text mode reads it, without white space at both ends.

    The first of the encodings that fits is taken, and a byte order mark is dropped. Raises
    `DataError` where the file cannot be read, is too long, or fits none of the encodings; then the
    place is that at which the first one fails.
    """
    try:
        with FileIO(path) as file:
            size = os.fstat(file.fileno()).st_size
            data = file.readall() if size <= MOST_BYTES else b""
    except OSError as error:
        problem = f"the text cannot be read ({in_words(error)})."
        raise DataError(str(path), None, None, problem, _SKIP) from error
    if size > MOST_BYTES:
        problem = f"found {size:,} bytes, expected a text of at most {MOST_BYTES:,}."
        raise DataError(str(path), None, None, problem, _SKIP)
    place: int | None = None  # where the first encoding fails
    for encoding in encodings:
        try:
            text = data.decode(encoding)
        except UnicodeDecodeError as error:
            place = error.start if place is None else place
            continue
        except UnicodeError:  # a few encodings tell no place
            continue
        text = text.replace("\r\n", "\n").replace("\r", "\n").removeprefix("\ufeff")
        return Text(text.strip(), encoding, data.startswith(codecs.BOM_UTF8))
    found = "bytes that are no text" if place is None else f"the byte 0x{data[place]:02x}"
    tried = " or ".join(encodings)
    raise DataError(
        str(path),
        place,
        None,
        f"found {found}, expected text in {tried}.",
        f"Name its encoding too, as in --encoding utf-8 --encoding cp932. {_SKIP}",
    )
