r"""Finds the first record of a key by searching for the bytes of the key.

That is many times faster than decoding all records before it. Nothing is lost: JSON can spell a
letter of a key as `\u0041` or `\/`, too, and a search for all spellings follows wherever one of
them may be. A hit counts only if it is proven to be the key of a record. In JSON lines decoding
its line is the proof. In JSON, the quotes and braces between the hit and the nearer end of the file
are counted, because a nested object or a text may hold the same letters.
"""

import re
from collections.abc import Callable, Iterator
from typing import TypeAlias

from capmerge.files.source import FileSource
from capmerge.metadata.blocks import BLOCK_BYTES, FileLayout
from capmerge.metadata.borders import BorderCounter
from capmerge.metadata.codec import Pair, decode
from capmerge.metadata.walk import walk

_Span: TypeAlias = tuple[int, int]
_Find: TypeAlias = Callable[[bytes, int], _Span | None]
"""The [start, end) of the first hit in some bytes from an offset on; None without one."""
_SHORT = {'"': rb"\"", "\\": rb"\\", "/": rb"\/", "\b": rb"\b", "\f": rb"\f", "\n": rb"\n"} | {
    "\r": rb"\r",
    "\t": rb"\t",
}
_UNIT_BYTES = 6  # `\u0041`
_PRINTABLE = (b"2", b"3", b"4", b"5", b"6", b"7")  # begin the codes of printable ASCII letters
_LINE_BYTES = 1 << 16
_COLON = re.compile(rb"[ \t\n\r]*(?::|\Z)")
_BEHIND_BYTES = 64  # in which a colon stands behind a key, or only white space
_NOWHERE = 1 << 62


def find_record(
    source: FileSource,
    layout: FileLayout,
    key: str,
    progress: Callable[[int], None] | None = None,
) -> int | None:
    """Return the offset of the first record with this key; None if there is none.

    That is the offset of the quote of its key, or of its line. The source must be valid.
    `progress` is told from time to time how many bytes of the file one search for all spellings
    would have seen. Raises `DataError` where a record that is looked at is not valid.
    """
    end = source.total_bytes or 0
    search = _Search(source, layout, key, progress)
    if not key.isascii() or not key.isprintable() or '"' in key or "\\" in key:
        return search.first(_any_spelling(key), layout.first, end)
    # Before the usual spelling there may be another one. PHP escapes every slash.
    search.searches = 3 if "/" in key else 2
    found = search.first(_literal(key), layout.first, end)
    limit = end if found is None else found
    if "/" in key:
        found = _earlier(
            search.first(_literal(key.replace("/", r"\/")), layout.first, limit), found
        )
        limit = end if found is None else found
    escape = next(search.hits(_escapes(key), layout.first, limit, _UNIT_BYTES), None)
    if escape is None:
        return found
    start = max(layout.first, escape[0] - search.longest_bytes)
    return _earlier(search.first(_any_spelling(key), start, limit), found)


def read_record(source: FileSource, layout: FileLayout, start: int) -> Pair:
    """Return the record at an offset that `find_record` returned, with its key.

    Raises `DataError` if it is not valid or too long.
    """
    record = next(walk(source, layout, start))
    data = source.window(record.start, record.value_end - record.start)
    (pair,) = decode(data, layout.kind, last=False).pairs
    return pair


def _earlier(place: int | None, other: int | None) -> int | None:
    """Return `place`, which is the earlier of two where it is one at all."""
    return other if place is None else place


