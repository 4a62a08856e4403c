"""Counting the content of rewritten records, where statistics spend their time next to tokenizing.

Nearly all records are flat: each of their lines is one text. They are counted together with all
records of the block whose lines are equally often, and all others are counted one by one.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection
from fractions import Fraction
from operator import itemgetter
from typing import NamedTuple, TypeAlias

from capmerge.captions.alternatives import TrainedAlternative, fields_of, trained_alternatives
from capmerge.captions.flat import Pattern, read_flat
from capmerge.captions.size import Size, size_of
from capmerge.captions.tally import kind_of
from capmerge.captions.written import BrokenRecordError
from capmerge.metadata.codec import Pair
from capmerge.metadata.encoding import to_json
from capmerge.metadata.key_bytes import joined_keys
from capmerge.stats.counts import CaptionStats
from capmerge.stats.loops import has_loop
from capmerge.tokens.counter import TokenCounter
from capmerge.tokens.vocabulary import BOS, EOS

_SPECIAL_TOKENS = {token: re.compile(re.escape(token), re.IGNORECASE) for token in (BOS, EOS)}
_BREAK = re.compile(r"\bBREAK\b")
SPECIAL_LITERALS = (*_SPECIAL_TOKENS, "BREAK", "|||", "{ or }")
"""Texts that have a meaning for a tokenizer or a trainer.

