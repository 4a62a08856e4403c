"""The counts of a file's captions in one process, and how those of several processes add up.

All of them are exact numbers, so any number of workers, in any order, gives the same sums. This
module owns what is counted and how much memory it may take; `observer` does the counting, and
`document` writes the figures down.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction

from capmerge.captions.fields import STYLES
from capmerge.captions.tally import Kinds, add_counts
from capmerge.stats.lengths import LengthStats

MOST_TAGS = 1 << 20
"""The most distinct tags counted, at about 130 bytes each. Danbooru has about a million."""
_MANY_TAGS = 1 << 17
MOST_RESOLUTIONS = 1 << 16
_FIRST_PRUNED = 1 << 14
# Small batches keep their tags in the processor's cache between splitting and counting, and many
# batches in a row keep the counter there. Together this halves the time.
_TEXTS_AT_ONCE = 64
_MOST_UNCOUNTED, _MOST_UNCOUNTED_LETTERS = 1 << 13, 1 << 22
LONGEST_TAG = 64
"""The longest tag in characters; longer ones are prose, and would fill the memory."""


def split_tags(texts: list[str]) -> list[str]:
    """Return all tags of the texts; some may have white space around them or be blank."""
    joined = ", ".join(texts)
    return joined.split(", ") if joined.count(",") == joined.count(", ") else joined.split(",")


class BoundedCounter:
    """Counts of at most `limit` distinct texts.

    With more than that there are no counts at all, however the texts were split among workers.
    White space around a text is ignored, and so are blank texts. For texts over `longest`
    characters only their number is kept, in `long`.
    """

    def __init__(self, limit: int, longest: int) -> None:
        self.limit, self.longest = limit, longest
        self.long = 0
        self.overflowed = False
        self._counts: Counter[str] = Counter()
        self._prune_at = _FIRST_PRUNED

    @property
    def counts(self) -> Counter[str] | None:
        """The count of each stripped text; None when there are too many distinct ones."""
        self._prune()
        return None if self.overflowed else self._counts

    def __len__(self) -> int:
        """Return how many texts are held, including those to be pruned."""
        return len(self._counts)

    def update(self, texts: Iterable[str]) -> None:
        """Count each of `texts`, or add the counts of a `Counter`."""
        if not self.overflowed:
            self._counts.update(texts)
            if len(self._counts) >= self._prune_at:
                self._prune()

    def merge(self, other: "BoundedCounter") -> None:
        """Add the counts of `other`."""
        counts = other.counts
        self.long += other.long
        if counts is None:
            self.overflowed = True
            self._counts.clear()
        else:
            self.update(counts)

    def _prune(self) -> None:
        """Strip the texts held and remove long and blank ones.

        This is done each time that the number of texts has doubled, not for each text.
        """
        for text in [
            text for text in self._counts if len(text) > self.longest or text != text.strip()
        ]:
            count, stripped = self._counts.pop(text), text.strip()
            if len(stripped) > self.longest:
                self.long += count
            else:
                self._counts[stripped] += count
        self._counts.pop("", None)
        # More than `limit` texts in one part are more than `limit` in the whole, so that any split
        # among workers gives the same result.
        if len(self._counts) > self.limit:
            self.overflowed = True
            self._counts.clear()
        self._prune_at = max(_FIRST_PRUNED, min(2 * len(self._counts), self.limit + 1))


@dataclass
class Wildcards:
    """Counts of the alternatives with in-line wildcards; the sums are of tokens."""

    alternatives: int = 0
    longest_sum: int = 0
    shortest_sum: int = 0
    mean_sum: Fraction = Fraction(0)
    """The sum of each alternative's mean over its outcomes, weighted by their probability."""
    not_listed: int = 0
    """The number of `alternatives` with too many outcomes to list.

    Their longest and shortest texts are chosen by characters, and their mean is halfway between.
    """


@dataclass
class RecordCounts:
    """Numbers of records."""

    rewritten_before: int = 0
    """Records that an earlier run rewrote: they are counted as they are, whatever the options."""
    kinds: Kinds = field(default_factory=Counter)
    rejected: int = 0
    """Records that could not be merged or read; no other figure includes them."""

    @property
    def counted(self) -> int:
        """The number of records that the figures include."""
        return self.kinds.total()


def _by_style() -> dict[str, LengthStats]:
    return {letter: LengthStats() for letter in STYLES}


@dataclass
class CaptionStats:
    """All counts of a block or of a whole file."""

    records: RecordCounts = field(default_factory=RecordCounts)
    tags: LengthStats = field(default_factory=LengthStats)
    """The lengths of each record's tags, once per record."""
    captions: LengthStats = field(default_factory=LengthStats)
    """The lengths of each record's caption lines, once per line."""
    lines: dict[str, LengthStats] = field(default_factory=_by_style)
    """The lengths of all alternatives by style, weighted by their probability."""
    t5_lines: LengthStats = field(default_factory=LengthStats)
    """The lengths of all alternatives in tokens of a T5, when there is one."""
    wildcards: Wildcards = field(default_factory=Wildcards)
    tag_counts: BoundedCounter = field(
        default_factory=lambda: BoundedCounter(MOST_TAGS, LONGEST_TAG)
    )
    uncounted_tags: list[str] = field(default_factory=list)
    """Texts of tags that `count_tags` has not yet counted into `tag_counts`."""
    _uncounted_letters: int = 0
    resolutions: BoundedCounter = field(
        default_factory=lambda: BoundedCounter(MOST_RESOLUTIONS, LONGEST_TAG)
    )
    """The number of records of each resolution, such as `"832x1216"`."""
    size_fields: Counter[str] = field(default_factory=Counter)
    """The number of records whose resolution is from each field."""
    literals: Counter[str] = field(default_factory=Counter)
    """The number of alternatives that hold each text with a special meaning."""

    def merge(self, other: "CaptionStats") -> None:
        """Add the counts of `other`, which must not be used afterwards."""
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
        self.size_fields.update(other.size_fields)
        self.literals.update(other.literals)

    @property
    def is_large(self) -> bool:
        """True when the counts take a worker more than some 20 MB.

        It is then time to add them to the sum, which is held only once.
        """
        return len(self.tag_counts) > _MANY_TAGS

    def count_tags(self) -> None:
        """Count the tags that `merge` has only collected."""
        texts, self.uncounted_tags, self._uncounted_letters = self.uncounted_tags, [], 0
        for start in range(0, len(texts), _TEXTS_AT_ONCE):
            self.tag_counts.update(split_tags(texts[start : start + _TEXTS_AT_ONCE]))

    def all_lines(self) -> LengthStats:
        """Return the lengths of all alternatives of any style."""
        total = LengthStats()
        for lines in self.lines.values():
            total.merge(lines)
        return total
