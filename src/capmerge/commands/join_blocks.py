"""The work of a join on each block: its records, each with the others that have its key."""

from bisect import bisect_left, bisect_right
from collections.abc import Container, Iterator, Mapping, Sequence
from itertools import compress
from typing import Any, NamedTuple

from capmerge.commands.join_fields import (
    ConflictError,
    FieldJoiner,
    FieldRules,
    OnConflict,
    Part,
    same,
)
from capmerge.commands.join_reader import JoinedFile, RecordReader
from capmerge.errors import DataError, printable
from capmerge.files.atomic import Buffer
from capmerge.metadata.blocks import PIECE_BYTES, Block
from capmerge.metadata.codec import Pair, Records
from capmerge.metadata.encoding import to_json
from capmerge.metadata.format import FRAMINGS, Format
from capmerge.metadata.key_links import KeyLinks, is_first, next_of
from capmerge.metadata.raw_records import Passage
from capmerge.metadata.survey import NUMBER_BYTES, SpanRun
from capmerge.metadata.work import Chunk, NamedCounts

_BYTES_AT_ONCE = 4 << 20


class _Member(NamedTuple):
    """A record of a file, decoded."""

    source: int
    """The number of the file."""
    start: int
    """Its offset there."""
    text: bytes
    key: str
    value: Any
    is_exact: bool
    """True if only the standard library writes it as it is."""


class _Head(NamedTuple):
    """A record of the block that is the first with its key."""

    start: int
    end: int
    next: int
    """The number of the next record with its key; -1 if there is none."""


