"""The work of `capmerge verify`: it reads source and output side by side and proves every record.

There are two proofs for each record. First, the record that the merge rules give must equal the one
in the output, field by field, in order and type. Second, sd-scripts' own grammar, read over the
caption in the output, must give exactly the texts that the templates ask for, with their
probabilities.

Neither file is read by the code that cut or wrote it: `proof` has readers of its own. A worker
process compares a block of the source with the bytes that the output probably has for it. Where it
finds a difference, or the bytes are not where they were expected, workers answer with a digest per
record, and the two streams of digests are compared here. A record is read again only to say how it
differs. Only a few blocks of each file are in memory.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from capmerge.captions.fields import MARK
from capmerge.captions.line_counts import MOST_LINES
from capmerge.captions.merge import Merger
from capmerge.captions.templates import MergeOptions
from capmerge.errors import DataError, quoted
from capmerge.files.source import FileSource, Source
from capmerge.metadata.blocks import Block, FileLayout, read_layout
from capmerge.metadata.format import Format, reserved_fields
from capmerge.metadata.parallel import useful_jobs
from capmerge.processes import START_METHOD
from capmerge.proof.alignment import Alignment
from capmerge.proof.difference import RUN_AGAIN, difference, record_at
from capmerge.proof.digests import (
    Answer,
    BlockDigests,
    Event,
    FileToRead,
    Task,
    digest_of,
)
from capmerge.proof.output import OutputPlace
from capmerge.proof.pool import Here, Workers
from capmerge.proof.rejects import Listed, iter_rejects, wrong_reject
from capmerge.proof.streams import AnswerStream


@dataclass(slots=True)
class Verified:
    """The counts of what was proven."""

    records: int = 0
    rejected: int = 0
    passed: int = 0
    doubled: int = 0
    """Records of the source that have a field more than once, of which the last counts."""
    without_size: int = 0
    """Records of the output without a `train_resolution` and an own size that can be read."""
    too_many_outcomes: int = 0
    """Records whose intended wildcards give more texts than are listed.

    Only the first proof is made for them.
    """
    by_json: int = 0
    """Records of the source that Python's json had to read, since ijson would change them."""

    def text(self) -> str:
        """One line for a terminal, and one for each exception."""
        counted = f"{self.records:,} records are as expected and in order"
        lines = [f"verified: {counted}, and the output holds nothing else."]
        if self.rejected:
            lines.append(f"could not be merged, and listed whole: {self.rejected:,}")
        if self.passed:
            lines.append(f"already rewritten in the source, and unchanged: {self.passed:,}")
        if self.doubled:
            lines.append(f"with a field more than once, of which the last counts: {self.doubled:,}")
        if self.without_size:
            lines.append(f"without a size (train_resolution or image_size): {self.without_size:,}")
        if self.too_many_outcomes:
            lines.append(
                "right to the byte, but with too many wildcard outcomes to list: "
                f"{self.too_many_outcomes:,}"
            )
        if self.by_json:
            lines.append(
                f"read by Python's json, because ijson would have changed them: {self.by_json:,}"
            )
        return "\n".join(lines)

    def add(self, counts: Mapping[str, int]) -> None:
        """Add the counts of one block."""
        for name, count in counts.items():
            setattr(self, name, getattr(self, name) + count)


def verify(
    source: Source,
    written: Source,
    merge: MergeOptions,
    *,
    skips: bool,
    max_record_bytes: int,
    jobs: int = 1,
    progress: Callable[[int], None] | None = None,
    start_method: str | None = None,
) -> Verified:
    """Prove that `written` is `source` rewritten with `merge`, and return the counts.

    `skips` says that records which cannot be merged are in OUT.rejects.jsonl. `jobs` is the number
    of processes that work on the files, and `start_method` is as for `run_blocks`. Raises
    `DataError` at the first difference, with its place in the output.
    """
    # Weights make the records of the output longer.
    layout = read_layout(source, max_record_bytes)
    out_layout = read_layout(written, max_record_bytes * MOST_LINES, may_be_empty=True)
    reserved = reserved_fields(Format(out_layout.kind))
    jobs = useful_jobs(source, jobs)
    start_method = start_method or START_METHOD
    forked = jobs == 1 or start_method == "fork"
    make_work = partial(
        BlockDigests,
        _to_read(source, layout),
        _to_read(written, out_layout),
        merge,
        reserved,
        forked=forked,
    )
    with Here(make_work) if jobs == 1 else Workers(make_work, jobs, start_method) as workers:
        comparison = _Comparison(
            AnswerStream(source, layout, "source", Alignment(source, layout, written, out_layout)),
            AnswerStream(written, out_layout, "output"),
            workers,
            Merger(merge, reserved),
            iter_rejects(written.name) if skips else iter(()),
            forked=forked,
        )
        verified = comparison.run(progress)
    source.check_unchanged()
    written.check_unchanged()
    return verified


