"""The building of an index: metadata -> blocks -> rows of the records -> one file of columns.

Workers note the records of their blocks, and the parent collects the rows and leaves out repeated
keys. `capmerge index` and `capmerge rewrite --index` both build by this module.
"""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from capmerge.captions.fields import MARK
from capmerge.captions.written import BrokenRecordError, is_rewritten
from capmerge.errors import DataError, StaleError
from capmerge.files.atomic import AtomicFile, ScratchFile
from capmerge.files.chained import ChainedSource
from capmerge.files.columns import Column, opened_or_made, write_columns
from capmerge.files.source import Source, fingerprint_text
from capmerge.index.reader import (
    KIND,
    ROW,
    TOKEN_COLUMNS,
    VERSION,
    Index,
    index_path,
    open_index,
    open_indexable,
    remedy,
)
from capmerge.index.rows import RowMaker, RowSink
from capmerge.metadata.blocks import MAX_RECORD_BYTES, Block, FileLayout, Kind, read_layout
from capmerge.metadata.codec import Stray, decode
from capmerge.metadata.offsets import iter_placed
from capmerge.metadata.parallel import run_blocks, useful_jobs
from capmerge.metadata.shard_files import check_lines
from capmerge.metadata.work import Chunk

Progress = Callable[[int], None]


def ensure_index(
    metadata: Path,
    *,
    at: Path | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
    tokens: bool | None = None,
    max_record_bytes: int = MAX_RECORD_BYTES,
    tell: Callable[[str], None] | None = None,
) -> Index:
    """Return the index of `metadata`, built first if there is none that fits.

    It is the file `at` that path, or beside the metadata. One process builds it, while others that
    ask for it wait. `progress` is told the offset that is done, and `tell` why an older index is
    built again. `tokens` says if the index must be one with token lengths; None takes one without,
    but builds one with them. Raises what `build_index` raises.
    """
    path = index_path(metadata, at)
    stale: list[str] = []

    def look() -> Index | None:
        try:
            index = open_index(metadata, at)
        except StaleError as error:
            stale[:] = [str(error).removesuffix(remedy(metadata, path))] if path.exists() else []
            return None
        return index if tokens is None or index.has_tokens == tokens else None

    def make(file: AtomicFile) -> Index:
        for problem in stale:
            if tell:
                tell(f"{problem}It is built again.")
        return _build(
            metadata, file, jobs, progress, max_record_bytes, None, tokens=tokens is not False
        )

    return opened_or_made(path, look, make)


def build_index(
    metadata: Path,
    *,
    at: Path | None = None,
    jobs: int = 1,
    progress: Progress | None = None,
    tokens: bool = True,
    rewritten: bool = True,
    max_record_bytes: int = MAX_RECORD_BYTES,
    start_method: str | None = None,
) -> Index:
    """Build a new index of `metadata`, even if there is one already.

    It is written `at` that path, or beside the metadata. Any number of `jobs` gives the same bytes.
    An index that is not of `rewritten` records takes records of any kind, and cannot be trained by:
    it has no `tokens`.
    Raises `UsageError` for metadata without offsets or another file `at` that path, `DataError`
    for one that is damaged or not rewritten, `OutputError` (`BusyError` while another process
    builds it) or `WorkerError`; an older index then stays as it was.
    """
    open_indexable(metadata).close()  # raises its errors before there is a file
    with AtomicFile(index_path(metadata, at)) as file:
        return _build(
            metadata,
            file,
            jobs,
            progress,
            max_record_bytes,
            start_method,
            tokens=tokens and rewritten,
            rewritten=rewritten,
        )


class Indexing:
    """The parent's side of building the index `path`: collecting rows, then writing the file.

    `rows` is the sink for the rows from the workers, and `block_start` is handed on to it. This is
    a context manager, because the rows are kept in a scratch file.
    """

    def __init__(
        self,
        path: Path,
        kind: Kind,
        block_start: Callable[[], int] | None = None,
        *,
        tokens: bool = True,
        rewritten: bool = True,
    ) -> None:
        self._kind, self._tokens, self._rewritten = kind, tokens, rewritten
        self._scratch = ScratchFile(path)
        self.rows = RowSink(self._scratch, block_start)

    def make_rows(self) -> Callable[[], RowMaker]:
        """Return a function that makes each worker its `RowMaker`; it can be pickled."""
        return partial(RowMaker, tokens=self._tokens, rewritten=self._rewritten)

    def write(self, file: AtomicFile, metadata: Source) -> None:
        """Write the index of the whole `metadata` into `file`."""
        _write(file, self.rows, metadata, self._kind, tokens=self._tokens)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.close()


