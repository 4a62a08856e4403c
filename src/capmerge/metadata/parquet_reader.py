"""Reads the rows of a Parquet file as records, batch by batch and in bounded memory.

The records come as JSON text, because that is what all commands read. The JSON text that the file
holds for the fields without a column goes into it as it is, so it loses nothing on its way.
"""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import orjson

from capmerge.errors import DataError, printable, quoted
from capmerge.metadata.codec import NotJsonError, Pair, decode
from capmerge.metadata.encoding import to_json
from capmerge.metadata.format import FRAMINGS
from capmerge.metadata.parquet_columns import EXACT, MARK, OTHER, import_pyarrow
from capmerge.metadata.scan import IMAGE_PATH

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH_BYTES, _BATCH_ROWS = 1 << 20, 1 << 10
_SEPARATOR = FRAMINGS["json"].separator


def iter_parquet(path: Path) -> Iterator[Pair]:
    """The (key, record) pairs of a Parquet file, in the order of its rows.

    Raises `UsageError` where pyarrow is missing, and `DataError` for a file that is damaged or
    holds no records. An `OSError` of opening it is the caller's.
    """
    with path.open("rb") as file:
        for members in read_rows(str(path), file)[1]:
            try:
                yield from decode(_SEPARATOR.join(members), "json", last=False).pairs
            except NotJsonError as error:  # nested too deep
                problem = f"found records that cannot be decoded ({error})."
                raise DataError(str(path), None, None, problem, "Write the file again.") from None


def read_rows(name: str, file: IO[bytes]) -> tuple[int, Iterator[list[bytes]]]:
    """The number of rows of an opened Parquet file, and their records in batches.

    Each record is a member of a JSON object, without line breaks. `name` is what errors call the
    file. Raises `UsageError` where pyarrow is missing, and `DataError` where the file is damaged,
    has no column of keys, or has a column of a type that JSON lacks; the iterator does, too.
    """
    rows = _Rows(name, file)
    return rows.count, rows.iter_members()


