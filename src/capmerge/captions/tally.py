"""The counts of a run, and how they add up to the same for any number of workers."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from capmerge.captions.line_counts import Repeats
from capmerge.captions.size import has_no_size_field, sizes_of, wrong_size

LikeField: TypeAlias = tuple[str, str]
"""What a record lacks, `"caption"` or `"tags"`, and the field of a like name that has a text."""

Kind = Literal["both", "tags_only", "caption_only", "empty"]
"""The kind of a record: it has tags and a caption, one of them, or neither."""
KINDS: tuple[Kind, ...] = get_args(Kind)
Kinds: TypeAlias = Counter[Kind]
"""The numbers of records by kind."""
_Counts = TypeVar("_Counts")


class Most(int):
    """The largest number seen so far: adding another keeps the larger of the two."""

    def __add__(self, other: int) -> "Most":
        return Most(max(self, other))


def kind_of(tags: object, caption: object) -> Kind:
    """Return the kind of a record; `tags` or `caption` is empty when it has none.

    >>> kind_of("1girl", [])
    'tags_only'
    """
    if tags:
        return "both" if caption else "tags_only"
    return "caption_only" if caption else "empty"


def add_counts(total: _Counts, more: _Counts) -> None:
    """Add every field of the dataclass `more` to the same field of `total`."""
    for name, count in vars(more).items():
        setattr(total, name, getattr(total, name) + count)


def by_name(counts: object) -> dict[str, Any]:
    """Return a dataclass of counts as a dict, with one entry per kind instead of `kinds`.

    Counts by the name of a field are sorted by it.
    """
    named: dict[str, Any] = {}
    for name, count in vars(counts).items():
        if name == "like_named":  # names of the user's, for a note alone
            continue
        if name == "kinds":
            named |= {kind: count[kind] for kind in KINDS}
        else:
            named[name] = dict(sorted(count.items())) if isinstance(count, Counter) else count
    return named


def count_sizes(record: dict[str, Any], tally: "Tally") -> None:
    """Count what the sizes of a record are, before an `image_size` is added."""
    if has_no_size_field(record):  # in files without sizes all records are so
        tally.without_size += 1
        return
    of = sizes_of(record)
    tally.picture_sizes += of == "picture"
    tally.without_size += of is None
    tally.wrong_size += wrong_size(record)


@dataclass
class Tally:
    """Counts of one run, or of one worker's share of it.

    All fields are numbers of records unless they say otherwise.
    """

    records: int = 0
    """Records read from the source."""
    passed: int = 0
    """Records that an earlier run rewrote, passed through unchanged (`--allow-rewritten`)."""
    rejected: int = 0
    """Records left out of the output and listed in `OUT.rejects.jsonl` (`--on-error skip`)."""
    kinds: Kinds = field(default_factory=Counter)
    """Rewritten records by the texts that they had; the `caption` of an empty one is `""`."""
    lines: int = 0
    """Lines written, including repeats and in-line options."""
    capped: int = 0
    """Records whose weights did not fit into 64 lines and were rounded."""
    capped_left_out: int = 0
    """Alternatives that were left out of such records."""
    capped_template_ppm: Most = field(default_factory=Most)
    """How far the share of a template is off in the worst of them, in millionths."""
    capped_line_ppm: Most = field(default_factory=Most)
    """How far the share of an alternative is off in the worst of them, in millionths."""
    lacking_fields: Counter[str] = field(default_factory=Counter)
    """Records whose templates were left out for want of a field, by the name of the field."""
    dropped_tags: Counter[str] = field(default_factory=Counter)
    """Tags that `--drop-tags` dropped, by its entry."""
    replaced_tags: Counter[str] = field(default_factory=Counter)
    """Tags that `--replace-tags` replaced, by its old tag."""
    all_tags_dropped: int = 0
    """Records whose tags were all dropped."""
    inline_as_lines: int = 0
    """Records of `--layout inline` written as lines: a wildcard would have read differently."""
    image_size_added: int = 0
    picture_sizes: int = 0
    """Records with the picture's own size, as they are beside new-style latents."""
    without_size: int = 0
    """Records with neither a `train_resolution` nor an own size that can be read."""
    wrong_size: int = 0
    """Records whose `train_resolution` or `image_size` is neither a size nor null."""
    replaced: int = 0
    """Records whose `caption` or `tags` were replaced unread, because an option names another."""
    like_named: Counter[LikeField] = field(default_factory=Counter)
    """Records that lack a text, by the field of a like name that holds one."""
    paragraphs: int = 0
    """Records whose caption has a blank line between two lines of text."""
    special_tokens: int = 0
    """Records whose text holds a literal `<|endoftext|>` or `<|startoftext|>`."""
    fit_left_out: int = 0
    """Alternatives longer than `--fit N drop` that were left out."""
    fit_cut: int = 0
    """Alternatives longer than `--fit N trim` that were cut."""
    fit_too_long: int = 0
    """Alternatives written although they are longer than `--fit N`.

    Without them a record would be left with no text.
    """

    @property
    def rewritten(self) -> int:
        """The number of records written with a new `caption`."""
        return self.kinds.total()

    @property
    def captions(self) -> int:
        """The number of rewritten records that have a caption."""
        return self.kinds["both"] + self.kinds["caption_only"]

    def count_repeats(self, records: int, repeats: Repeats) -> None:
        """Count the lines of some records, and whether their weights were rounded."""
        self.lines += records * sum(repeats.counts)
        if repeats.line_ppm:
            self.capped += records
            self.capped_left_out += records * repeats.counts.count(0)
            self.capped_template_ppm += repeats.template_ppm
            self.capped_line_ppm += repeats.line_ppm

    def count_edits(self, dropped: tuple[str, ...], replaced: tuple[str, ...]) -> None:
        """Count the tags of one record that were dropped and replaced."""
        if dropped:
            self.dropped_tags.update(dropped)
        if replaced:
            self.replaced_tags.update(replaced)

    def take(self) -> "Tally":
        """Return a copy of the counts and set all of them to 0."""
        taken = replace(self)
        vars(self).update(vars(Tally()))  # in place, because those who count hold this object
        return taken

    def as_dict(self) -> dict[str, Any]:
        """Return the counts by name."""
        return {"rewritten": self.rewritten, **by_name(self)}
