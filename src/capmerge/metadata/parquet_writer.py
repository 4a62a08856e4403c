"""Writes records to a Parquet file, in row groups and bounded memory."""

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from capmerge.files.atomic import AtomicFile, Buffer, StandardOutput
from capmerge.files.scratch import ScratchWriter
from capmerge.metadata.codec import Pair
from capmerge.metadata.encoding import to_json
from capmerge.metadata.parquet_columns import (
    COLUMNS,
    EXACT,
    FIELDS,
    OTHER,
    import_pyarrow,
    is_utf8,
    schema,
)
from capmerge.metadata.scan import IMAGE_PATH

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_BYTES, _BATCH_ROWS = 1 << 20, 1 << 12
_ROW_GROUP_BYTES = 32 << 20
_ROW_BYTES = 64  # of a row without texts
_REPEATING = [
    *(name for name, fits in FIELDS.items() if fits is not is_utf8),
    "capmerge",
    EXACT,
]
"""The columns whose values repeat, so that a dictionary of them saves space."""


class ParquetWriter:
    """Writes (key, record) pairs to `file`, which stays open: publishing it is up to the caller.

        with AtomicFile(target) as file:
            writer = ParquetWriter(file)
            writer.write(pairs)  # as often as needed, a pair or many at a time
            writer.finish()
            file.publish()

    A record may be any JSON value, and equal keys are written as often as they come. The bytes
    depend on the pairs alone, and not on how they are divided into calls. About 100 MB of memory
    are used, more only for longer records.

    Raises `UsageError` where pyarrow is missing, and what `file.write` raises.
    """

    def __init__(self, file: AtomicFile | StandardOutput | ScratchWriter) -> None:
        self._file = _File(file)
        self._pa = import_pyarrow()
        self._rows = Rows()
        self._batches: list[pa.RecordBatch] = []
        self._waiting_bytes = 0
        self._schema = schema()
        self._writer = self._pa.parquet.ParquetWriter(
            self._pa.PythonFile(self._file, "w"),
            self._schema,
            compression="zstd",
            compression_level=3,
            use_dictionary=_dictionary_columns(self._schema),
            write_statistics=[IMAGE_PATH],
        )

    def write(self, pairs: Iterable[Pair]) -> None:
        """Append records."""
        for key, record in pairs:
            self._rows.add(key, record)
            if self._rows.is_full:
                self.write_batch(self._rows.take())

    def write_batch(self, batch: "pa.RecordBatch") -> None:
        """Append the rows of a batch that `Rows` made, perhaps in another process."""
        self._batches.append(batch)
        self._waiting_bytes += batch.nbytes
        if self._waiting_bytes >= _ROW_GROUP_BYTES:
            self._write_row_group()

    def finish(self) -> None:
        """Write what is waiting, and the footer of the file."""
        if len(self._rows):
            self.write_batch(self._rows.take())
        if self._batches:
            self._write_row_group()
        self._writer.close()

    def __del__(self) -> None:
        # A writer that is abandoned after an error writes a footer nevertheless.
        self._file.is_abandoned = True

    def _write_row_group(self) -> None:
        table = self._pa.Table.from_batches(self._batches, self._schema)
        self._batches, self._waiting_bytes = [], 0
        self._writer.write_table(table, row_group_size=len(table))


class Rows:
    """Records on their way into a batch of rows."""

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self._bytes = 0

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def is_full(self) -> bool:
        """True when it is time to take the batch."""
        return self._bytes >= _BATCH_BYTES or len(self._rows) >= _BATCH_ROWS

    def add(self, key: str, record: Any) -> None:
        """Append the row of one record."""
        row: dict[str, Any] = {IMAGE_PATH: key}
        exact: dict[str, Any] = {}
        size = _ROW_BYTES + len(key)
        if not is_utf8(key):
            row[IMAGE_PATH], exact["key"] = None, key
        if record.__class__ is dict:
            others = {}
            for name, value in record.items():
                fits = FIELDS.get(name)
                if fits and fits(value):
                    row[name] = value
                    size += len(value)
                else:
                    others[name] = value
            if not _is_in_order(tuple(record), tuple(others)):
                exact["order"] = list(record)
            if others:
                row[OTHER] = to_json(others)
                size += len(row[OTHER])
        else:
            exact["value"] = record
        if exact:
            row[EXACT] = to_json(exact)
            size += len(row[EXACT])
        self._rows.append(row)
        self._bytes += size

    def take(self) -> "pa.RecordBatch":
        """The rows as a batch; none of them is held afterwards."""
        pa, of = import_pyarrow(), schema()
        columns = [[row.get(name) for row in self._rows] for name in COLUMNS]
        batch = pa.record_batch(
            [pa.array(values, field.type) for values, field in zip(columns, of, strict=True)],
            schema=of,
        )
        self._rows, self._bytes = [], 0
        return batch


@lru_cache(1 << 12)
def _is_in_order(names: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """True if a record has its fields in the order in which a reader puts them.

    That is the order of the columns, and behind them the `others` without a column.
    """
    return names == (*(name for name in FIELDS if name in names and name not in others), *others)


def _dictionary_columns(of: "pa.Schema") -> list[str]:
    """The paths of the columns whose values repeat, as Parquet names them."""
    types = import_pyarrow().types
    return [
        f"{name}.list.element" if types.is_list(of.field(name).type) else name
        for name in _REPEATING
    ]


class _File:
    """What pyarrow asks of a file that it writes to."""

    closed = False

    def __init__(self, file: AtomicFile | StandardOutput | ScratchWriter) -> None:
        self._file, self._start = file, file.written_bytes
        self.is_abandoned = False

    def write(self, data: Buffer) -> int:
        if not self.is_abandoned:
            self._file.write(data)
        return len(data)

    def tell(self) -> int:
        return self._file.written_bytes - self._start

    def flush(self) -> None:
        """Do nothing: the file is synced when it is published."""

    def close(self) -> None:
        """Leave the file open for its owner."""