class _Rows:
    """The rows of an opened Parquet file."""

    def __init__(self, name: str, file: IO[bytes]) -> None:
        self._name, self._pa = name, import_pyarrow()
        self._row = 0
        with self._damage():
            self._file = self._pa.parquet.ParquetFile(
                self._pa.PythonFile(file, "r"), buffer_size=_BATCH_BYTES, pre_buffer=False
            )
            columns = self._file.schema_arrow
        self.count: int = self._file.metadata.num_rows
        """The number of rows."""
        self._is_ours = MARK.items() <= (columns.metadata or {}).items()
        self._check(columns)
        # orjson writes null for NaN.
        has_floats = any(map(self._pa.types.is_floating, _kinds_in(columns)))
        self._dumps: Callable[[Any], bytes] = _exact_json if has_floats else orjson.dumps

    def iter_members(self) -> Iterator[list[bytes]]:
        """Yield the records batch by batch, as members."""
        for number in range(self._file.num_row_groups):
            group = self._file.metadata.row_group(number)
            row_bytes = max(1, group.total_byte_size // max(1, group.num_rows))
            rows = max(1, min(_BATCH_ROWS, _BATCH_BYTES // row_bytes))
            with self._damage():
                batches = self._file.iter_batches(rows, row_groups=[number], use_threads=False)
            while True:
                with self._damage():
                    batch = next(batches, None)
                    if batch is None:
                        break
                    members = [*self._members(batch)]
                self._row += len(members)
                if members:
                    yield members

    def _members(self, batch: "pa.RecordBatch") -> Iterator[bytes]:
        """The records of a batch, each of them a member of an object."""
        columns = {
            name: _values(self._pa, batch.column(number))
            for number, name in enumerate(batch.schema.names)
        }
        nothing = [None] * len(batch)
        keys = columns.pop(IMAGE_PATH)
        others = columns.pop(OTHER, nothing) if self._is_ours else nothing
        exacts = columns.pop(EXACT, nothing) if self._is_ours else nothing
        names, dumps = list(columns), self._dumps
        values_of_rows = zip(*columns.values(), strict=True) if columns else iter([()] * len(batch))
        rows = zip(keys, others, exacts, values_of_rows, strict=True)
        for number, (key, other, exact, values) in enumerate(rows):
            record = {
                name: value for name, value in zip(names, values, strict=True) if value is not None
            }
            if exact is not None:
                yield self._exact_member(self._row + number, key, record, other, exact)
                continue
            if key is None:
                raise self._error(self._row + number, f'the column "{IMAGE_PATH}" is null.')
            text = dumps(record)
            if other is not None:
                text = self._joined(text, other, self._row + number)
            yield b"%b: %b" % (orjson.dumps(key), text)

    def _joined(self, text: bytes, other: str, row: int) -> bytes:
        """The text of an object with the members of the text `other` behind its own."""
        try:
            others = orjson.loads(other)
        except orjson.JSONDecodeError:  # NaN, or a lone surrogate
            others = self._loads(other, row, OTHER)
        if not isinstance(others, dict):
            raise self._error(row, f'the column "{OTHER}" holds no JSON object.')
        if not others:
            return text
        # A line break would end the row.
        end = other.replace("\n", " ").strip().encode()[1:]
        return text[:-1] + (b"," if len(text) > 2 else b"") + end

    def _exact_member(
        self, row: int, key: str | None, record: dict[str, Any], other: str | None, exact: str
    ) -> bytes:
        """The member of a record that the columns alone do not tell."""
        told = self._loads(exact, row, EXACT)
        if not isinstance(told, dict):
            raise self._error(row, f'the column "{EXACT}" holds no JSON object.')
        key = told.get("key", key)
        if not isinstance(key, str):
            raise self._error(row, f'the column "{IMAGE_PATH}" is null.')
        value: Any = told.get("value")
        if "value" not in told:
            others = {} if other is None else self._loads(other, row, OTHER)
            if not isinstance(others, dict):
                raise self._error(row, f'the column "{OTHER}" holds no JSON object.')
            fields = record | others
            order = told.get("order", [])
            if not isinstance(order, list) or not all(isinstance(name, str) for name in order):
                raise self._error(row, f'the column "{EXACT}" holds no order of fields.')
            value = {name: fields[name] for name in [*order, *fields] if name in fields}
        return b"%b: %b" % (_exact_json(key), _exact_json(value))

    def _loads(self, text: str, row: int, column: str) -> Any:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise self._error(row, f'the column "{column}" holds no JSON ({error}).') from None

    def _check(self, columns: "pa.Schema") -> None:
        """Raise `DataError` unless the columns can be records with keys."""
        names = columns.names
        for name in names:
            if names.count(name) > 1:
                raise DataError(
                    self._name, None, None, f"found two columns {quoted(name)}.", "Rename one."
                )
        types = self._pa.types
        if IMAGE_PATH not in names or not _is_text(types, columns.field(IMAGE_PATH).type):
            shown = ", ".join(map(quoted, names[:20])) or "none"
            raise DataError(
                self._name,
                None,
                None,
                f'found no column "{IMAGE_PATH}" of strings among the columns {shown}, expected '
                "the keys of the records there.",
                "Rename the column that holds them.",
            )
        if self._is_ours:
            for name in (OTHER, EXACT):
                if name in names and not _is_text(types, columns.field(name).type):
                    kind = columns.field(name).type
                    problem = f"the column {quoted(name)} is of the type {kind}, expected strings."
                    raise DataError(self._name, None, None, problem, "Convert the file again.")
        for field in columns:
            if not _is_json(types, field.type):
                raise DataError(
                    self._name,
                    None,
                    None,
                    f"the column {quoted(field.name)} is of the type {field.type}, which JSON "
                    "does not have.",
                    "Leave the column out, or make text or numbers of it.",
                )

    @contextmanager
    def _damage(self) -> Iterator[None]:
        """A context in which what pyarrow cannot read is an error of the file."""
        try:
            yield
        except (self._pa.ArrowException, OSError, UnicodeDecodeError) as error:
            reason = printable(str(error).partition("\n")[0].removesuffix("."))
            row = self._row or None  # without a row, nothing of the file could be read
            raise self._error(row, f"the Parquet data is broken ({reason}).") from error

    def _error(self, row: int | None, problem: str) -> DataError:
        where = "" if row is None else f"row {row + 1:,}: "
        return DataError(
            self._name, None, None, f"{where}{problem}", "Write or download the file again."
        )


def _values(pa: Any, column: "pa.Array") -> list[Any]:
    """The values of a column as Python objects, None for null."""
    kind = column.type
    if pa.types.is_list(kind) and pa.types.is_int64(kind.value_type):
        # Several times as fast as to_pylist(), which makes a scalar of each item.
        items = column.flatten()
        if not items.null_count:
            flat = items.to_numpy().tolist()
            lengths = column.value_lengths().to_pylist()
            lists, start = [], 0
            for length in lengths:
                lists.append(None if length is None else flat[start : start + length])
                start += length or 0
            return lists
    values: list[Any] = column.to_pylist()
    return values


def _exact_json(value: Any) -> bytes:
    return to_json(value).encode()


def _kinds_in(columns: "pa.Schema") -> Iterator["pa.DataType"]:
    """The types of the columns and of all that is in them."""
    waiting = [field.type for field in columns]
    while waiting:
        kind = waiting.pop()
        yield kind
        if isinstance(kind, import_pyarrow().DictionaryType):
            waiting.append(kind.value_type)
        waiting += [kind.field(number).type for number in range(kind.num_fields)]


def _is_text(types: Any, kind: "pa.DataType") -> bool:
    """True for strings, also where each different one is stored once."""
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_json(types: Any, kind: "pa.DataType") -> bool:
    """True for a type whose values JSON can say."""
    if types.is_dictionary(kind):
        return _is_json(types, kind.value_type)
    if types.is_struct(kind):
        return all(_is_json(types, kind.field(number).type) for number in range(kind.num_fields))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind):
        return _is_json(types, kind.value_type)
    simple = (types.is_integer, types.is_floating, types.is_boolean, types.is_null)
    return _is_text(types, kind) or any(is_kind(kind) for is_kind in simple)
