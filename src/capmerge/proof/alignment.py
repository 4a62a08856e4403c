"""Where the output holds the records of each block of the source, found by the keys at its borders.

A worker that has both can compare a block at once, without a digest of each record. What is found
here is a guess: the worker proves that the bytes are exactly the records of its block, and the
parent that each guess begins where the one before it ended.
"""

import json
from json import JSONDecoder
from typing import NamedTuple

from orjson import JSONEncodeError, dumps

from capmerge.files.source import FileSource, Source
from capmerge.metadata.blocks import Block, FileLayout
from capmerge.metadata.scan import IMAGE_PATH

_DECODE = JSONDecoder().raw_decode
_LONGEST_KEY_BYTES, _LONGEST_LINE_BYTES = 1 << 12, 1 << 16
_NEAR_BYTES, _FAR_BYTES = 1 << 17, 1 << 22
"""How far from where it is expected a key is looked for, at first and then.

The records of a block are so many that their size is known to some percent."""
_MOST_TIMES = 8
"""How many times as long as the block its range may be: both are in the memory of a worker."""


class OutputRange(NamedTuple):
    """The bytes [start, end) of the output, with what separates them from the next record."""

    start: int
    end: int


class Alignment:
    """Finds the range of each block, if both files can be read at any offset."""

    def __init__(
        self, source: Source, layout: FileLayout, output: Source, out_layout: FileLayout
    ) -> None:
        self._source, self._layout = source, layout
        self._output, self._out_layout = output, out_layout
        self._is_possible = isinstance(source, FileSource) and isinstance(output, FileSource)
        # The offset of the next block, and that of its first record in the output.
        self._next: tuple[int, int | None] = layout.first, out_layout.first

    def range_of(self, block: Block) -> OutputRange | None:
        """Return the range of a block, which most often follows the block of the last call."""
        if not self._is_possible:
            return None
        next_start, start = self._next
        if block.start != next_start:
            start = self._find(block.start, None)
        end = self._output.total_bytes if block.last else self._find(block.next_start, block, start)
        self._next = block.next_start, end
        if start is None or end is None:
            return None
        most = _MOST_TIMES * (block.end - block.start) + _FAR_BYTES
        return OutputRange(start, end) if end - start <= most else None

    def _find(self, place: int, block: Block | None, start: int | None = None) -> int | None:
        """Return where the output has the record that begins at `place` in the source.

        It is the first behind the records of `block`, which begin at `start` in the output.
        """
        needle = self._needle(place)
        source_bytes, out_bytes = self._source.total_bytes, self._output.total_bytes
        if needle is None or source_bytes is None or out_bytes is None:
            return None
        # What is left of both files tells how much longer the records become.
        done, out_done = (0, 0) if block is None or start is None else (block.start, start)
        left = max(1, source_bytes - done)
        expected = out_done + (place - done) * max(0, out_bytes - out_done) // left
        for distance in (_NEAR_BYTES, _FAR_BYTES):
            first = max(out_done, expected - distance)
            window = self._output.window(first, expected + distance - first)
            found = window.find(needle.text)
            if found >= 0:
                return first + found + needle.before
        return None

    def _needle(self, place: int) -> "_Needle | None":
        """Return the bytes that the record at `place` in the source begins with in the output."""
        is_line = self._layout.kind == "jsonl"
        head = self._source.window(place, _LONGEST_LINE_BYTES if is_line else _LONGEST_KEY_BYTES)
        try:
            if is_line:
                key = json.loads(head[: head.find(b"\n") + 1 or len(head)])[IMAGE_PATH]
            else:
                key, _ = _DECODE(head.decode("utf-8", "replace"))
            text = dumps(key)
        except (ValueError, RecursionError, KeyError, TypeError, JSONEncodeError):
            return None
        if self._out_layout.kind == "jsonl":
            return _Needle(b'\n{"%b":%b' % (IMAGE_PATH.encode(), text), 1)
        # Only a file of one line, as no rewrite writes it, has no separator.
        separator = self._out_layout.separator[:-1]
        return _Needle(separator + text + b":", len(separator)) if separator else None


class _Needle(NamedTuple):
    """What is searched for in the output."""

    text: bytes
    before: int
    """How many of its bytes belong to the record before."""
