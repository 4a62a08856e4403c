"""What one process counts of a file's captions, and how the counts of several add up to one.

All of it is whole numbers, so any number of workers, in any order, gives the same sums. Owns what
is counted and how much memory it may take; `observe` does the counting, `document` writes the
figures down.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction

from capmerge.captions.fields import STYLES
from capmerge.captions.tally import Kinds, add_counts
from capmerge.stats.lengths import LengthStats

MOST_TAGS = 1 << 20
"""Distinct tags that are counted, at about 130 bytes each. Danbooru has about a million."""
_MANY_TAGS = 1 << 17
MOST_RESOLUTIONS = 1 << 16
_FIRST_PRUNED = 1 << 14
# The processor's cache decides: few texts at once, so that their tags are in it from being cut to
# being counted, and many one after the other, so that the counts are. Together it is half the time.
_TEXTS_AT_ONCE = 64
_MOST_UNCOUNTED, _MOST_UNCOUNTED_LETTERS = 1 << 13, 1 << 22
LONGEST_TAG = 64
"""Characters; longer ones are prose, and would fill the memory."""


def split_tags(texts: list[str]) -> list[str]:
    """All tags of the texts; white space around some may remain, and some may be blank."""
    joined = ", ".join(texts)
    return joined.split(", ") if joined.count(",") == joined.count(", ") else joined.split(",")


class BoundedCounter:
    """Counts of texts, of at most `limit` distinct ones; past it there are none, whoever saw which part of them.

    White space around a text does not count, and blank texts are none. Those over `longest`
    characters are only numbered, in `long`.
    """

    def __init__(self, limit: int, longest: int) -> None:
        self.limit, self.longest = limit, longest
        self.long = 0
        self.overflowed = False
        self._counts: Counter[str] = Counter()
        self._prune_at = _FIRST_PRUNED

    @property
    def counts(self) -> Counter[str] | None:
        """Stripped text -> how often; None when there are too many."""
        self._prune()
        return None if self.overflowed else self._counts

    def __len__(self) -> int:
        """How many are held, those to be pruned among them."""
        return len(self._counts)

    def update(self, texts: Iterable[str]) -> None:
        """Count each of `texts`; of a `Counter`, add its counts."""
        if not self.overflowed:
            self._counts.update(texts)
            if len(self._counts) >= self._prune_at:
                self._prune()

    def merge(self, other: "BoundedCounter") -> None:
        """Add what `other` has counted."""
        counts = other.counts
        self.long += other.long
        if counts is None:
            self.overflowed = True
            self._counts.clear()
        else:
            self.update(counts)

    def _prune(self) -> None:
        """Strip texts and take long ones out. It is done each time that the texts have doubled, not for each of them."""
        for text in [
            text for text in self._counts if len(text) > self.longest or text != text.strip()
        ]:
            count, stripped = self._counts.pop(text), text.strip()
            if len(stripped) > self.longest:
                self.long += count
            else:
                self._counts[stripped] += count
        self._counts.pop("", None)
        # More than `limit` in one part means more than `limit` in the whole: any other split comes
        # to the same.
        if len(self._counts) > self.limit:
            self.overflowed = True
            self._counts.clear()
        self._prune_at = max(_FIRST_PRUNED, min(2 * len(self._counts), self.limit + 1))


@dataclass
class Wildcards:
    """Alternatives that in-line wildcards of the captions multiply; the sums are of tokens."""

    alternatives: int = 0
    longest_sum: int = 0
    shortest_sum: int = 0
    mean_sum: Fraction = Fraction(0)
    """Of the mean over all outcomes, by their probability."""
    not_listed: int = 0
    """Of `alternatives`, those with too many outcomes to list: their longest and shortest are by characters, their mean is between."""


@dataclass
class RecordCounts:
    """Numbers of records."""

    rewritten_before: int = 0
    """They were rewritten by an earlier run: counted as they stand there, whatever the options."""
    kinds: Kinds = field(default_factory=Counter)
    rejected: int = 0
    """They could not be merged or read, and are in no other figure."""

    @property
    def counted(self) -> int:
        """All that are in the figures."""
        return self.kinds.total()


def _by_style() -> dict[str, LengthStats]:
    return {letter: LengthStats() for letter in STYLES}


@dataclass
class CaptionStats:
    """Everything that is counted, of a block or of a whole file."""

    records: RecordCounts = field(default_factory=RecordCounts)
    tags: LengthStats = field(default_factory=LengthStats)
    """Each record's tags, once."""
    captions: LengthStats = field(default_factory=LengthStats)
    """Each of a record's caption lines, once."""
    lines: dict[str, LengthStats] = field(default_factory=_by_style)
    """Every alternative by style, weighted by its probability."""
    t5_lines: LengthStats = field(default_factory=LengthStats)
    """Every alternative, in tokens of a T5, when there is one."""
    wildcards: Wildcards = field(default_factory=Wildcards)
    tag_counts: BoundedCounter = field(
        default_factory=lambda: BoundedCounter(MOST_TAGS, LONGEST_TAG)
    )
    uncounted_tags: list[str] = field(default_factory=list)
    """Texts of tags that `count_tags` has not counted into `tag_counts` yet."""
    _uncounted_letters: int = 0
    resolutions: BoundedCounter = field(
        default_factory=lambda: BoundedCounter(MOST_RESOLUTIONS, LONGEST_TAG)
    )
    """`"832x1216"` -> records."""
    literals: Counter[str] = field(default_factory=Counter)
    """Alternatives that hold a text with a meaning of its own."""

    def merge(self, other: "CaptionStats") -> None:
        """Add what `other` has counted; `other` is not used again."""
        add_counts(self.records, other.records)
        self.tags.merge(other.tags)
        self.captions.merge(other.captions)
        for letter, lines in self.lines.items():
            lines.merge(other.lines[letter])
        self.t5_lines.merge(other.t5_lines)
        add_counts(self.wildcards, other.wildcards)
        self.uncounted_tags += other.uncounted_tags
        self._uncounted_letters += sum(map(len, other.uncounted_tags))
        if (
            len(self.uncounted_tags) >= _MOST_UNCOUNTED
            or self._uncounted_letters >= _MOST_UNCOUNTED_LETTERS
        ):
            self.count_tags()
        self.tag_counts.merge(other.tag_counts)
        self.resolutions.merge(other.resolutions)
        self.literals.update(other.literals)

    @property
    def is_large(self) -> bool:
        """Whether it takes a worker more than some 20 MB: it is time to add it to the sum, which is held once."""
        return len(self.tag_counts) > _MANY_TAGS

    def count_tags(self) -> None:
        """Count the tags that `merge` has put off."""
        texts, self.uncounted_tags, self._uncounted_letters = self.uncounted_tags, [], 0
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            self.tag_counts.update(split_tags(texts[start : start + _TEXTS_AT_ONCE]))

    def all_lines(self) -> LengthStats:
        """The lengths of all alternatives, of any style."""
        total = LengthStats()
        for lines in self.lines.values():
            total.merge(lines)
        return total
