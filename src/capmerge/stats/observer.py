"""Counting the content of rewritten records, where statistics spend their time next to tokenizing.

Nearly all records hold one line of tags and one caption line, without braces: those are read in a
flat loop, and all others by `alternatives`.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Collection
from fractions import Fraction
from typing import NamedTuple

from capmerge.captions.alternatives import TrainedAlternative, fields_of, trained_alternatives
from capmerge.captions.fields import MARK, WEIGHTS
from capmerge.captions.size import Size, size_of
from capmerge.captions.tally import kind_of
from capmerge.captions.written import BrokenRecordError
from capmerge.metadata.codec import Pair, to_json
from capmerge.stats.counts import CaptionStats
from capmerge.stats.loops import has_loop
from capmerge.stats.repeated_keys import joined_keys
from capmerge.tokens.counter import TokenCounter
from capmerge.tokens.vocabulary import BOS, EOS

SPECIAL_LITERALS = {
    **{token: re.compile(re.escape(token), re.IGNORECASE) for token in (BOS, EOS)},
    "BREAK": re.compile(r"\bBREAK\b"),
    "|||": re.compile(r"\|\|\|"),
    "{ or }": re.compile(r"[{}]"),
}
"""Texts that have a meaning for a tokenizer or a trainer.

The last one counts braces in a trained text, not those of a wildcard.
"""
_HALF = (1, 2)


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
        plain, keys, others, sizes = (noted.plain, noted.plain_keys, noted.others, noted.sizes)
        hashes = [bytes(8)] * len(pairs)
        failures: list[tuple[int, BrokenRecordError]] = []
        for number, (key, record) in enumerate(pairs):
            if left_out and number in left_out:
                continue
            # The usual record: one line of tags, one caption line, no braces and no weights.
            caption = record.get("caption")
            if record[MARK] == "tc" and caption.__class__ is str and WEIGHTS not in record:
                lines = caption.split("\n")
                if (
                    len(lines) == 2
                    and "{" not in caption
                    and "}" not in caption
                    and lines[0]
                    and lines[1]
                    and lines[0] != lines[1]
                ):
                    plain += lines
                    keys.append(key)
                    sizes.append(size_of(record))
                    hashes[number] = caption_hash(lines[1])
                    if has_loop(lines[1]):
                        noted.loops.append(key)
                    continue
            # Any other record.
            try:
                alternatives = trained_alternatives(record)
            except BrokenRecordError as error:
                failures.append((number, error))
                continue
            others.append(_Other(len(keys), key, alternatives))
            sizes.append(size_of(record))
            hashes[number] = caption_hash(whole_caption(alternatives))
            if any(has_loop(text) for texts in fields_of(alternatives)[1] for text in texts):
                noted.loops.append(key)
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
        tokens = self._count_plain(noted.plain, noted.plain_keys)
        other_tokens = self._count_others(noted.others)
        lines = ""
        if self._per_record:
            listed = list(zip(noted.plain_keys, tokens, strict=True))
            for other, counts in zip(reversed(noted.others), reversed(other_tokens), strict=True):
                listed.insert(other.place, (other.key, counts))
            lines = "".join(
                to_json({"key": key, "tokens": counts}) + "\n" for key, counts in listed
            )
        return Observed(
            b"".join(noted.hashes),
            lines.encode(),
            b"".join(noted.places),
            joined_keys(noted.loops),
        )

    def _count_plain(self, texts: list[str], keys: list[str]) -> list[list[int]]:
        """Count plain records; return the token lengths of each one's two alternatives."""
        stats = self.stats
        counts = self._counter.count_tokens(texts)
        tags, captions = counts[::2], counts[1::2]
        stats.records.kinds["both"] += len(keys)
        for lengths, field, style in ((tags, stats.tags, "t"), (captions, stats.captions, "c")):
            field.add(lengths, keys)
            stats.lines[style].add(lengths, keys, _HALF)
        if self._t5:
            stats.t5_lines.add(
                self._t5.count_tokens(texts), [key for key in keys for _ in range(2)], _HALF
            )
        stats.uncounted_tags += texts[::2]
        self._count_literals(texts)
        return [[a, b] for a, b in zip(tags, captions, strict=True)]

    def _count_others(self, others: "list[_Other]") -> list[list[int]]:
        """Count records of any kind; return the token lengths of each one's alternatives."""
        texts = dict.fromkeys(
            text
            for other in others
            for a in other.alternatives
            for text in (*a.texts, a.tags, *a.captions)
        )
        counted = dict(zip(texts, self._counter.count_tokens(list(texts)), strict=True))
        t5 = dict(zip(texts, self._t5.count_tokens(list(texts)), strict=True)) if self._t5 else None
        return [self._count_other(other, counted, t5) for other in others]

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
        for text in texts:
            if "<" in text or "|" in text or "BREAK" in text or "{" in text or "}" in text:
                self.stats.literals.update(
                    name for name, pattern in SPECIAL_LITERALS.items() if pattern.search(text)
                )


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


class _Other(NamedTuple):
    """A record that is not plain."""

    place: int
    """The number of plain records noted before it."""
    key: str
    alternatives: list[TrainedAlternative]


class _Noted:
    """The records of a block that are not counted yet."""

    def __init__(self) -> None:
        self.plain: list[str] = []  # tags, caption, tags, caption, ...
        self.plain_keys: list[str] = []
        self.others: list[_Other] = []
        self.hashes: list[bytes] = []
        self.sizes: list[Size | None] = []
        self.places: list[bytes] = []
        self.loops: list[str] = []
