"""The work of `rewrite` and `stats` on each block: decode, merge, encode and count its records."""

from collections.abc import Callable, Collection, Iterator
from typing import TYPE_CHECKING, Literal, NamedTuple

from capmerge.captions.fields import MARK
from capmerge.captions.like_names import keep_few_names
from capmerge.captions.merge import Merger, RewrittenError
from capmerge.captions.tally import Tally, add_counts
from capmerge.captions.templates import MergeOptions
from capmerge.captions.written import BrokenRecordError
from capmerge.errors import DataError, RecordError
from capmerge.files.atomic import Buffer
from capmerge.metadata.blocks import PIECE_BYTES, Block, FileLayout
from capmerge.metadata.codec import Records, Stray
from capmerge.metadata.encoding import encode, to_json
from capmerge.metadata.format import FRAMINGS, Format, reserved_fields
from capmerge.metadata.offsets import spans_written
from capmerge.metadata.pieces import Piece, iter_block, place_of
from capmerge.metadata.work import Chunk
from capmerge.stats.repeated_keys import KeyNotes

if TYPE_CHECKING:
    from capmerge.index.rows import RowMaker
    from capmerge.stats.counts import CaptionStats
    from capmerge.stats.observer import Observer

OnError = Literal["stop", "skip"]
_PIECE_BYTES_TO_FIT = 4 * PIECE_BYTES
"""Pieces of a block leave the processor's cache, and those of `PIECE_BYTES` have few lines."""


class Counted(NamedTuple):
    """The counts of a worker."""

    tally: Tally
    stats: "CaptionStats | None" = None
    """None where no observer counts."""

    def add(self, other: "Counted") -> None:
        """Add the counts of `other`, which is not used again."""
        add_counts(self.tally, other.tally)
        keep_few_names(self.tally)
        if self.stats and other.stats:
            self.stats.merge(other.stats)


