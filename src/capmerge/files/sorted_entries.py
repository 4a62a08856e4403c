"""The entries of a folder in the order of their names, in bounded memory however many they are.

The folder is listed once, and no entry is looked at more closely than the listing does. Names are
sorted a part at a time; more than one part waits on disk to be merged.
"""

import heapq
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from capmerge.errors import UsageError, in_words, printable
from capmerge.files.atomic import ScratchFile

_SORTED_AT_ONCE = 1 << 17
"""How many names are sorted at once. They take some 100 bytes each."""
_READ_BYTES = 1 << 16


class Entry(NamedTuple):
    """A file, or a folder in the folder."""

    name: str
    is_folder: bool


def sorted_entries(
    folder: Path, is_wanted: Callable[[str], bool], *, folders: bool, scratch_beside: Path
) -> Iterator[Entry]:
    """Yield the files whose names are wanted, and with `folders` the folders, by their names.

    A link to a file counts as that file, and a link to a folder as none. Names that are not UTF-8
    hold lone surrogates, as everywhere in Python. Names that have to wait on disk do so beside
    `scratch_beside`. Raises `UsageError` where the folder cannot be listed.
    """
    with ExitStack() as stack:
        runs: list[Iterator[Entry]] = []
        names: list[Entry] = []
        for entry in _listed(folder, is_wanted, folders=folders):
            names.append(entry)
            if len(names) == _SORTED_AT_ONCE:
                runs.append(_spill(sorted(names), stack.enter_context(ScratchFile(scratch_beside))))
                names = []
        yield from heapq.merge(*runs, sorted(names))


def _listed(folder: Path, is_wanted: Callable[[str], bool], *, folders: bool) -> Iterator[Entry]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir(follow_symlinks=False):
                    if folders:
                        yield Entry(entry.name, is_folder=True)
                elif is_wanted(entry.name) and entry.is_file():
                    yield Entry(entry.name, is_folder=False)
    except OSError as error:
        raise UsageError(
            f"{printable(str(folder))}: the folder cannot be listed ({in_words(error)})."
        ) from error


def _spill(names: list[Entry], scratch: ScratchFile) -> Iterator[Entry]:
    """Write names to a file, and return an iterator that reads them again."""
    # No name holds NUL or a slash.
    lines = (os.fsencode(name) + (b"/" if is_folder else b"") for name, is_folder in names)
    scratch.write(b"\0".join(lines) + b"\0")
    return _read_again(scratch)


def _read_again(scratch: ScratchFile) -> Iterator[Entry]:
    rest = b""
    for part in scratch.parts(_READ_BYTES):
        *lines, rest = (rest + part).split(b"\0")
        for line in lines:
            yield Entry(os.fsdecode(line.removesuffix(b"/")), line.endswith(b"/"))
