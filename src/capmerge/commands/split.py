"""The work of `capmerge split`: source -> blocks -> the part of each record -> files of one folder.

Parts of equal counts need the number of all records, which a survey finds first. Parts of about
equal size and parts by hash are written in one pass.
"""

import re
import sys
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Literal, NamedTuple

from capmerge.commands.split_parts import PartFormat, Parts
from capmerge.commands.targets import check_folder
from capmerge.errors import UsageError
from capmerge.files.atomic import AtomicFile, Buffer
from capmerge.files.folders import publish_folder
from capmerge.files.open_files import allow_open_files
from capmerge.files.scratch import ScratchFolder, spooled
from capmerge.files.source import FileSource, Source
from capmerge.metadata.blocks import MAX_RECORD_BYTES, Block, FileLayout, read_layout
from capmerge.metadata.codec import Pair
from capmerge.metadata.format import Format
from capmerge.metadata.key_bytes import key_bytes
from capmerge.metadata.parallel import run_blocks, useful_jobs
from capmerge.metadata.raw_records import Origin, Passage, iter_raw
from capmerge.metadata.survey import Spans, survey
from capmerge.metadata.work import Chunk, NamedCounts, part_stream

By = Literal["count", "bytes", "hash"]
MOST_PARTS = 99_999
MOST_BY_HASH = 500
"""All parts of a split by hash are open at once, and systems allow some 1,000 open files."""
_MOST_PARQUET_BY_HASH = 16
"""Each open Parquet file waits for the rows of a group, some 64 MB."""
_PART_NAME = re.compile(r"part-\d{5}\.(json|jsonl|parquet)")


@dataclass(frozen=True, slots=True)
class SplitOptions:
    """The options of one run of `capmerge split`."""

    folder: Path
    parts: int
    by: By = "count"
    format: PartFormat | None = None
    """The format of the parts; None for JSON lines if the source has them, and else JSON."""
    jobs: int = 1
    force: bool = False
    max_record_bytes: int = MAX_RECORD_BYTES
    start_method: str | None = None


class Part(NamedTuple):
    """A part as it was written."""

    path: Path
    records: int
    bytes: int


def split(
    source: Source,
    options: SplitOptions,
    *,
    progress: Callable[[int], None] | None = None,
) -> list[Part]:
    """Split `source` into `options.parts` files of one folder, and return these in their order.

    The folder appears when all is done. `progress` is told the offset that is done, once from the
    start for each time that the source is read. Raises `UsageError`, `DataError`, `OutputError` or
    `WorkerError`; then there is no new folder.
    """
    # Checks
    most = _MOST_PARQUET_BY_HASH if options.format == "parquet" else MOST_BY_HASH
    if options.by == "hash" and options.parts > most:
        of_parquet = " of Parquet" * (options.format == "parquet")
        raise UsageError(
            f"-n {options.parts}: a split by hash has at most {most} parts{of_parquet}, because "
            "all of them are written at the same time. Use --by count or --by bytes."
        )
    if options.by == "hash":
        allow_open_files(2 * options.parts)
    target = check_folder(options.folder, source, _PART_NAME, force=options.force)
    with ExitStack() as stack:
        # Temporary folders beside the target; the lock keeps two runs apart.
        stack.enter_context(AtomicFile(target))
        unfinished = stack.enter_context(ScratchFolder(target))
        scratch = stack.enter_context(ScratchFolder(target.with_name(f"{target.name}.spans")))

        # What has to be known of the whole source is found first.
        layout = read_layout(source, options.max_record_bytes, may_be_empty=True)
        if not isinstance(source, FileSource) and options.by != "hash":
            source = stack.enter_context(spooled(source, scratch, "copy", progress))
        spans = None
        if options.by == "hash":
            chosen: Choice = ByHash(options.parts)
        elif options.by == "bytes":
            chosen = ByPlace.of_offsets(layout.first, source.total_bytes or 0, options.parts)
        else:
            assert isinstance(source, FileSource)  # spooled above
            found = survey(
                source,
                layout,
                scratch,
                "source",
                keys=False,
                jobs=options.jobs,
                progress=progress,
                start_method=options.start_method,
            )
            spans = found.spans
            chosen = ByPlace.of_numbers(spans, options.parts)

        # Write the parts.
        name: PartFormat = options.format or layout.kind
        # Workers hand records on as the source has them, where they become rows of Parquet here.
        out = Format(layout.kind if name == "parquet" else name)
        parts = Parts(unfinished, name, out, options.parts, in_order=options.by != "hash")
        total: Counter[str] = Counter()
        run_blocks(
            source,
            layout,
            partial(Splitter, source.name, layout, chosen, out, spans),
            parts.sinks,
            collect=total.update,
            jobs=useful_jobs(source, options.jobs),
            progress=progress,
            start_method=options.start_method,
        )
        source.check_unchanged()
        sizes = parts.finish()
        publish_folder(unfinished.path, target)
    return [
        Part(target / name, total[part_stream(number)], size)
        for number, (name, size) in enumerate(sizes)
    ]