The last one counts braces in a trained text, not those of a wildcard.
"""


class Observed(NamedTuple):
    """The bytes that one block adds to each stream."""

    caption_hashes: bytes
    """The hash of each record's whole caption in order, eight bytes per record.

    It is 0 when the record has no caption or no figure includes it.
    """
    per_record: bytes
    """One line of JSON per record: its key, and the token lengths of its alternatives."""
    places: bytes
    """The positions of the pieces in the source."""
    loops: bytes
    """The keys of the records with a caption that loops, as `joined_keys` writes them."""


class Observer:
    """Counts rewritten records into `stats`, with one tokenizer, and with a T5 if `t5` is given.

    The records of a block are noted piece by piece and counted together, because the token counter
    is fastest with hundreds of texts.
    """

    def __init__(
        self, counter: TokenCounter, t5: TokenCounter | None = None, *, per_record: bool = False
    ) -> None:
        self.stats = CaptionStats()
        self._counter, self._t5, self._per_record = counter, t5, per_record
        self._noted = _Noted()

    def take(self) -> CaptionStats:
        """Return what was counted since the last call."""
        taken, self.stats = self.stats, CaptionStats()
        return taken

    def note(
        self, pairs: Collection[Pair], place: bytes, left_out: Collection[int] = ()
    ) -> list[tuple[int, BrokenRecordError]]:
        """Note the rewritten records of one piece, except those with numbers in `left_out`.

        `place` is the entry of the piece in the stream of places. Returns the number and the error
        of each record that is not as a rewrite writes it; no other figure includes these.
        """
        noted = self._noted
        sizes, groups = noted.sizes, noted.flat
        hashes = [bytes(8)] * len(pairs)
        failures: list[tuple[int, BrokenRecordError]] = []
        for number, (key, record) in enumerate(pairs):
            if left_out and number in left_out:
                continue
            if flat := read_flat(record):
                pattern, texts = flat
                group = groups.get(pattern)
                if group is None:
                    group = groups[pattern] = _FlatRecords([], [], [])
                group.texts.extend(texts)
                group.keys.append(key)
                group.places.append(len(sizes))
                captions = texts[pattern.captions]
                text = record["caption"]
                if "<" in text or "|" in text or "BREAK" in text or "{" in text or "}" in text:
                    noted.with_literals += texts
            else:
                try:
                    alternatives = trained_alternatives(record)
                except BrokenRecordError as error:
                    failures.append((number, error))
                    continue
                noted.others.append(_Other(len(sizes), key, alternatives))
                captions = [text for texts in fields_of(alternatives)[1] for text in texts]
            if captions:
                hashes[number] = caption_hash(
                    "\n".join(captions) if len(captions) > 1 else captions[0]
                )
                if any(map(has_loop, captions)):
                    noted.loops.append(key)
            sizes.append(size_of(record))
        noted.hashes += hashes
        noted.places.append(place)
        self.stats.records.rejected += len(left_out) + len(failures)
        return failures

    def count(self) -> Observed:
        """Count everything noted so far, and return what it adds to the streams."""
        noted, self._noted = self._noted, _Noted()
        resolutions: Counter[str] = Counter()
        for size, records in Counter(noted.sizes).items():
            if size:
                width, height, field = size
                resolutions[f"{width}x{height}"] += records
                self.stats.size_fields[field] += records
        self.stats.resolutions.update(resolutions)
        by_place = self._count_flat(noted.flat)
        by_place += self._count_others(noted.others)
        self._count_literals(noted.with_literals)
        lines = ""
        if self._per_record:
            lines = "".join(
                to_json({"key": key, "tokens": tokens}) + "\n"
                for _, key, tokens in sorted(by_place, key=itemgetter(0))
            )
        return Observed(
            b"".join(noted.hashes),
            lines.encode(),
            b"".join(noted.places),
            joined_keys(noted.loops),
        )

    def _count_flat(self, groups: "dict[Pattern, _FlatRecords]") -> "list[_Tokens]":
        """Count flat records; return the token lengths of their alternatives, if asked for."""
        stats, found = self.stats, list[_Tokens]()
        texts = [text for group in groups.values() for text in group.texts]
        counts = self._counter.count_tokens(texts)
        t5_counts = self._t5.count_tokens(texts) if self._t5 else []
        start = 0
        for pattern, (texts, keys, places) in groups.items():
            stats.records.kinds[pattern.kind] += len(keys)
            width, end = len(pattern.styles), start + len(texts)
            for number, (style, share) in enumerate(
                zip(pattern.styles, pattern.shares, strict=True)
            ):
                lengths = counts[start + number : end : width]
                stats.lines[style].add(lengths, keys, share)
                if number == pattern.tags:
                    stats.tags.add(lengths, keys)
                    stats.uncounted_tags += texts[number::width]
                if style == "c":
                    stats.captions.add(lengths, keys)
                if self._t5:
                    stats.t5_lines.add(t5_counts[start + number : end : width], keys, share)
            if self._per_record:
                of_records = range(start, end, width) if width else [start] * len(keys)
                found += [
                    (place, key, counts[first : first + width])
                    for place, key, first in zip(places, keys, of_records, strict=True)
                ]
            start = end
        return found

    def _count_others(self, others: "list[_Other]") -> "list[_Tokens]":
        """Count records of any kind; return the token lengths of their alternatives."""
        texts = dict.fromkeys(
            text
            for other in others
            for a in other.alternatives
            for text in (*a.texts, a.tags, *a.captions)
        )
        counted = dict(zip(texts, self._counter.count_tokens(list(texts)), strict=True))
        t5 = dict(zip(texts, self._t5.count_tokens(list(texts)), strict=True)) if self._t5 else None
        return [(other.place, other.key, self._count_other(other, counted, t5)) for other in others]

    def _count_other(
        self, other: "_Other", counted: dict[str, int], t5: dict[str, int] | None
    ) -> list[int]:
        stats, key = self.stats, [other.key]
        tags, captions = fields_of(other.alternatives)
        stats.records.kinds[kind_of(tags, captions)] += 1
        if tags:
            stats.tags.add([counted[tags]], key)
            stats.uncounted_tags.append(tags)
        stats.captions.add(
            [max(counted[text] for text in texts) for texts in captions], key * len(captions)
        )
        lengths = []
        for a in other.alternatives:
            longest = max(counted[text] for text in a.texts)
            lengths.append(longest)
            stats.lines[a.style].add([longest], key, a.share)
            if t5:
                stats.t5_lines.add([max(t5[text] for text in a.texts)], key, a.share)
            if len(a.texts) > 1 or not a.listed:
                wildcards = stats.wildcards
                wildcards.alternatives += 1
                wildcards.not_listed += not a.listed
                wildcards.longest_sum += longest
                wildcards.shortest_sum += min(counted[text] for text in a.texts)
                wildcards.mean_sum += sum(
                    (p * counted[text] for text, p in a.texts.items()), Fraction(0)
                )
        self._count_literals([max(a.texts, key=len) for a in other.alternatives])
        return lengths

    def _count_literals(self, texts: list[str]) -> None:
        literals = self.stats.literals
        for text in texts:
            if "<|" in text:
                literals.update(
                    token for token, pattern in _SPECIAL_TOKENS.items() if pattern.search(text)
                )
            if "BREAK" in text and _BREAK.search(text):
                literals["BREAK"] += 1
            if "|||" in text:
                literals["|||"] += 1
            if "{" in text or "}" in text:
                literals["{ or }"] += 1


def whole_caption(alternatives: list[TrainedAlternative]) -> str:
    """Return all caption lines of a record with all texts of their wildcards; "" without any."""
    return "\n".join(text for texts in fields_of(alternatives)[1] for text in texts)


def caption_hash(caption: str) -> bytes:
    """Return an eight-byte hash of a caption; all bytes are 0 for an empty one.

    Among 12 million captions two different ones have the same hash with a chance of 1 in 250,000.
    """
    if not caption:
        return bytes(8)
    return hashlib.blake2b(caption.encode("utf-8", "surrogatepass"), digest_size=8).digest()


_Tokens: TypeAlias = tuple[int, str, list[int]]
"""The number of a record in its block, its key, and the token lengths of its alternatives."""


class _FlatRecords(NamedTuple):
    """The flat records of a block that have one pattern."""

    texts: list[str]
    """The alternatives of all of them, one record after the other."""
    keys: list[str]
    places: list[int]
    """The number of each record among those of the block that are counted."""


class _Other(NamedTuple):
    """A record that is not flat."""

    place: int
    """Its number among the records of the block that are counted."""
    key: str
    alternatives: list[TrainedAlternative]


class _Noted:
    """The records of a block that are not counted yet."""

    def __init__(self) -> None:
        self.flat: dict[Pattern, _FlatRecords] = {}
        self.with_literals: list[str] = []  # texts of flat records that may hold a literal
        self.others: list[_Other] = []
        self.hashes: list[bytes] = []
        self.sizes: list[Size | None] = []
        self.places: list[bytes] = []
        self.loops: list[str] = []