class Joiner:
    """The work on each block of one of the joined files: the records that are first with their key.

    Its streams are "records", and "missing" where fields are joined by `rules`.
    """

    def __init__(
        self,
        source: int,
        files: Sequence[JoinedFile],
        links: KeyLinks,
        out: Format,
        on_conflict: OnConflict,
        rules: FieldRules | None,
    ) -> None:
        self._source, self._files, self._links = source, files, links
        self._on_conflict, self._rules = on_conflict, rules
        self._fields = FieldJoiner(rules) if rules else None
        self._out, self._passage = out, Passage(out)
        self._readers = [RecordReader(file) for file in files]
        self._firsts = [0]
        """The number of the first record of each file, where all records are numbered through."""
        for file in files:
            self._firsts.append(self._firsts[-1] + file.spans.count)
        self._offset, self._data, self._run = 0, b"", SpanRun(0, (), ())
        self.counts = NamedCounts()

    def run(self, block: Block, data: bytes) -> Iterator[Chunk]:
        """Note the records of a block."""
        self._offset, self._data = block.start, data
        self._run, miscut = self._files[self._source].spans.in_block(block)
        if miscut:
            raise miscut
        yield from ()

    def flush(self) -> Iterator[Chunk]:
        """The joined records."""
        data, run = self._data, self._run
        self._data, self._run = b"", SpanRun(0, (), ())
        links = self._links.read(self._firsts[self._source] + run.first, len(run))
        starts = [start - self._offset for start in run.starts]
        ends = [end - self._offset for end in run.ends]
        if not self._rules and links.tobytes().count(0) == NUMBER_BYTES * len(links):
            # No other record has one of these keys.
            body = self._passage.copied_run(self._files[self._source].origin, data, starts, ends)
            if body:
                yield from (("records", part) for part in self._out.parts(body))
            return
        kept = [is_first(link) for link in links]
        following = map(next_of, compress(links, kept))
        separator = b""
        heads = map(_Head, compress(starts, kept), compress(ends, kept), following)
        for batch in _batches(list(heads)):
            for bodies, missing in self._joined(data, batch):
                if missing:
                    yield "missing", missing
                yield from (("records", part) for part in self._out.parts(separator, bodies))
                separator = FRAMINGS[self._out.kind].separator

    def _joined(self, data: bytes, heads: list[_Head]) -> Iterator[tuple[Buffer, bytes]]:
        """The records of some heads with all that have their keys, and lines on what is missing.

        Where the others are long, they come some at a time.
        """
        waiting = [heads]
        while waiting:
            heads = waiting.pop()
            # Without rules only the records that others may give way to are looked into.
            looked_at = heads if self._rules else [head for head in heads if head.next >= 0]
            before = self.counts.block.copy()
            if self._fields and (paired := self._paired(data, heads, self._fields)):
                yield paired
                continue
            groups = self._groups(data, looked_at)
            if groups is None:
                self.counts.block = before
                middle = len(heads) // 2
                waiting += heads[middle:], heads[:middle]
            elif self._fields:
                yield self._by_fields(groups, self._fields)
            else:
                chosen = {
                    head.start: group[0] for head, group in zip(looked_at, groups, strict=True)
                }
                yield self._whole(data, heads, chosen), b""

    def _paired(
        self, data: bytes, heads: list[_Head], fields: FieldJoiner
    ) -> tuple[Buffer, bytes] | None:
        """What `_by_fields` returns, if each head has one more record, all of one file.

        Files with equal keys are of this kind: their records are joined without a look at each of
        them. Returns None for others, and for records that cannot be joined.
        """
        following = [head.next for head in heads]
        low, high = min(following), max(following)
        source = bisect_right(self._firsts, low) - 1
        if low < 0 or source == self._source or high >= self._firsts[source + 1]:
            return None
        first = self._firsts[source]
        numbers = [number - first for number in following]
        if numbers != list(range(numbers[0], numbers[0] + len(numbers))):
            return None
        if any(next_of(link) >= 0 for link in self._links.read(low, len(heads))):
            return None
        read = self._readers[source].read(numbers, _BYTES_AT_ONCE)
        if read is None:
            return None
        ones = self._files[self._source].origin.decode(
            [data[head.start : head.end] for head in heads]
        )
        others = self._files[source].origin.decode(read[1])
        columns = {self._source: ones.values(), source: others.values()}
        if len(columns[self._source]) != len(heads) or len(columns[source]) != len(heads):
            return None
        try:
            joined, conflicts = fields.join_pairs((self._source, source), *columns.values())
        except ConflictError:
            return None
        self.counts.block["doubled"] += len(ones.doubled) + len(others.doubled)
        self.counts.block["conflicts"] += conflicts
        pairs = list(zip(ones.keys(), joined, strict=True))
        lines = self._missing_lines(
            fields, pairs, fields.missing_in(columns, len(pairs)), [columns] * len(pairs)
        )
        by_key = None if ones.by_key is None else dict(pairs)
        records = Records(pairs, ones.exact | others.exact, by_key=by_key)
        return self._passage.encoded(self._files[self._source].origin.name, records), lines

    def _missing_lines(
        self,
        fields: FieldJoiner,
        pairs: Sequence[Pair],
        missing: Mapping[int, list[str]],
        having: Sequence[Container[int]],
    ) -> bytes:
        """The lines on the fields that these records lack; `having` tells their files.

        The fields are counted.
        """
        lines = []
        for number, names in sorted(missing.items()):
            lines.append(to_json({"key": pairs[number][0], "missing": names}) + "\n")
            for name in names:
                self.counts.block[f"missing {name}"] += 1
                if fields.rules.owners[name] not in having[number]:
                    self.counts.block[f"no record {name}"] += 1
        return "".join(lines).encode()

    def _groups(self, data: bytes, heads: list[_Head]) -> list[list[_Member]] | None:
        """The records with the key of each head: one of each file if fields are joined, else one.

        Returns None where so many bytes would have to be read that they must be read for fewer.
        """
        if not heads:
            return []
        texts = [data[head.start : head.end] for head in heads]
        starts = [head.start + self._offset for head in heads]
        groups = [[member] for member in self._decoded(self._source, starts, texts)]
        # Follow the links of all groups together, so that the records that are next to each other
        # in another file are read at once.
        links = [(head.next, number) for number, head in enumerate(heads) if head.next >= 0]
        while links:
            links.sort()
            following: list[tuple[int, int]] = []
            for source, first in enumerate(self._firsts[:-1]):
                end = self._firsts[source + 1]
                inside = [link for link in links if first <= link[0] < end]
                if not inside:
                    continue
                numbers = [number - first for number, _ in inside]
                read = self._readers[source].read(
                    numbers, _BYTES_AT_ONCE if len(heads) > 1 else None
                )
                if read is None:
                    return None
                noted = self._noted(first, numbers)
                for (_, group), member, link in zip(
                    inside, self._decoded(source, *read), noted, strict=True
                ):
                    self._take(groups[group], member)
                    if next_of(link) >= 0:
                        following.append((next_of(link), group))
            links = following
        return groups

    def _noted(self, first: int, numbers: list[int]) -> Iterator[int]:
        """What the links say of these records, which ascend, of the file whose first is `first`."""
        if numbers[-1] - numbers[0] < 2 * len(numbers):  # nearly all of them in a row
            links = self._links.read(first + numbers[0], numbers[-1] - numbers[0] + 1)
            return iter([links[number - numbers[0]] for number in numbers])
        return iter([self._links.read(first + number, 1)[0] for number in numbers])

    def _decoded(self, source: int, starts: Sequence[int], texts: Sequence[bytes]) -> list[_Member]:
        """The records of a file with these bytes, which begin at these offsets."""
        records = self._files[source].origin.decode(texts)
        self.counts.block["doubled"] += len(records.doubled) if self._fields else 0
        is_exact = [False] * len(texts)
        for number in records.exact:
            is_exact[number] = True
        return [
            _Member(source, start, text, key, value, exact)
            for start, text, (key, value), exact in zip(
                starts, texts, records.pairs, is_exact, strict=True
            )
        ]

    def _take(self, group: list[_Member], member: _Member) -> None:
        """Add a record to those of its key, or let one of two give way."""
        before = group[-1]
        if self._rules and before.source != member.source:
            group.append(member)
        elif same(before.value, member.value):
            self.counts.block["equal"] += 1
        elif self._on_conflict == "error":
            raise self._differ(before, member)
        else:
            self.counts.block["conflicts"] += 1
            if self._on_conflict == "last":
                group[-1] = member

    def _differ(self, before: _Member, member: _Member) -> DataError:
        name, first = (self._files[one.source].origin.name for one in (member, before))
        where = "" if first == name else f" of {printable(first)}"
        problem = f"another record{where}, at byte {before.start:,}, has the same key and differs."
        next_step = "Use --on-conflict first or last to keep one of two such records"
        if first != name:
            next_step += ", --fields to join their fields, or --key-prefix to tell their keys apart"
        return DataError(name, member.start, member.key, problem, f"{next_step}.")

    def _whole(self, data: bytes, heads: list[_Head], chosen: dict[int, _Member]) -> bytes:
        """One record for each head, with its bytes: the chosen one, or else the head itself."""
        bodies: list[Buffer] = []
        texts: list[bytes] = []
        source = self._source
        for head in heads:
            member = chosen.get(head.start)
            of = member.source if member else self._source
            if of != source:
                bodies.append(self._passage.copied(self._files[source].origin, texts))
                source, texts = of, []
            texts.append(member.text if member else data[head.start : head.end])
        bodies.append(self._passage.copied(self._files[source].origin, texts))
        return self._passage.joined(bodies)

    def _by_fields(self, groups: list[list[_Member]], fields: FieldJoiner) -> tuple[Buffer, bytes]:
        """The records with the fields of all in their group, and the lines on what is missing."""
        pairs, exact, all_parts = list[Pair](), set[int](), list[list[Part]]()
        for number, group in enumerate(groups):
            parts = []
            for member in group:
                parts.append((member.source, member.value))
                if member.is_exact:
                    exact.add(number)
            all_parts.append(parts)
            try:
                record, conflicts = fields.join(parts)
            except ConflictError as error:
                raise self._not_joined(group, error) from None
            pairs.append((group[0].key, record))
            if conflicts:
                self.counts.block["conflicts"] += conflicts
        having = [[source for source, _ in parts] for parts in all_parts]
        lines = self._missing_lines(fields, pairs, fields.missing(all_parts), having)
        records = Records(pairs, frozenset(exact))
        body = self._passage.encoded(self._files[self._source].origin.name, records)
        return body, lines

    def _not_joined(self, group: list[_Member], error: ConflictError) -> DataError:
        """The error for records whose fields cannot be joined."""
        (member,) = [member for member in group if member.source == error.source]
        name = self._files[member.source].origin.name
        return DataError(name, member.start, member.key, str(error), error.hint)


def _batches(heads: list[_Head]) -> Iterator[list[_Head]]:
    """Consecutive records, as many at a time as a piece has bytes."""
    starts, first = [head.start for head in heads], 0
    while first < len(heads):
        end = max(first + 1, bisect_left(starts, starts[first] + PIECE_BYTES))
        yield heads[first:end]
        first = end
