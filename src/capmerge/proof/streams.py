"""One of the two files as a stream of answers, in the order of its blocks."""

from collections import deque

from capmerge.errors import DataError
from capmerge.files.source import FileSource, Source
from capmerge.metadata.blocks import Block, FileLayout
from capmerge.proof.borders import Borders
from capmerge.proof.digests import Answer, Side, Task
from capmerge.proof.pool import Here, Ticket, Workers


class AnswerStream:
    """Hands out the blocks of a file ahead of time, and gives the answers one by one."""

    def __init__(self, source: Source, layout: FileLayout, side: Side) -> None:
        self.source, self.layout = source, layout
        self._side: Side = side
        self._borders = Borders(source, layout)
        self._pending: deque[tuple[Block, Ticket]] = deque()
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
            data = None
            if not isinstance(self.source, FileSource):
                data = self.source.window(block.start, block.end - block.start)
            self._pending.append((block, workers.submit(Task(self._side, block, data))))

    def next(self) -> tuple[Block, Answer] | None:
        """Return the next block with its answer; None after the last.

        Raises `DataError` where the file is not valid.
        """
        if not self._pending:
            if self._error:
                raise self._error
            return None
        block, ticket = self._pending.popleft()
        answer = ticket.answer()
        if answer.broken_at is not None:
            # Either the end of the block was guessed wrong, or the file is broken there. A parser
            # finds out, and the blocks after it are cut anew.
            self._pending.clear()
            self._error = None
            self._borders.recut(block, answer.broken_at)
        return block, answer
