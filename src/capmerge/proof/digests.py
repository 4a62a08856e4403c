"""What a worker does with a block of the source or of the output.

It knows where the output probably has the records of a block of the source, and compares them at
once (`at_once`). Where they are not equal, or not found, it makes digests: of each record of the
source it makes the record that the merge gives, proves its draws, and answers with a digest of it;
of each record of the output it answers with a digest of the record as it is.
Then the parent finds out which records differ.
"""

import json
import marshal
from array import array
from collections import Counter
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, Literal, NamedTuple

from orjson import JSONEncodeError, dumps

from capmerge.captions.fields import MARK
from capmerge.captions.merge import Merger, RewrittenError
from capmerge.captions.record_texts import copy_of
from capmerge.captions.templates import MergeOptions
from capmerge.captions.wildcard import TooManyOutcomesError
from capmerge.captions.written import BrokenRecordError
from capmerge.files.source import FileSource, Identity, reopen
from capmerge.metadata.blocks import Block, FileLayout
from capmerge.metadata.codec import Stray
from capmerge.proof.alignment import OutputRange
from capmerge.proof.at_once import WrittenBytes
from capmerge.proof.draws import DrawProof
from capmerge.proof.parsers import Pair
from capmerge.proof.reading import BlockReader, Reading

_NO_RECORD = 0
"""Stands for a record that no rewrite writes. A digest is 0 with a probability of 2^-64."""

Side = Literal["source", "output"]
EventKind = Literal["rejected", "rewritten", "misread"]


class FileToRead(NamedTuple):
    """One of the two files, as a worker needs to know it."""

    name: str
    file: tuple[Path, Identity] | None
    """The file as the parent opened it; None if the parent sends the bytes of the blocks."""
    layout: FileLayout


class Task(NamedTuple):
    """A block to work on."""

    side: Side
    block: Block
    data: bytes | None
    """The bytes of the block, if the worker cannot read them itself."""
    out: OutputRange | None = None
    """Where the output may have the records of a block of the source."""


class Event(NamedTuple):
    """Something about a record of the source that the digests do not tell."""

    after: int
    """The number of digests in the answer before the event."""
    number: int
    """The number of the record in its block."""
    kind: EventKind
    """Why: it cannot be merged, is rewritten already, or is drawn in another way than meant."""
    digest: int = 0
    """The digest of a rejected record with its key."""
    problem: str = ""
    """What is wrong with the draws of a record, the last before the event."""


class Answer(NamedTuple):
    """What a block holds."""

    digests: "array[int]"
    """One for each record that is, or should be, in the output; empty if `same` is given."""
    broken_at: int | None
    """The offset in the file of the first record that is not whole; None if all are."""
    events: list[Event]
    counts: Counter[str]
    """The records that are worth a line at the end, by the names of `verify.Verified`."""
    same: int | None = None
    """How many records the output has in the range of the task, if all are as they should be."""


class _Made(NamedTuple):
    """What was made of a block so far."""

    digests: "array[int]"
    events: list[Event]
    counts: Counter[str]


