"""What a worker does with each block of a rewrite, or of statistics: decode, merge, encode, count, note.

Owns the streams that it answers in, and the formats that it writes. Knows nothing of files.
"""

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from capmerge.captions.fields import MARK
from capmerge.captions.merge import Merger, RewrittenError
from capmerge.captions.tally import Tally, add_counts
from capmerge.captions.templates import MergeOptions
from capmerge.captions.written import BrokenRecordError
from capmerge.errors import DataError, RecordError
from capmerge.files.atomic import Buffer
from capmerge.metadata.blocks import Block, Layout
from capmerge.metadata.codec import (
    MiscutError,
    Piece,
    Records,
    Stray,
    encode,
    iter_block,
    place_of,
    to_json,
)
from capmerge.metadata.format import SEPARATORS, Format, compressed, reserved_fields
from capmerge.metadata.offsets import spans_written
from capmerge.stats.counts import CaptionStats
from capmerge.stats.duplicates import RecordPlaces
from capmerge.stats.observer import Observer

if TYPE_CHECKING:
    from capmerge.index.rows import RowMaker

_OUT, _REJECTS, _ROWS, *STATS_STREAMS = range(6)


OnError = Literal["stop", "skip"]


class Counted(NamedTuple):
    """What a worker has counted."""

    tally: Tally
    stats: CaptionStats


class Rewriter:
    """What a worker does with each block of a rewrite, or of statistics alone when `out` is None.

    `make_observer` gives what counts the rewritten records, if anything does; `make_rows` what
    notes them for an index.
    """

    def __init__(
        self,
        name: str,
        layout: Layout,
        merge: MergeOptions,
        on_error: str,
        out: Format | None,
        make_observer: Callable[[], Observer] | None = None,
        make_rows: "Callable[[], RowMaker] | None" = None,
    ) -> None:
        self._name, self._layout, self._out = name, layout, out
        self._merger = Merger(merge, reserved_fields(out) if out else ())
        self._observer = make_observer and make_observer()
        self._rows = make_rows and make_rows()
        self._kept = Counted(Tally(), CaptionStats())
        self._skips = on_error == "skip"

    def run(self, block: Block, data: bytes) -> Iterator[tuple[int, Buffer]]:
        """The rewritten records of a block, and the records that had to be left out."""
        miscut = None
        try:
            yield from self._run(block, data)
        except MiscutError as error:
            miscut = error  # the pieces before it stand
        if self._observer:
            yield from zip(STATS_STREAMS, self._observer.count(), strict=True)
        if self._rows:
            yield _ROWS, self._rows.rows()
        if miscut:
            raise miscut

    def _run(self, block: Block, data: bytes) -> Iterator[tuple[int, Buffer]]:
        separator = b""
        written_bytes = 0
        whole = (
            self._merger.options.fit_tokens is not None
        )  # the tokens of many records are counted at a time
        for piece in iter_block(data, self._layout, block, whole=whole):
            records, left_out, rejects = self.merge(piece)
            if self._observer:
                self._observe(self._observer, piece, left_out)
            body = encode(records, self._out.kind) if self._out else b""
            if body:
                parts = (separator, body)
                assert self._out is not None  # there is a body
                yield from (
                    (_OUT, part)
                    for part in ((compressed(b"".join(parts)),) if self._out.gz else parts)
                )
                if self._rows:
                    self._note_rows(
                        self._rows, piece, left_out, body, written_bytes + len(separator)
                    )
                    written_bytes += len(separator) + len(body)
                separator = SEPARATORS[self._out.kind]
            if rejects:
                yield _REJECTS, rejects

    def take(self) -> Counted:
        """The counts of the last block."""
        counted = Counted(
            self._merger.tally.take(), self._observer.take() if self._observer else CaptionStats()
        )
        counted.stats.records.rewritten_before = counted.tally.passed
        return counted

    def keep(self, counted: Counted) -> None:
        """Add the counts of a block that stands."""
        add_counts(self._kept.tally, counted.tally)
        self._kept.stats.merge(counted.stats)

    def is_full(self) -> bool:
        """Whether the counts that are kept take so much memory that the parent should add them up."""
        return self._kept.stats.is_large

    def result(self) -> Counted:
        """The counts of this process since the last call."""
        kept, self._kept = self._kept, Counted(Tally(), CaptionStats())
        kept.stats.count_tags()
        return kept

    def _observe(self, observer: Observer, piece: Piece, left_out: Collection[int]) -> None:
        """Note the records of a merged piece."""
        place = RecordPlaces.entry(
            piece.start, len(piece.data), len(piece.records.pairs), last=piece.last
        )
        failures = observer.note(piece.records.pairs, place, left_out)
        if failures and not self._skips:
            number, error = failures[0]
            raise self._error(
                RecordError,
                piece,
                number,
                str(error),
                "Rewrite the original again, or use --on-error skip.",
            )

    def _note_rows(
        self, rows: "RowMaker", piece: Piece, left_out: Collection[int], body: Buffer, offset: int
    ) -> None:
        """Note the records of a merged piece, which are written as `body` at `offset` in the block's output."""
        assert self._out is not None  # there is a body
        numbered = [
            (number, pair)
            for number, pair in enumerate(piece.records.pairs)
            if number not in left_out
        ]
        for (number, (key, record)), (start, end) in zip(
            numbered, spans_written(body, self._out.kind, len(numbered)), strict=True
        ):
            try:
                rows.note(offset + start, offset + end, key, record)
            except BrokenRecordError as error:
                raise self._error(
                    RecordError, piece, number, str(error), "Rewrite the original again."
                ) from None

    def rewrite(self, piece: Piece) -> tuple[Buffer, bytes]:
        """A piece's records as they stand in the output, and a line of JSON for each that had to be left out."""
        records, _, rejects = self.merge(piece)
        return encode(records, self._out.kind) if self._out else b"", rejects

    def merge(self, piece: Piece) -> tuple[Records, Collection[int], bytes]:
        """A piece's records merged, the numbers of those that had to be left out, and a line of JSON for each of them."""
        records = piece.records
        failures = self._merger.merge_all(records.values())
        if not failures:
            return records, (), b""
        pairs, rejects = list(records.pairs), []
        for number, error in failures:
            key, record = pairs[number]
            if isinstance(error, RewrittenError):
                problem = f'found a field "{MARK}": the record is rewritten already, and its braces would double.'
                next_step = "Give the original file, or --allow-rewritten to pass such records through unchanged."
                raise self._error(DataError, piece, number, problem, next_step)
            value, problem = (
                (record.value, record.problem)
                if isinstance(record, Stray)
                else (record, str(error))
            )
            if not self._skips:
                next_step = "Mend the record, or use --on-error skip to leave such records out and list them."
                raise self._error(RecordError, piece, number, problem, next_step)
            rejects.append(to_json({"key": key, "reason": problem, "record": value}) + "\n")
        self._merger.tally.rejected += len(rejects)
        left_out = {number for number, _ in failures}
        kept = [pair for number, pair in enumerate(pairs) if number not in left_out]
        return Records(kept, records.exact), left_out, "".join(rejects).encode()

    def _error(
        self, kind: type[DataError], piece: Piece, number: int, problem: str, next_step: str
    ) -> DataError:
        """The error for one record, with its place in the source."""
        place = place_of(self._name, self._layout, piece, number)
        return kind(
            self._name, place, list(piece.records.pairs)[number][0] or None, problem, next_step
        )
