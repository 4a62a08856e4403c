"""The records with equal keys in several sources, linked in a file: the key index of a join.

Records are numbered through all sources, in their order. The file has one number per record, so
memory does not grow with the keys: they are compared a part of them at a time. A part is a dict of
the keys themselves, so no two keys are taken for one because their hashes agree.
"""

import mmap
from array import array
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from capmerge.files.scratch import ScratchFolder, SharedFile
from capmerge.files.source import FileSource
from capmerge.metadata.key_bytes import END, split_keys
from capmerge.metadata.survey import NUMBER_BYTES

_KEYS_AT_ONCE = 1 << 18
"""About how many keys are compared at once. They take some 200 bytes each."""
_KEY_BYTES_AT_ONCE = 64 << 20
_MOST_PARTS = 256
_READ_BYTES = 1 << 20
_NOT_FIRST = 1 << 63
"""The bit of a record that is not the first with its key. The others are 1 + the next number."""
_AFTER_NUMBER = b"\xfe"  # no byte of UTF-8


class KeyedSource(NamedTuple):
    """The keys of one source, as a survey noted them."""

    keys: Path
    records: int
    prefix: bytes = b""
    """What is put before each of them."""


class KeyLinks:
    """For each record, whether it is the first with its key, and which one is the next with it."""

    def __init__(self, path: Path) -> None:
        self._file = SharedFile(partial(FileSource, path))

    def read(self, first: int, count: int) -> "array[int]":
        """What is noted of `count` records from the number `first` on: see `next_of`."""
        return array("Q", self._file.window(first * NUMBER_BYTES, count * NUMBER_BYTES))


def is_first(noted: int) -> bool:
    """True for a record that is the first with its key."""
    return noted < _NOT_FIRST


def next_of(noted: int) -> int:
    """The number of the next record with the same key; -1 for the last one."""
    return (noted & ~_NOT_FIRST) - 1


class Linked(NamedTuple):
    """The outcome of comparing all keys."""

    links: KeyLinks
    firsts: list[int]
    """The number of records in each source that are the first with their key."""


def link_keys(sources: Sequence[KeyedSource], folder: ScratchFolder) -> Linked:
    """Compare the keys of all sources, and link the records with equal ones in a file of `folder`.

    Keys are equal if they are the same text with the prefixes of their sources.
    """
    total = sum(source.records for source in sources)
    with folder.file("links") as file:
        for start in range(0, total * NUMBER_BYTES, _READ_BYTES):
            file.write(bytes(min(_READ_BYTES, total * NUMBER_BYTES - start)))
    links = KeyLinks(file.path)
    if not total:
        return Linked(links, [0] * len(sources))
    sizes = (source.keys.stat().st_size + source.records * len(source.prefix) for source in sources)
    parts = 1 + max(total // _KEYS_AT_ONCE, sum(sizes) // _KEY_BYTES_AT_ONCE)
    with (
        file.path.open("r+b") as opened,
        mmap.mmap(opened.fileno(), 0) as mapped,
        memoryview(mapped) as view,
        view.cast("Q") as words,
    ):
        if parts == 1:
            _link(_numbered(sources), words)
        else:
            for part in _divided(_numbered(sources), min(parts, _MOST_PARTS), folder):
                _link(part, words)
        firsts, start = [], 0
        for source in sources:
            end = start + source.records
            firsts.append(sum(words[number] < _NOT_FIRST for number in range(start, end)))
            start = end
    return Linked(links, firsts)


def _link(numbered: Iterable[tuple[int, bytes]], words: memoryview) -> None:
    """Link the equal ones of these keys, which are all that the sources have of each."""
    last: dict[bytes, int] = {}
    for number, key in numbered:
        before = last.setdefault(key, number)
        if before != number:
            words[before] |= number + 1
            words[number] = _NOT_FIRST
            last[key] = number


def _numbered(sources: Iterable[KeyedSource]) -> Iterator[tuple[int, bytes]]:
    """All keys with their prefixes, and the numbers of their records."""
    number = 0
    for source in sources:
        for keys in split_keys(_parts_of(source.keys)):
            yield from enumerate(
                [source.prefix + key for key in keys] if source.prefix else keys, number
            )
            number += len(keys)


def _divided(
    numbered: Iterable[tuple[int, bytes]], count: int, folder: ScratchFolder
) -> Iterator[Iterator[tuple[int, bytes]]]:
    """The keys in parts, by their hashes; each part is read back from a file of its own."""
    with ExitStack() as stack:
        files = [stack.enter_context(folder.file(f"part-{number}")) for number in range(count)]
        for number, key in numbered:
            files[hash(key) % count].write(b"%d%b%b%b" % (number, _AFTER_NUMBER, key, END))
    for file in files:
        yield _numbered_again(file.path)
        file.path.unlink()


def _numbered_again(path: Path) -> Iterator[tuple[int, bytes]]:
    for rows in split_keys(_parts_of(path)):
        for row in rows:
            number, _, key = row.partition(_AFTER_NUMBER)
            yield int(number), key


def _parts_of(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            yield part