class BlockDigests:
    """Answers tasks, in one process."""

    def __init__(
        self,
        source: FileToRead,
        output: FileToRead,
        merge: MergeOptions,
        reserved: Sequence[str],
        *,
        forked: bool,
    ) -> None:
        self._files: dict[Side, FileToRead] = {"source": source, "output": output}
        # --fit counts the tokens of many records at a time.
        whole = merge.fit_tokens is not None
        self._readers = {
            "source": BlockReader(source.name, source.layout, "ijson", whole=whole),
            "output": BlockReader(output.name, output.layout, "orjson", whole=False),
        }
        self._opened: dict[Side, FileSource] = {}
        self._forked = forked
        self._merger = Merger(merge, reserved)
        self._proof = DrawProof(self._merger)

    def answer(self, task: Task) -> Answer:
        """Return what the block of a task holds.

        Raises `DataError` when its file has changed, and where the cutter's pieces do not fit.
        """
        data = task.data
        if data is None:
            data = self._read(task.side, task.block.start, task.block.end)
        if task.out and (answer := self._compare(data, task.block, task.out)):
            return answer
        made = _Made(array("q"), [], Counter())
        broken_at: int | None = None
        first = 0
        for reading in self._readers[task.side].read(data, task.block):
            if task.side == "source":
                self._expect(reading, first, made)
            else:
                digests = self._digests(reading)
                for number in reading.doubled:
                    digests[number] = _NO_RECORD  # a rewrite writes each field once
                made.digests.extend(digests)
            first += len(reading.pairs)
            broken_at = reading.broken_at
        if broken_at is not None:
            broken_at += task.block.start
        self._count(made.counts)
        return Answer(made.digests, broken_at, made.events, made.counts)

    def close(self) -> None:
        """Close the files."""
        for source in self._opened.values():
            source.close()

    def _compare(self, data: bytes, block: Block, out: OutputRange) -> Answer | None:
        """Return the answer if the output has the records of a block as they should be; else None.

        What was counted until then is forgotten.
        """
        kind = self._files["output"].layout.kind
        written = WrittenBytes(self._read("output", *out), kind, last=block.last)
        made = _Made(array("q"), [], Counter())
        first = same = 0
        try:
            for reading in self._readers["source"].read(data, block):
                pairs = self._proven(reading, first, same, made)
                if pairs is None or not written.continue_with(pairs, by_json=reading.by_json > 0):
                    return None
                first += len(reading.pairs)
                same += len(pairs)
            if not written.is_at_end():
                return None
            self._count(made.counts)
            return Answer(made.digests, None, made.events, made.counts, same)
        finally:
            self._merger.tally.take()

    def _proven(self, reading: Reading, first: int, same: int, made: _Made) -> list[Pair] | None:
        """Return the records that the output should hold; None if not all draws are as meant.

        `first` is the number of the first record that was read in its block, and `same` that of
        the records of the block that the output has before it.
        """
        if reading.broken_at is not None:
            return None
        made.counts["doubled"] += len(reading.doubled)
        made.counts["by_json"] += reading.by_json
        pairs = reading.pairs
        records = [record for _, record in pairs]
        befores = [record.copy() if record.__class__ is dict else record for record in records]
        failures = self._merger.merge_all(records)
        if failures:
            for rejected, (number, error) in enumerate(failures):
                if isinstance(error, RewrittenError):
                    return None
                digest = digest_of(*pairs[number], forked=self._forked)
                event = Event(same + number - rejected, first + number, "rejected", digest)
                made.events.append(event)
            failed = {number for number, _ in failures}
            merged = [number for number in range(len(pairs)) if number not in failed]
            pairs, befores = [pairs[number] for number in merged], [befores[n] for n in merged]
        fits = self._merger.fit_all(befores)
        for number in range(len(pairs)) if fits else self._proof.doubtful(befores, pairs):
            try:
                fit = fits[number] if fits else None
                if MARK not in befores[number] and self._proof.problem(
                    befores[number], pairs[number][1], fit.draws if fit else None
                ):
                    return None
            except BrokenRecordError:
                return None
            except TooManyOutcomesError:
                made.counts["too_many_outcomes"] += 1
        return pairs

    def _count(self, counts: Counter[str]) -> None:
        tally = self._merger.tally.take()
        counts.update(passed=tally.passed, without_size=tally.without_size)

    def _read(self, side: Side, start: int, end: int) -> bytes:
        source = self._opened.get(side)
        if source is None:
            file = self._files[side].file
            assert file is not None  # else the parent sends the bytes
            source = self._opened[side] = reopen(*file)
        return source.window(start, end - start)

    def _digests(self, reading: Reading) -> list[int]:
        """Return the digest of each record that was read, or of what was made of it since."""
        if self._forked and not reading.by_json:
            try:
                return [hash(dumps(pair)) for pair in reading.pairs]
            except JSONEncodeError:
                pass  # `digest_of` finds another way
        by_json = reading.by_json > 0
        return [digest_of(*pair, forked=self._forked, by_json=by_json) for pair in reading.pairs]

    def _expect(self, reading: Reading, first: int, made: _Made) -> None:
        """Add the digests of the records that the output should hold for a piece of the source.

        `first` is the number of its first record in the block.
        """
        befores = [copy_of(record) for _, record in reading.pairs]
        failures = dict(self._merger.merge_all([record for _, record in reading.pairs]))
        fits = self._merger.fit_all(befores)
        all_digests, digests, counts = self._digests(reading), made.digests, made.counts
        counts["doubled"] += len(reading.doubled)
        counts["by_json"] += reading.by_json
        for number, ((key, record), before) in enumerate(zip(reading.pairs, befores, strict=True)):
            if failures and number in failures:
                is_rewritten = isinstance(failures[number], RewrittenError)
                kind: EventKind = "rewritten" if is_rewritten else "rejected"
                digest = digest_of(key, before, forked=self._forked)
                made.events.append(Event(len(digests), first + number, kind, digest))
                continue
            digests.append(all_digests[number])
            if MARK in before:
                continue  # it was passed through unchanged
            try:
                fit = fits[number] if fits else None
                problem = self._proof.problem(before, record, fit.draws if fit else None)
            except BrokenRecordError as error:
                problem = str(error)
            except TooManyOutcomesError:
                counts["too_many_outcomes"] += 1
                continue
            if problem:
                event = Event(len(digests), first + number, "misread", problem=problem)
                made.events.append(event)


def digest_of(key: Any, record: Any, *, forked: bool, by_json: bool = True) -> int:
    """Return a digest of a record with its key, equal only for equal fields in equal order.

    1 and 1.0 are not equal, nor are 0.0 and -0.0; NaN is equal to NaN. It is a signed number of 64
    bits. Only processes that were `forked` from one another may compare digests made so. `by_json`
    says that the record may hold NaN or Infinity, which other parsers than Python's refuse.
    """
    value = record.value if isinstance(record, Stray) else record
    try:
        if by_json:
            json.dumps(value, allow_nan=False)
        text = dumps((key, value))
    except (ValueError, RecursionError, JSONEncodeError):
        # Neither NaN, nor a lone surrogate, nor an integer of more than 64 bits, nor deep nesting.
        # Version 2 of this format says nothing of whether a string occurred before.
        text = marshal.dumps((key, value), 2)
    # hash() is SipHash with a key of the process, which a fork hands down. It takes a fifth of the
    # time of a digest that is the same for all processes.
    return (
        hash(text) if forked else int.from_bytes(blake2b(text, digest_size=8).digest(), signed=True)
    )
