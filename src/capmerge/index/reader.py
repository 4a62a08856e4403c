"""The index of a rewritten metadata file: where each record lies, and what a trainer needs to know of it beforehand.

Owns what the columns mean, which index belongs to which metadata, and the reading of one record by
its number. Knows nothing of how an index is made.
"""

import os
import sys
import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray

from capmerge.errors import StaleError, UsageError, printable
from capmerge.files.atomic import side_path
from capmerge.files.columns import Columns
from capmerge.files.source import FileSource, fingerprint_text, open_source
from capmerge.index.latent_names import hash_of, stem_of
from capmerge.metadata.codec import NotJsonError, Stray, decode
from capmerge.metadata.format import INDEX

if TYPE_CHECKING:
    from capmerge.metadata.blocks import Kind

KIND, VERSION = "capmerge.index", 1

ROW = np.dtype(
    [
        ("offset", "<u8"),
        ("stem_hash", "<u8"),
        ("length", "<u4"),
        ("width", "<u4"),
        ("height", "<u4"),
        ("tokens_sd1", "<u4"),
        ("tokens_sd2", "<u4"),
        ("chunks_sd1", "<u4"),
        ("chunks_sd2", "<u4"),
        ("leads", "u1"),
    ]
)
"""The columns, in the order of the file. 45 bytes a record."""
TOKEN_COLUMNS = ("tokens_sd1", "tokens_sd2", "chunks_sd1", "chunks_sd2")
"""What `Index.longest_alternative` reads; left out where no tokens were counted."""


class Index:
    """The opened index of `metadata`: one record a row, in the order of the file, each column a read-only array mapped from disk.

    Every process maps the same pages, so its private memory stays small at any number of records.
    It can be pickled: it is opened again by its path. Threads and processes may share it. Made by
    `open_index` and `index_build.ensure_index`.
    """

    def __init__(self, metadata: Path, columns: Columns) -> None:
        self.metadata = metadata
        self.path = columns.path
        self.fingerprint: str = columns.about["fingerprint"]
        """Of the metadata: its size and the hash of 64 evenly spaced blocks, in hexadecimal digits."""
        self.kind: Kind = columns.about["layout"]
        """Whether the metadata are JSON or JSON lines."""
        self.repeated: int = columns.about["repeated"]
        """Records that are left out because their key stands in the file again: `json.load` keeps the last."""
        self.without_size: int = columns.about["without_size"]
        """Records whose width and height are 0."""
        self.offset: NDArray[np.uint64] = columns["offset"]
        """Where the bytes of each record begin: its member `"key": {...}`, or its line."""
        self.length: NDArray[np.uint32] = columns["length"]
        """How many bytes those are."""
        self.width: NDArray[np.uint32] = columns["width"]
        """px of `train_resolution`, else of `image_size`; 0 where neither is two whole numbers above 0."""
        self.height: NDArray[np.uint32] = columns["height"]
        """As `width`."""
        self.stem_hash: NDArray[np.uint64] = columns["stem_hash"]
        """`stems.hash_of` the stem of each key."""
        self.leads: NDArray[np.uint8] = columns["leads"]
        """Where the stem of each key leads, as `stems` numbers it."""
        self._columns = columns
        try:
            self._descriptor = os.open(metadata, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        except OSError as error:
            raise UsageError(
                f"{printable(str(metadata))}: the file cannot be read ({error.strerror})."
            ) from error
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self._columns.rows

    def __reduce__(self) -> tuple[Any, ...]:
        return _open_again, (self.metadata, self.path, self.fingerprint)

    @property
    def has_tokens(self) -> bool:
        """Whether tokens were counted when the index was made."""
        return TOKEN_COLUMNS[0] in self._columns

    def longest_alternative(
        self, unit: Literal["tokens", "chunks"], tokenizer: Literal["sd1", "sd2"]
    ) -> NDArray[np.uint32]:
        """The column with the size of each record's longest alternative, in tokens or in chunks.

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
        """Key and record `number`, from 0: what `json.load` would read, lone surrogates, NaN and big integers included.

        Raises `StaleError` when the metadata do not hold it there.
        """
        data = _read_at(self._descriptor, int(self.length[number]), int(self.offset[number]))
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
        raise StaleError(
            f"{printable(str(self.metadata))}, byte {int(self.offset[number]):,}: this is not record {number} of its index, "
            f"so the file has changed since. {_remedy(self.metadata)}"
        )


def index_path(metadata: Path) -> Path:
    """Where the index of `metadata` lies: beside it, links followed."""
    return side_path(metadata.resolve(), INDEX)


def open_index(metadata: Path) -> Index:
    """The index of `metadata`.

    Raises `StaleError` when it is missing, broken, of another version, or of other metadata than
    lie there now; `UsageError` when the metadata cannot be read, or are compressed.
    """
    with open_indexable(metadata) as source:
        found = fingerprint_text(source)
    columns = _columns(metadata, index_path(metadata))
    if columns.about.get("fingerprint") != found:
        raise StaleError(
            f"{printable(str(columns.path))}: it was made of other content than {printable(metadata.name)} has now. {_remedy(metadata)}"
        )
    return Index(metadata, columns)


def open_indexable(metadata: Path) -> FileSource:
    """The opened metadata; raises `UsageError` for what has no offsets: gzip, pipes."""
    source = open_source(str(metadata))
    if isinstance(source, FileSource):
        return source
    compressed = source.total_bytes is not None
    source.close()
    shown = printable(str(metadata))
    if compressed:
        raise UsageError(
            f"{shown}: found gzip, which has no offsets to read records by. Unzip it first (gunzip -k), then index that."
        )
    raise UsageError(
        f"{shown}: found a pipe, which has no offsets to read records by. Write it to a file first, then index that."
    )


def _columns(metadata: Path, path: Path) -> Columns:
    return Columns(path, KIND, VERSION, _remedy(metadata))


def _open_again(metadata: Path, path: Path, fingerprint: str) -> Index:
    """A pickled index; whether it fits the metadata was found when it was opened first."""
    columns = _columns(metadata, path)
    if columns.about.get("fingerprint") != fingerprint:
        raise StaleError(f"{printable(str(path))}: it was replaced while it was in use. Run again.")
    return Index(metadata, columns)


def _remedy(metadata: Path) -> str:
    return f"Make it anew: capmerge index {printable(str(metadata))}"


if sys.platform == "win32":
    _LOCK = threading.Lock()

    def _read_at(descriptor: int, size: int, offset: int) -> bytes:
        with _LOCK:
            os.lseek(descriptor, offset, os.SEEK_SET)
            return os.read(descriptor, size)
else:

    def _read_at(descriptor: int, size: int, offset: int) -> bytes:
        data = os.pread(descriptor, size, offset)
        while len(data) < size and (
            more := os.pread(descriptor, size - len(data), offset + len(data))
        ):
            data += more
        return data