def _build(
    metadata: Path,
    file: AtomicFile,
    jobs: int,
    progress: Progress | None,
    max_record_bytes: int,
    start_method: str | None,
    *,
    tokens: bool,
    rewritten: bool = True,
) -> Index:
    with open_indexable(metadata) as source:
        if isinstance(source, ChainedSource):
            check_lines(source)
        layout = read_layout(source, max_record_bytes, may_be_empty=True)
        with Indexing(file.target, layout.kind, tokens=tokens, rewritten=rewritten) as indexing:
            run_blocks(
                source,
                layout,
                partial(_Indexer, source.name, layout, indexing.make_rows(), rewritten=rewritten),
                {"rows": indexing.rows},
                jobs=useful_jobs(source, jobs),
                progress=progress,
                start_method=start_method,
            )
            source.check_unchanged()  # else the rows' offsets may lead anywhere
            indexing.write(file, source)
        source.check_unchanged()
        file.publish()
    return open_index(metadata, file.target)


class _Indexer:
    """The work of a worker on each block: to note its records and make their rows."""

    counts = None

    def __init__(
        self,
        name: str,
        layout: FileLayout,
        make_rows: Callable[[], RowMaker],
        *,
        rewritten: bool,
    ) -> None:
        self._name, self._layout, self._rewritten = name, layout, rewritten
        self._rows = make_rows()

    def run(self, block: Block, data: bytes) -> Iterator[Chunk]:
        """Note the records of a block and yield nothing; `flush` makes their rows together."""
        view = memoryview(data)
        for start, end, (key, record) in iter_placed(self._name, self._layout, block, data):
            if not (is_rewritten(record) if self._rewritten else isinstance(record, dict)):
                raise self._error(start, key, record)
            try:
                member = view[start - block.start : end - block.start]
                self._rows.note(start, member, key, record)
            except BrokenRecordError as error:
                next_step = "Rewrite the original again, and index that."
                raise DataError(self._name, start, key, str(error), next_step) from None
        return iter(())

    def flush(self) -> Iterator[Chunk]:
        """Yield the rows of the block's records."""
        yield "rows", self._rows.rows()

    def _error(self, start: int, key: str, record: Any) -> DataError:
        if isinstance(record, Stray):
            return DataError(self._name, start, None, record.problem, "Mend the line.")
        if not self._rewritten:
            problem = f"found {type(record).__name__} as the record, expected an object."
            return DataError(self._name, start, key, problem, "Mend the record.")
        problem = f'found a record without "{MARK}", expected one that capmerge rewrite wrote.'
        return DataError(
            self._name,
            start,
            key,
            problem,
            "Give the original file to capmerge rewrite, and index its output.",
        )


def _write(file: AtomicFile, rows: RowSink, source: Source, kind: Kind, *, tokens: bool) -> None:
    """Write the index of `source` from the rows of all its records."""
    kept = np.ones(rows.count, bool)
    kept[_repeated(rows, source, kind)] = False
    count = int(np.count_nonzero(kept))
    names = [name for name in ROW.names or () if tokens or name not in TOKEN_COLUMNS]
    width = _kept_parts(rows, kept, "width")
    about = {
        "kind": KIND,
        "version": VERSION,
        "layout": kind,
        "fingerprint": fingerprint_text(source),
        "repeated": rows.count - count,
        "without_resolution": sum(int(np.count_nonzero(part == 0)) for part in width),
    }
    columns = {
        name: Column(ROW[name], (part.tobytes() for part in _kept_parts(rows, kept, name)))
        for name in names
    }
    write_columns(file, about, count, columns)


def _repeated(rows: RowSink, source: Source, kind: Kind) -> NDArray[np.int64]:
    """Return the numbers of the rows whose key occurs again further on in the file.

    Equal keys have equal stems, so only rows whose stem hashes agree are compared, by their real
    keys.
    """
    # Collect the hashes that occur more than once.
    ordered = rows.column("stem_hash")
    ordered.sort()
    doubled = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    del ordered
    if not len(doubled):
        return np.zeros(0, np.int64)

    # Find the rows that have one of these hashes.
    hashes, numbers, places = [], [], []
    done = 0
    for part in rows.parts():
        found = np.minimum(np.searchsorted(doubled, part["stem_hash"]), len(doubled) - 1)
        hits = np.flatnonzero(doubled[found] == part["stem_hash"])
        hashes.append(part["stem_hash"][hits])
        numbers.append(hits + done)
        places.append(np.stack((part["offset"][hits], part["length"][hits]), axis=1))
        done += len(part)
    every_hash, every_number, every_place = (
        np.concatenate(hashes),
        np.concatenate(numbers),
        np.concatenate(places),
    )

    # Read their keys, group by group and in the order of the file; all but the last are repeated.
    last: dict[str, int] = {}
    group, repeated = None, []
    for i in np.lexsort((every_number, every_hash)).tolist():
        if every_hash[i] != group:
            group, last = every_hash[i], {}
        offset, length = every_place[i].tolist()
        key = next(iter(decode(source.window(offset, length), kind, last=False).pairs))[0]
        if key in last:
            repeated.append(last[key])
        last[key] = int(every_number[i])
    return np.array(repeated, np.int64)


def _kept_parts(rows: RowSink, kept: NDArray[np.bool_], name: str) -> Iterator[NDArray[Any]]:
    done = 0
    for part in rows.parts():
        yield part[name][kept[done : done + len(part)]]
        done += len(part)
