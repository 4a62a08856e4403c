"""One of the two files as a stream of answers, in the order of its blocks."""

from collections import deque

from capmerge.errors import DataError
from capmerge.files.source import FileSource, Source
from capmerge.metadata.blocks import Block, FileLayout
from capmerge.proof.alignment import Alignment
from capmerge.proof.borders import Borders
from capmerge.proof.digests import Answer, Side, Task
from capmerge.proof.pool import Here, Ticket, Workers


class AnswerStream:
    """Hands out the blocks of a file ahead of time, and gives the answers one by one.

    `alignment` tells where the output has the records of each block of the source.
    """

    def __init__(
        self, source: Source, layout: FileLayout, side: Side, alignment: Alignment | None = None
    ) -> None:
        self.source, self.layout = source, layout
        self._side: Side = side
        self._alignment = alignment
        self._borders = Borders(source, layout)
        self._pending: deque[tuple[Task, Ticket]] = deque()
        self._error: DataError | None = None

    def fill(self, workers: Here | Workers) -> None:
        """Hand out blocks until enough of them are pending."""
        while self._error is None and len(self._pending) < workers.ahead:
            block = self._borders.take()
            if block is None:
                return
            if isinstance(block, DataError):
                self._error = block
                return
            out = self._alignment.range_of(block) if self._alignment else None
            task = Task(self._side, block, self._bytes_of(block), out)
            self._pending.append((task, workers.submit(task)))

    def go_to(self, start: int) -> None:
        """Go on with the record that begins at `start`. Answers that are pending are dropped."""
        self._pending.clear()
        self._error = None
        self._borders.go_to(start)

    def again(self, workers: Here | Workers, block: Block) -> Answer:
        """Return the answer for a block that has digests of its records."""
        return workers.submit(Task(self._side, block, self._bytes_of(block))).answer()

    def next(self) -> tuple[Task, Answer] | None:
        """Return the next task with its answer; None after the last.

        Raises `DataError` where the file is not valid.
        """
        if not self._pending:
            if self._error:
                raise self._error
            return None
        task, ticket = self._pending.popleft()
        answer = ticket.answer()
        if answer.broken_at is not None:
            # Either the end of the block was guessed wrong, or the file is broken there. A parser
            # finds out, and the blocks after it are cut anew.
            self._pending.clear()
            self._error = None
            self._borders.recut(task.block, answer.broken_at)
        return task, answer

    def _bytes_of(self, block: Block) -> bytes | None:
        if isinstance(self.source, FileSource):
            return None
        return self.source.window(block.start, block.end - block.start)