class ByHash(NamedTuple):
    """Chooses a part by the hash of a key: BLAKE2b of 8 bytes, modulo the number of parts."""

    parts: int

    def part_of(self, key: str) -> int:
        """The part of the record with this key."""
        digest = blake2b(key_bytes(key), digest_size=8).digest()
        return int.from_bytes(digest, "big") % self.parts


class ByPlace(NamedTuple):
    """Chooses a part by the place of a record in the source."""

    borders: list[int]
    """The least offset of every part but the first."""

    @classmethod
    def of_offsets(cls, first: int, end: int, parts: int) -> "ByPlace":
        """Parts of about as many bytes of the source each."""
        return cls([first + (end - first) * number // parts for number in range(1, parts)])

    @classmethod
    def of_numbers(cls, spans: Spans, parts: int) -> "ByPlace":
        """Parts of as many records each; the first ones have one more where it does not divide."""
        least, more = divmod(spans.count, parts)
        firsts = [least * number + min(number, more) for number in range(1, parts)]
        return cls([spans.start_of(n) if n < spans.count else sys.maxsize for n in firsts])

    def runs(self, starts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
        """The parts of the records that start at these offsets, and which of them are in each.

        These are a part, and the first of its records and the end among them.
        """
        begin = 0
        while begin < len(starts):
            part = bisect_right(self.borders, starts[begin])
            end = len(starts)
            if part < len(self.borders):
                end = bisect_left(starts, self.borders[part])
            yield part, begin, end
            begin = end


Choice = ByHash | ByPlace


class Splitter:
    """The work of a split on each block: the records of each part, as streams.

    With `spans`, which a survey noted, the records are not decoded again.
    """

    def __init__(
        self, name: str, layout: FileLayout, chosen: Choice, out: Format, spans: Spans | None
    ) -> None:
        self._name, self._layout, self._chosen, self._spans = name, layout, chosen, spans
        self._origin, self._passage = Origin(name, layout), Passage(out)
        self._bodies: dict[int, list[Buffer]] = {}
        self.counts = NamedCounts()

    def run(self, block: Block, data: bytes) -> Iterator[Chunk]:
        """Note the bytes of the records of a block under their parts."""
        if self._spans:
            (_, starts, ends), miscut = self._spans.in_block(block)
            self._note(data, block.start, starts, ends)
            if miscut:
                raise miscut
        else:
            for starts, ends, pairs in iter_raw(self._name, self._layout, block, data):
                self._note(data, block.start, starts, ends, pairs)
        yield from ()

    def _note(
        self,
        data: bytes,
        offset: int,
        starts: Sequence[int],
        ends: Sequence[int],
        pairs: Sequence[Pair] = (),
    ) -> None:
        """Note records with these offsets, where `data` begins at `offset`."""
        firsts, stops = [start - offset for start in starts], [end - offset for end in ends]
        if isinstance(self._chosen, ByPlace):
            for part, begin, end in self._chosen.runs(starts):
                body = self._passage.copied_run(
                    self._origin, data, firsts[begin:end], stops[begin:end]
                )
                self._add(part, body, end - begin)
            return
        texts: dict[int, list[bytes]] = {}
        for first, stop, (key, _) in zip(firsts, stops, pairs, strict=True):
            texts.setdefault(self._chosen.part_of(key), []).append(data[first:stop])
        for part, some in texts.items():
            self._add(part, self._passage.copied(self._origin, some), len(some))

    def _add(self, part: int, body: Buffer, count: int) -> None:
        self._bodies.setdefault(part, []).append(body)
        self.counts.block[part_stream(part)] += count

    def flush(self) -> Iterator[Chunk]:
        """The records of each part."""
        noted, self._bodies = self._bodies, {}
        for part, bodies in noted.items():
            yield part_stream(part), self._passage.joined(bodies)
