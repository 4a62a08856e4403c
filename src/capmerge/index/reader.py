"""The index of a rewritten metadata file: where each record lies, its size in px and its length.

This module owns the meaning of the columns, the tie between an index and its metadata, and the
reading of one record by its number. `build` makes an index.
"""

import hashlib
import os
import weakref
import zlib
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from capmerge.errors import StaleError, UsageError, printable
from capmerge.files.atomic import side_path
from capmerge.files.chained import ChainedSource
from capmerge.files.columns import Columns, Schema, has_columns
from capmerge.files.source import FileSource, fingerprint_text, open_source
from capmerge.index.latent_names import hash_of, stem_of
from capmerge.metadata.blocks import Kind
from capmerge.metadata.codec import NotJsonError, Stray, decode
from capmerge.metadata.format import INDEX
from capmerge.metadata.parquet_columns import MAGIC as PARQUET_MAGIC
from capmerge.metadata.shard_files import open_lines

Indexable = FileSource | ChainedSource
"""Metadata whose records can be read one by one."""

KIND, VERSION = "capmerge.index", 2

ROW = np.dtype(
    [
        ("offset", "<u8"),
        ("stem_hash", "<u8"),
        ("length", "<u4"),
        ("checksum", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("tokens_sd1", "<u4"),
        ("tokens_sd2", "<u4"),
        ("chunks_sd1", "<u4"),
        ("chunks_sd2", "<u4"),
        ("leads", "u1"),
    ]
)
"""The columns in the order of the file, 49 bytes per record."""
TOKEN_COLUMNS = ("tokens_sd1", "tokens_sd2", "chunks_sd1", "chunks_sd2")
"""The columns that `Index.longest_alternative` reads, left out where no tokens were counted."""
_SCHEMA = Schema(
    KIND,
    VERSION,
    {"layout": get_args(Kind), "fingerprint": str, "repeated": int, "without_resolution": int},
    {name: ROW[name] for name in ROW.names or ()},
    optional=TOKEN_COLUMNS,
)


class Index:
    """The opened index of `metadata`: one row per record, in the order of the file.

    Each column is a read-only array mapped from disk. Every process maps the same pages, so its
    private memory stays small at any number of records. A pickled index is opened again by its
    path. Threads and processes may share one. `open_index` and `build.ensure_index` return it.
    """

    def __init__(self, metadata: Path, source: Indexable, columns: Columns) -> None:
        self.metadata = metadata
        """The file, or the folder of shards."""
        self.path = columns.path
        self.fingerprint: str = columns.about["fingerprint"]
        """The metadata's size and the hash of 64 evenly spaced blocks, in hexadecimal digits."""
        self.kind: Kind = columns.about["layout"]
        """The format of the metadata: JSON or JSON lines."""
        self.repeated: int = columns.about["repeated"]
        """The number of records left out because their key occurs again further on in the file.

        `json.load` too keeps only the last record of a key.
        """
        self.without_resolution: int = columns.about["without_resolution"]
        """The number of records whose width and height are 0."""
        self.offset: NDArray[np.uint64] = columns["offset"]
        """The offset of each record's bytes: its member `"key": {...}`, or its line."""
        self.length: NDArray[np.uint32] = columns["length"]
        """The number of those bytes."""
        self.checksum: NDArray[np.uint32] = columns["checksum"]
        """The CRC-32 of those bytes."""
        self.width: NDArray[np.uint32] = columns["width"]
        """The width in px of `train_resolution`; 0 where it is not two whole numbers above 0.

        It is the bucket of latents with a legacy name; those of other names tell their own size.
        """
        self.height: NDArray[np.uint32] = columns["height"]
        """The height in px, by the rule of `width`."""
        self.stem_hash: NDArray[np.uint64] = columns["stem_hash"]
        """The hash of each key's stem, by `latent_names.hash_of`."""
        self.leads: NDArray[np.uint8] = columns["leads"]
        """The direction of each key's stem: `INSIDE`, `ABSOLUTE` or `ABOVE` of `latent_names`."""
        self._columns = columns
        self._source = source
        weakref.finalize(self, source.close)

    def __len__(self) -> int:
        return self._columns.rows

    def __reduce__(self) -> tuple[Any, ...]:
        chain = self._source if isinstance(self._source, ChainedSource) else None
        return _open_again, (self.metadata, chain, self.path, self.fingerprint)

    @property
    def has_tokens(self) -> bool:
        """True if tokens were counted when the index was made."""
        return TOKEN_COLUMNS[0] in self._columns

    def longest_alternative(
        self, unit: Literal["tokens", "chunks"], tokenizer: Literal["sd1", "sd2"]
    ) -> NDArray[np.uint32]:
        """Return the column with the size of each record's longest alternative in this unit.

        Tokens are without BOS and EOS, with in-line wildcards at their longest; chunks are those
        that AUTOMATIC1111 cuts. SD 1 and SDXL share the tokenizer `sd1`. Raises `UsageError` when
        the index was made without token lengths.
        """
        if not self.has_tokens:
            raise UsageError(
                f"{printable(str(self.path))}: it was made without token lengths. "
                f"Count them: capmerge index {printable(str(self.metadata))}"
            )
        return self._columns[f"{unit}_{tokenizer}"]

    def read(self, number: int) -> tuple[str, dict[str, Any]]:
        """Return the key and the record of row `number`, from 0, as `json.load` would read them.

        Lone surrogates, NaN and big integers are read too. Raises `StaleError` when the metadata
        do not hold the record there, or one with other bytes.
        """
        data = self._source.window(int(self.offset[number]), int(self.length[number]))
        if zlib.crc32(data) != self.checksum[number]:
            raise self._changed(number)
        try:
            pairs = [*decode(data, self.kind, last=False).pairs]
        except NotJsonError:
            pairs = []
        if len(pairs) == 1:
            key, record = pairs[0]
            if (
                not isinstance(record, Stray)
                and hash_of(stem_of(key).text) == self.stem_hash[number].tobytes()
            ):
                return key, record
        raise self._changed(number)

    def place_of(self, number: int) -> tuple[str, int]:
        """Return the file that holds record `number`, and the offset in it."""
        return self._source.place_of(int(self.offset[number]))

    def rows_of(self, key: str) -> list[int]:
        """Return the number of the row of the record with this key; an empty list without one.

        Raises `StaleError` as `read` does.
        """
        hashed = np.frombuffer(hash_of(stem_of(key).text), self.stem_hash.dtype)
        numbers = np.flatnonzero(self.stem_hash == hashed).tolist()
        return [number for number in numbers if self.read(number)[0] == key]

    def records_fingerprint(self) -> str:
        """Return a hash of the checksums of all records."""
        return hashlib.blake2b(self.checksum.data, digest_size=16).hexdigest()

    def _changed(self, number: int) -> StaleError:
        name, offset = self.place_of(number)
        return StaleError(
            f"{printable(name)}, byte {offset:,}: this is not record {number} of its index, so the "
            f"file has changed since. {remedy(self.metadata, self.path)} --force"
        )


def index_path(metadata: Path, at: Path | None = None) -> Path:
    """Return the path of the index of `metadata`: `at`, or beside the file itself, links followed.

    Raises `UsageError` when `at` is something else than an older index, which would be lost.
    """
    if at is None:
        return side_path(metadata.resolve(), INDEX)
    if os.path.lexists(at) and not (at.is_file() and has_columns(at)):
        raise UsageError(
            f"{printable(str(at))}: found something else than an index there, expected a free "
            "name or an older index, because the file is replaced. Choose another path."
        )
    return at


def open_index(metadata: Path, at: Path | None = None) -> Index:
    """Open the index of `metadata`, which is `at` that path or beside the metadata.

    Raises `StaleError` when it is missing, broken, of another version, or was made of other content
    than the file has now; `UsageError` when the metadata cannot be read, or are compressed.
    """
    path = index_path(metadata, at)
    with ExitStack() as stack:
        source = stack.enter_context(closing(open_indexable(metadata)))
        found = fingerprint_text(source)
        columns = _columns(metadata, path)
        if columns.about.get("fingerprint") != found:
            raise StaleError(
                f"{printable(str(columns.path))}: it was made of other content than "
                f"{printable(metadata.name)} has now. {remedy(metadata, path)}"
            )
        stack.pop_all()
    return Index(metadata, source, columns)


def open_indexable(metadata: Path) -> Indexable:
    """Open the metadata: a file of JSON or JSON lines, or a folder of files of JSON lines.

    Raises `UsageError` for anything else, whose records have no offsets.
    """
    if metadata.is_dir():
        return open_lines(metadata)
    shown = printable(str(metadata))
    if metadata.is_fifo():  # opening it would wait for a writer
        raise _no_offsets_of_pipe(shown)
    source = open_source(str(metadata))
    if not isinstance(source, FileSource):
        compressed = source.total_bytes is not None
        source.close()
        raise _no_offsets(shown, "a compressed file") if compressed else _no_offsets_of_pipe(shown)
    if source.window(0, len(PARQUET_MAGIC)) == PARQUET_MAGIC:
        source.close()
        raise _no_offsets(shown, "Parquet")
    return source


def _no_offsets(shown: str, found: str) -> UsageError:
    return UsageError(
        f"{shown}: found {found}, which has no offsets to read records by, expected plain JSON or "
        f"JSON lines. Make that of it first: capmerge convert {shown} -o NEW.json"
    )


def _no_offsets_of_pipe(shown: str) -> UsageError:
    return UsageError(
        f"{shown}: found a pipe, which has no offsets to read records by. "
        "Write it to a file first, then index that."
    )


def _columns(metadata: Path, path: Path, *, read_all: bool = True) -> Columns:
    columns = Columns(path, _SCHEMA, remedy(metadata, path), read_all=read_all)
    # Padding is zero like the rows that a too large row count reads from it; no record is empty.
    if columns.rows and not columns["length"][-1]:
        raise StaleError(
            f"{printable(str(path))}: the file is broken: found no record in the last of its "
            f"{columns.rows:,} rows. {remedy(metadata, path)}"
        )
    return columns


def _open_again(metadata: Path, chain: ChainedSource | None, path: Path, fingerprint: str) -> Index:
    """Open a pickled index, whose fit to the metadata was checked when it was first opened.

    A folder is the `chain` of then, even if it has more files by now.
    """
    columns = _columns(metadata, path, read_all=False)
    if columns.about.get("fingerprint") != fingerprint:
        raise StaleError(f"{printable(str(path))}: it was replaced while it was in use. Run again.")
    return Index(metadata, chain or open_indexable(metadata), columns)


def remedy(metadata: Path, path: Path) -> str:
    """Return the last sentence of every message about an index that has to be made anew."""
    out = "" if path == index_path(metadata) else f" --out {printable(str(path))}"
    return f"Build it again: capmerge index {printable(str(metadata))}{out}"
