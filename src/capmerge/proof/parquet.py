"""The rows of a Parquet file for `verify`, made into records by code of its own.

pyarrow makes Python values of each row, and the standard library reads and writes the JSON text.
That is several times slower than the reader of a rewrite. What the columns mean is stated in
`metadata.parquet_columns`.
"""

import io
import json
from collections.abc import Iterator
from typing import Any

from capmerge.errors import DataError, printable
from capmerge.metadata.opened import Members
from capmerge.metadata.parquet_columns import EXACT, MARK, OTHER, import_pyarrow
from capmerge.metadata.scan import IMAGE_PATH

_BATCH_ROWS = 256


def read_rows(name: str, file: io.BufferedReader) -> tuple[int, Iterator[Members]]:
    """The number of rows of a Parquet file, and batches of their records.

    Raises `UsageError` where pyarrow is missing, and `DataError` where the file is damaged or its
    rows are no records; the iterator does, too.
    """
    pa = import_pyarrow()
    try:
        opened = pa.parquet.ParquetFile(pa.PythonFile(file, "r"), pre_buffer=False)
        told = opened.schema_arrow.metadata or {}
        count = opened.metadata.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _broken(name, 0, error) from error
    is_ours = all(told.get(word) == value for word, value in MARK.items())
    return count, _iter_members(pa, name, opened, is_ours=is_ours)


def _iter_members(pa: Any, name: str, opened: Any, *, is_ours: bool) -> Iterator[Members]:
    row = 0
    try:
        for batch in opened.iter_batches(batch_size=_BATCH_ROWS, use_threads=False):
            members = []
            for columns in batch.to_pylist():
                key, record = _record(columns) if is_ours else _of_any_table(columns)
                if not isinstance(key, str):
                    raise ValueError(f"{IMAGE_PATH} is {key}, expected a string")  # noqa: TRY004, TRY301  # told below
                members.append(f"{json.dumps(key)}: {json.dumps(record)}".encode())
                row += 1
            if members:
                yield members
    except (pa.ArrowException, OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        # What JSON cannot say is a TypeError, a column that is missing a KeyError.
        raise _broken(name, row, error) from error


def _of_any_table(columns: dict[str, Any]) -> tuple[Any, Any]:
    """The key and the record of a row: what is null is not there."""
    key = columns.pop(IMAGE_PATH)
    return key, {field: value for field, value in columns.items() if value is not None}


def _record(columns: dict[str, Any]) -> tuple[Any, Any]:
    """The key and the record of a row as `capmerge` writes it."""
    other, exact = columns.pop(OTHER, None), columns.pop(EXACT, None)
    key, record = _of_any_table(columns)
    record.update(_object(other))
    told = _object(exact)
    if "value" in told:
        record = told["value"]
    elif "order" in told:
        if not isinstance(told["order"], list) or set(map(type, told["order"])) - {str}:
            raise ValueError(f"{EXACT} holds no order of fields")
        named = {field: record[field] for field in told["order"] if field in record}
        record = {**named, **record}
    return told.get("key", key), record


def _object(text: str | None) -> dict[str, Any]:
    """The object that a column of JSON text holds; an empty one for null."""
    if text is None:
        return {}
    value = json.loads(text)
    if not isinstance(value, dict):
        raise ValueError(f"{text[:40]!r} is no JSON object")  # noqa: TRY004  # told with its row
    return value


def _broken(name: str, row: int, error: Exception) -> DataError:
    reason = printable(str(error).partition("\n")[0].removesuffix("."))
    where = f"row {row + 1:,} or one near it: " if row else ""
    return DataError(
        name,
        None,
        None,
        f"{where}the Parquet data cannot be read ({reason}).",
        "Write or download the file again.",
    )
