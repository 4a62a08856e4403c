"""The place in the output up to which it was compared: between two blocks, or behind a digest."""

from array import array
from typing import TYPE_CHECKING, Any

from capmerge.proof.alignment import OutputRange
from capmerge.proof.difference import record_at
from capmerge.proof.pool import Here, Workers
from capmerge.proof.streams import AnswerStream

if TYPE_CHECKING:
    from capmerge.metadata.blocks import Block


class OutputPlace:
    """The next record of the output that is not compared yet.

    As long as whole blocks are equal, it is an offset. Digests are asked for from there on only
    when they are needed.
    """

    def __init__(self, stream: AnswerStream, workers: Here | Workers) -> None:
        self._stream, self._workers = stream, workers
        self._offset: int | None = stream.layout.first
        self._is_end = False
        # With digests: their block, how many of its records were compared, and where the next block
        # begins, if the records of this one are proven to reach so far.
        self._block: Block | None = None
        self._digests, self._number = array("q"), 0
        self._following: int | None = None

    def is_at(self, offset: int) -> bool:
        """Return whether the next record begins at `offset`."""
        if self._offset is None and self._block:
            is_inside = self._number < len(self._digests)
            self._offset = self.record()[0] if is_inside else self._following
        return self._offset == offset

    def go_behind(self, out: OutputRange, *, last: bool) -> None:
        """Go behind a range in which all is right, and which reaches the end of the file if so."""
        self._offset, self._is_end = out.end, last

    def has_record(self) -> bool:
        """Return whether there is another record, and get its digest.

        Raises `DataError` where the file is not valid.
        """
        if self._is_end:
            return False
        if self._offset is not None:
            self._stream.go_to(self._offset)
            self._offset = self._block = None
            self._digests, self._number = array("q"), 0
        while self._number == len(self._digests):
            self._stream.fill(self._workers)
            found = self._stream.next()
            if found is None:
                return False
            block, answer = found[0].block, found[1]
            if self._block:
                self._stream.source.release(block.start)
            self._block, self._digests, self._number = block, answer.digests, 0
            is_proven = answer.broken_at is None and not block.last
            self._following = block.next_start if is_proven else None
        return True

    def go_on(self, expected: "array[int]") -> tuple[int, bool]:
        """Go behind the records that have the `expected` digests, as far as they are known here.

        Returns their number, and whether the next record is none of those that are expected.
        """
        found = self._digests[self._number : self._number + len(expected)]
        same = _count_equal(expected[: len(found)], found)
        self._number += same
        return same, same < len(found)

    def go_back(self) -> None:
        """Go back to the record before, whose digest was compared."""
        self._number -= 1

    def record(self) -> tuple[int, tuple[str, Any], bool]:
        """Return what `record_at` returns for the record that `has_record` has found."""
        assert self._block is not None
        return record_at(self._stream.source, self._stream.layout, self._block, self._number)


def _count_equal(expected: "array[int]", found: "array[int]") -> int:
    """Return how many digests are equal before the first that differs."""
    if expected == found:
        return len(found)
    pairs = enumerate(zip(expected, found, strict=True))
    return next(number for number, (ours, theirs) in pairs if ours != theirs)