class BlockMerger:
    """The work on each block of a rewrite, or of statistics alone when `out` is None.

    `make_observer` makes the observer that counts the merged records, `make_rows` the `RowMaker`
    that notes them for an index, and `make_keys` the `KeyNotes`; each may be None. The streams are
    "records" and "rejects" of a rewrite, "hashes", "per_record", "places" and "loops" of an
    observer, "rows" of an index, and "keys" and "doubled" of `KeyNotes`.
    """

    def __init__(
        self,
        name: str,
        layout: FileLayout,
        merge: MergeOptions,
        on_error: str,
        out: Format | None,
        make_observer: "Callable[[], Observer] | None" = None,
        make_rows: "Callable[[], RowMaker] | None" = None,
        make_keys: Callable[[], KeyNotes] | None = None,
    ) -> None:
        self._name, self._layout, self._out = name, layout, out
        self._merger = Merger(merge, reserved_fields(out) if out else ())
        self._observer = make_observer and make_observer()
        self._rows = make_rows and make_rows()
        self._keys = make_keys and make_keys()
        self._skips = on_error == "skip"
        self.counts = _MergeCounts(self._merger, self._observer)

    def run(self, block: Block, data: bytes) -> Iterator[Chunk]:
        """The merged records of a block as the output holds them, and those that were left out."""
        # --fit counts the tokens of some hundred records at a time.
        piece_bytes = _PIECE_BYTES_TO_FIT if self._merger.options.fit_tokens else None
        written_bytes = 0
        for piece in iter_block(data, self._layout, block, piece_bytes):
            records, left_out, rejects = self.merge(piece)
            if self._observer:
                self._observe(self._observer, piece, left_out)
            if self._keys:
                self._keys.note(records.keys(), piece.records.doubled_keys())
            if self._out is None:
                continue
            if body := encode(records, self._out.kind):
                separator = FRAMINGS[self._out.kind].separator if written_bytes else b""
                start = written_bytes + len(separator)
                written_bytes = start + len(body)
                if self._rows:
                    spans = spans_written(body, self._out.kind, len(records.pairs))
                    self._note_rows(self._rows, piece, left_out, spans, start, memoryview(body))
                for part in self._out.parts(separator, body):
                    yield "records", part
            if rejects:
                yield "rejects", rejects

    def flush(self) -> Iterator[Chunk]:
        """The notes on the block's records for statistics, an index and repeated keys."""
        if self._observer:
            hashes, lines, places, loops = self._observer.count()
            yield "hashes", hashes
            if lines:
                yield "per_record", lines
            yield "places", places
            yield "loops", loops
        if self._rows:
            yield "rows", self._rows.rows()
        if self._keys:
            yield from self._keys.take()

    def _observe(self, observer: "Observer", piece: Piece, left_out: Collection[int]) -> None:
        """Note the records of a merged piece."""
        from capmerge.stats.duplicates import RecordPlaces

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
        self,
        rows: "RowMaker",
        piece: Piece,
        left_out: Collection[int],
        spans: list[tuple[int, int]],
        offset: int,
        body: memoryview,
    ) -> None:
        """Note the records of a merged piece for the index.

        `spans` are the first byte and the end of each in `body`, which begins at `offset` in the
        block's output.
        """
        numbered = enumerate(piece.records.pairs)
        kept = ((number, pair) for number, pair in numbered if number not in left_out)
        for (number, (key, record)), (start, end) in zip(kept, spans, strict=True):
            try:
                rows.note(offset + start, body[start:end], key, record)
            except BrokenRecordError as error:
                raise self._error(
                    RecordError, piece, number, str(error), "Rewrite the original again."
                ) from None

    def rewrite(self, piece: Piece) -> tuple[Buffer, bytes]:
        """The records of a piece as the output holds them, and the lines of its rejects.

        A reject is a record that had to be left out; its line is JSON with the reason.
        """
        records, _, rejects = self.merge(piece)
        return encode(records, self._out.kind) if self._out else b"", rejects

    def merge(self, piece: Piece) -> tuple[Records, Collection[int], bytes]:
        """The merged records of a piece, the numbers of those left out, and the lines of these.

        Raises `DataError` for a record that is rewritten already, and `RecordError` for one that
        cannot be merged when such records are not skipped.
        """
        records = piece.records
        failures = self._merger.merge_all(records.values())
        if not failures:
            return records, (), b""
        pairs, rejects = list(records.pairs), []
        for number, error in failures:
            key, record = pairs[number]
            if isinstance(error, RewrittenError):
                problem = (
                    f'found a field "{MARK}": the record is rewritten already, and its braces '
                    "would be doubled again."
                )
                next_step = (
                    "Give the original file, or --allow-rewritten to pass such records through "
                    "unchanged."
                )
                raise self._error(DataError, piece, number, problem, next_step)
            value, problem = (
                (record.value, record.problem)
                if isinstance(record, Stray)
                else (record, str(error))
            )
            if not self._skips:
                hint = getattr(error, "hint", "") or "Mend the record"
                next_step = (
                    f"{hint.removesuffix('.')}, or use --on-error skip to leave such records out "
                    "and list them."
                )
                raise self._error(RecordError, piece, number, problem, next_step)
            rejects.append(to_json({"key": key, "reason": problem, "record": value}) + "\n")
        self._merger.tally.rejected += len(rejects)
        left_out = {number for number, _ in failures}
        kept = [number for number in range(len(pairs)) if number not in left_out]
        exact = frozenset(new for new, number in enumerate(kept) if number in records.exact)
        merged = Records([pairs[number] for number in kept], exact)
        return merged, left_out, "".join(rejects).encode()

    def _error(
        self, kind: type[DataError], piece: Piece, number: int, problem: str, next_step: str
    ) -> DataError:
        """The error for one record, with its place in the source."""
        place = place_of(self._name, self._layout, piece, number)
        return kind(
            self._name, place, list(piece.records.pairs)[number][0] or None, problem, next_step
        )


class _MergeCounts:
    """The counts of a `BlockMerger`: those of its merge, and of its observer if it has one."""

    def __init__(self, merger: Merger, observer: "Observer | None") -> None:
        self._merger, self._observer = merger, observer
        self._kept = self._nothing()

    def take(self) -> Counted:
        """The counts of the last block."""
        tally = self._merger.tally.take()
        if self._observer is None:
            return Counted(tally)
        stats = self._observer.take()
        stats.records.rewritten_before = tally.passed
        return Counted(tally, stats)

    def keep(self, counted: Counted) -> None:
        """Add the counts of a block that is valid."""
        self._kept.add(counted)

    def is_full(self) -> bool:
        """True if the kept counts take so much memory that the parent should add them up."""
        return self._kept.stats is not None and self._kept.stats.is_large

    def result(self) -> Counted:
        """The counts of this process since the last call."""
        kept, self._kept = self._kept, self._nothing()
        if kept.stats:
            kept.stats.count_tags()
        return kept

    def _nothing(self) -> Counted:
        if self._observer is None:
            return Counted(Tally())
        from capmerge.stats.counts import CaptionStats

        return Counted(Tally(), CaptionStats())