def _to_read(source: Source, layout: FileLayout) -> FileToRead:
    file = None
    if isinstance(source, FileSource):
        assert source.path is not None  # a file has one
        file = source.path, source.identity
    return FileToRead(source.name, file, layout)


class _Comparison:
    """The comparison of what the source asks for with what the output holds."""

    def __init__(
        self,
        source: AnswerStream,
        output: AnswerStream,
        workers: Here | Workers,
        merger: Merger,
        rejects: Iterator[Listed],
        *,
        forked: bool,
    ) -> None:
        self._source, self._forked = source, forked
        self._output, self._out_name = OutputPlace(output, workers), output.source.name
        self._workers, self._merger, self._rejects = workers, merger, rejects
        self._verified = Verified()

    def run(self, progress: Callable[[int], None] | None) -> Verified:
        """Compare all records; raises `DataError` at the first difference."""
        verified = self._verified
        while found := self._next_block():
            (_, block, _, out), answer = found
            if out and answer.same is not None and not self._output.is_at(out.start):
                # Its bytes were guessed wrong, although they hold these records, too.
                answer = self._source.again(self._workers, block)
            # Records that need a word of their own stand between runs of records that do not.
            done = 0
            for event in answer.events:
                self._match(block, answer, done, event.after)
                done = event.after
                self._check_event(block, event)
            self._match(block, answer, done, answer.same or len(answer.digests))
            if out and answer.same is not None:
                self._output.go_behind(out, last=block.last)
            verified.add(answer.counts)
            if answer.broken_at is None:
                self._source.source.release(block.next_start)
                if progress:
                    progress(block.end)

        # Nothing else may be in the output or among the rejects.
        if self._output.has_record():
            raise self._wrong_output(
                "found a record that is not in the source, expected the end of the file."
            )
        if (listed := next(self._rejects, None)) is not None:
            raise wrong_reject(listed, None, None, self._out_name)
        return verified

    def _next_block(self) -> tuple[Task, Answer] | None:
        """Return the next block of the source and its answer; hand out more blocks first."""
        self._source.fill(self._workers)
        return self._source.next()

    def _match(self, block: Block, answer: Answer, start: int, end: int) -> None:
        """Compare the records that digests [start, end) of a block of the source ask for."""
        if answer.same is not None:
            self._verified.records += end - start
            return
        while start < end:
            if not self._output.has_record():
                key, _ = self._source_record(block, answer.events, start)
                problem = f"the output ends before record {quoted(key)} of the source."
                raise DataError(self._out_name, None, None, problem, RUN_AGAIN)
            same, is_other = self._output.go_on(answer.digests[start:end])
            self._verified.records += same
            start += same
            if is_other:
                raise self._difference(block, answer, start)

    def _check_event(self, block: Block, event: Event) -> None:
        """Raise `DataError` for a record that is wrong, or is not listed as it should be."""
        match event.kind:
            case "rejected":
                listed = next(self._rejects, None)
                if not self._is_listed(listed, event):
                    _, (key, record), _ = record_at(
                        self._source.source, self._source.layout, block, event.number
                    )
                    raise wrong_reject(listed, key, record, self._out_name)
                self._verified.rejected += 1
            case "rewritten":
                source = self._source
                place, (key, _), _ = record_at(source.source, source.layout, block, event.number)
                problem = f'found a field "{MARK}" in the source: it is rewritten already.'
                raise DataError(source.source.name, place, key, problem, "Give the original file.")
            case "misread":
                self._output.go_back()
                raise self._wrong_output(event.problem)

    def _is_listed(self, listed: Listed | None, event: Event) -> bool:
        """Return whether `listed`, the next line of the rejects, is the record of an event."""
        if listed is None or len(listed) == 1:
            return False
        return digest_of(*listed, forked=self._forked) == event.digest

    def _difference(self, block: Block, answer: Answer, number: int) -> DataError:
        """Return the error for the next record of the output, which is not as digest `number`."""
        key, record = self._source_record(block, answer.events, number)
        self._merger.merge_all([record])
        _, (found_key, found), is_doubled = self._output.record()
        problem = difference(key, record, found_key, found)
        if not problem:
            assert is_doubled, f"two equal records {key!r} have different digests"
            problem = "found a field more than once, expected each of them once."
        return self._wrong_output(problem)

    def _source_record(self, block: Block, events: Sequence[Event], number: int) -> tuple[str, Any]:
        """Return the record of the source that digest `number` of a block belongs to."""
        rejected = sum(event.kind == "rejected" and event.after <= number for event in events)
        _, (key, record), _ = record_at(
            self._source.source, self._source.layout, block, number + rejected
        )
        return key, record

    def _wrong_output(self, problem: str) -> DataError:
        """Return the error for the next record of the output."""
        place, (key, _), _ = self._output.record()
        return DataError(self._out_name, place, key, problem, RUN_AGAIN)
