"""The files of `--keys` and `--exclude`: lists of keys in any of three forms.

A name that ends in .json is a metadata file, whose keys count. In a .jsonl file each line is a key
as a JSON string, or an object with a `key` or an `image_path`: metadata, or a list that another
command wrote. Any other file is UTF-8 text with one key per line. Each may be a .gz file.
"""

import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from capmerge.errors import DataError
from capmerge.files.source import Source, open_source
from capmerge.metadata.blocks import MAX_RECORD_BYTES, read_layout
from capmerge.metadata.key_bytes import key_bytes
from capmerge.metadata.pieces import iter_pairs
from capmerge.metadata.scan import IMAGE_PATH

_READ_BYTES = 1 << 20
_MARK = b"\xef\xbb\xbf"


def iter_listed_keys(path: Path) -> Iterator[bytes]:
    """Yield the bytes of every key in a file.

    Raises `UsageError` if it cannot be opened, and `DataError` for a line that is not as expected.
    """
    ending = [suffix.lower() for suffix in path.suffixes if suffix.lower() != ".gz"][-1:]
    with open_source(str(path)) as source:
        if ending == [".json"]:
            layout = read_layout(source, MAX_RECORD_BYTES, may_be_empty=True)
            for _, _, (key, _) in iter_pairs(source, layout):
                yield key_bytes(key)
            return
        read = _key_in_json if ending == [".jsonl"] else _key_in_text
        for start, line in _iter_lines(source):
            if line.strip(b" \t\r"):
                yield read(source.name, start, line)


def _iter_lines(source: Source) -> Iterator[tuple[int, bytes]]:
    """Yield the offset and the bytes of each line, without what ends it."""
    place = len(_MARK) if source.window(0, len(_MARK)) == _MARK else 0
    rest = b""
    while data := source.window(place + len(rest), _READ_BYTES):
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            yield place, line.removesuffix(b"\r")
            place += len(line) + 1
        source.release(place)
        if len(rest) > MAX_RECORD_BYTES:
            problem = f"found a line of more than {MAX_RECORD_BYTES:,} bytes, expected a key."
            raise DataError(source.name, place, None, problem, "Give one key per line.")
    if rest:
        yield place, rest.removesuffix(b"\r")


def _key_in_text(name: str, start: int, line: bytes) -> bytes:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        problem = f"found the byte 0x{line[error.start]:02x}, expected UTF-8 with a key per line."
        raise DataError(name, start + error.start, None, problem, "Save it as UTF-8.") from None
    return line


def _key_in_json(name: str, start: int, line: bytes) -> bytes:
    key: Any = None
    with suppress(ValueError, RecursionError):
        key = json.loads(line)
    if isinstance(key, dict):
        key = key.get("key", key.get(IMAGE_PATH))
    if not isinstance(key, str):
        problem = (
            "the line holds no key, expected a JSON string, or an object with a string "
            f'"key" or "{IMAGE_PATH}".'
        )
        raise DataError(name, start, None, problem, "Mend the line.")
    return key_bytes(key)
