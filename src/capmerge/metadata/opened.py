"""Opens metadata of any format as a source of JSON text: plain, compressed, or Parquet."""

import io
from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

from capmerge.errors import DataError
from capmerge.files.source import Source, StreamSource, open_source
from capmerge.metadata.format import FRAMINGS
from capmerge.metadata.parquet_columns import MAGIC
from capmerge.metadata.parquet_reader import read_rows

Members = list[bytes]
"""Records as members of a JSON object, without line breaks."""


RowReader = Callable[[str, io.BufferedReader], tuple[int, Iterator[Members]]]
"""A function that reads a file of rows: it gives their number, and their records in batches."""


def open_metadata(path: str, read_rows: RowReader = read_rows) -> Source:
    """Open metadata by what the file holds, whatever its name; `-` is standard input.

    A Parquet file is read as the JSON text of an object, through `read_rows`. Raises what
    `open_source` raises, `UsageError` where pyarrow is missing, and `DataError` for a Parquet file
    that is damaged or holds no records.
    """
    source = open_source(path)
    try:
        is_parquet = source.path is not None and source.window(0, len(MAGIC)) == MAGIC
    except BaseException:
        source.close()
        raise
    if not is_parquet:
        return source
    source.close()
    file = Path(path).open("rb")  # noqa: SIM115  # the source closes it
    try:
        return RowsSource(path, file, *read_rows(path, file))
    except BaseException:
        file.close()
        raise


class RowsSource(StreamSource):
    """A file of rows as JSON text, read once from front to back; each row is a line.

    `file` is the file itself, of which `batches` give the rows as members, `count` of them in all.
    Offsets count the bytes of the text. An error at one of them names its row instead.
    """

    def __init__(
        self, name: str, file: io.BufferedReader, count: int, batches: Iterator[Members]
    ) -> None:
        self._text = _Text(file, batches)
        self._count = max(1, count)
        super().__init__(name, self._text, compressed=file)

    def release(self, before: int) -> None:
        """Forget the bytes before offset `before`, and whose rows they were."""
        super().release(before)
        self._text.forget(before)

    def read_bytes(self, offset: int) -> int:  # noqa: ARG002  # it is one of the text
        """Return how many bytes of the file were read, in proportion to its rows."""
        return (self.total_bytes or 0) * min(self._text.rows, self._count) // self._count

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, DataError) and error.name == self.name and error.offset is not None:
            row = self._text.row_at(error.offset)
            error.offset = None
            if row is not None:
                error.name = f"{error.name}, row {row + 1:,}"
        super().__exit__(kind, error, trace)


class _Batch(NamedTuple):
    """Where the rows of a batch lie in the text."""

    row: int
    """The number of its first row, from 0."""
    starts: "array[int]"
    """The offset of each row."""


class _Text:
    """The JSON text of all rows, as a stream."""

    def __init__(self, file: io.BufferedReader, batches: Iterator[Members]) -> None:
        self._file, self._batches = file, batches
        self._batch_starts: list[_Batch] = []
        self._offset, self._ended = 0, False
        self.rows = 0
        """How many rows were read."""

    def read(self, size: int, /) -> bytes:  # noqa: ARG002  # a batch is read at once
        """Return the text of the next rows; none at the end."""
        framing = FRAMINGS["json"]
        if self._ended:
            return b""
        members = next(self._batches, None)
        if members is None:
            self._ended = True
            return framing.closing if self.rows else framing.empty
        before = framing.separator if self.rows else framing.opening
        text = before + framing.separator.join(members)
        steps = (len(member) + len(framing.separator) for member in members[:-1])
        starts = accumulate(steps, initial=self._offset + len(before))
        self._batch_starts.append(_Batch(self.rows, array("q", starts)))
        self.rows += len(members)
        self._offset += len(text)
        return text

    def forget(self, before: int) -> None:
        """Forget the batches that end before an offset."""
        while len(self._batch_starts) > 1 and self._batch_starts[1].starts[0] <= before:
            del self._batch_starts[0]

    def row_at(self, offset: int) -> int | None:
        """The number of the row at an offset; None where it is forgotten."""
        for batch in reversed(self._batch_starts):
            if batch.starts[0] <= offset:
                return batch.row + bisect_right(batch.starts, offset) - 1
        return None

    def fileno(self) -> int:
        """The descriptor of the file."""
        return self._file.fileno()

    def close(self) -> None:
        """Close nothing: the source closes its file."""