class _Search:
    """The search for one key."""

    def __init__(
        self,
        source: FileSource,
        layout: FileLayout,
        key: str,
        progress: Callable[[int], None] | None,
    ) -> None:
        self._progress, self._begun = progress, 0
        self.searches = 1
        """How many times the file may be searched."""
        self._source, self._layout, self._key = source, layout, key
        self._counter = BorderCounter(layout.first)
        self._counts_to_end = True
        self.longest_bytes = 2 * _UNIT_BYTES * len(key) + 2
        """The most bytes that a spelling of the key takes, with its quotes."""

    def first(self, find: _Find, start: int, end: int) -> int | None:
        """Return the offset of the first record of the key whose hit is in [start, end)."""
        self._counter = BorderCounter(self._layout.first)
        done = start
        for hit, data in self.hits(find, start, end, self.longest_bytes):
            if hit < done:
                continue
            if self._layout.kind == "jsonl":
                line, done = self._line_around(hit)
                if next(walk(self._source, self._layout, line)).key == self._key:
                    return line
            elif (
                self._may_be_key(hit, data)
                and self._is_at_depth_one(hit)
                and read_record(self._source, self._layout, hit)[0] == self._key
            ):
                return hit
        return None

    def hits(
        self, find: _Find, start: int, end: int, longest_bytes: int
    ) -> Iterator[tuple[int, bytes]]:
        """Yield the offset of each hit in [start, end), and some bytes behind it."""
        overlap = longest_bytes + _BEHIND_BYTES
        before, total = self._begun, self._source.total_bytes or 0
        self._begun = min(before + 1, self.searches - 1)
        while start < end:
            data = self._source.window(start, BLOCK_BYTES + overlap)
            found = find(data, 0)
            while found and found[0] < min(BLOCK_BYTES, end - start):
                yield start + found[0], data[found[1] : found[1] + _BEHIND_BYTES]
                found = find(data, found[0] + 1)
            start += BLOCK_BYTES
            if self._progress:
                self._progress((before * total + min(start, end)) // self.searches)

    def _line_around(self, place: int) -> tuple[int, int]:
        """Return where the line at an offset begins and where the next one does."""
        begin, size = place, _LINE_BYTES
        while begin > self._layout.first:
            before = self._source.window(max(0, begin - size), min(size, begin))
            if (line_break := before.rfind(b"\n")) >= 0:
                begin += line_break + 1 - len(before)
                break
            begin -= len(before)
            size = min(2 * size, BLOCK_BYTES)
        end = place
        while after := self._source.window(end, _LINE_BYTES):
            if (line_break := after.find(b"\n")) >= 0:
                return max(begin, self._layout.first), end + line_break + 1
            end += len(after)
        return max(begin, self._layout.first), end

    def _may_be_key(self, hit: int, data: bytes) -> bool:
        """True unless the bytes beside a hit say that no key begins there."""
        before = self._source.window(hit - 1, 1)
        return before != b"\\" and _COLON.match(data) is not None

    def _is_at_depth_one(self, hit: int) -> bool:
        """True if a string begins at `hit` that lies in the top-level object itself."""
        end = self._source.total_bytes or 0
        if self._counts_to_end and end - hit < hit - self._counter.place:
            # From a key of the top-level object on, one brace closes more than were opened.
            counter = BorderCounter(hit)
            self._count(counter, end)
            self._counts_to_end = not counter.in_string and counter.depth == -1
            if self._counts_to_end:
                return True
        self._count(self._counter, hit)
        return not self._counter.in_string and self._counter.depth == 0

    def _count(self, counter: BorderCounter, end: int) -> None:
        while counter.place < end:
            data = self._source.window(counter.place, min(BLOCK_BYTES, end - counter.place))
            for _ in counter.feed(data, _NOWHERE):
                pass


def _literal(spelling: str) -> _Find:
    """A search for just this spelling between quotes."""
    wanted = f'"{spelling}"'.encode()

    def find(data: bytes, start: int) -> _Span | None:
        place = data.find(wanted, start)
        return (place, place + len(wanted)) if place >= 0 else None

    return find


def _any_spelling(key: str) -> _Find:
    """A search for `key` between quotes, in any spelling that JSON allows."""
    pattern = re.compile(b'"' + b"".join(map(_spellings, key)) + b'"')

    def find(data: bytes, start: int) -> _Span | None:
        found = pattern.search(data, start)
        return found.span() if found else None

    return find


def _spellings(letter: str) -> bytes:
    """The pattern of a letter of a key: itself, or as an escape."""
    units = letter.encode("utf-16-be", "surrogatepass").hex()
    escapes = b"".join(
        rb"\\u(?i:%s)" % units[place : place + 4].encode() for place in range(0, len(units), 4)
    )
    choices = [escapes]
    if letter in _SHORT:
        choices.append(re.escape(_SHORT[letter]))
    if letter not in '"\\' and letter >= " " and not "\ud800" <= letter <= "\udfff":
        choices.append(re.escape(letter.encode()))
    return b"(?:" + b"|".join(choices) + b")"


def _escapes(key: str) -> _Find:
    """A search for escapes of printable ASCII letters, and of slashes if the key holds several."""
    several = key.count("/") > 1

    def find(data: bytes, start: int) -> _Span | None:
        slash = data.find(rb"\/", start) if several else -1
        place = data.find(rb"\u00", start)
        while place >= 0 and data[place + 4 : place + 5] not in _PRINTABLE:
            place = data.find(rb"\u00", place + 1)
        hits = [hit for hit in (slash, place) if hit >= 0]
        return (min(hits), min(hits) + _UNIT_BYTES) if hits else None

    return find
