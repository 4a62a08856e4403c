"""The counts of a run, and the one way to add counts: any number of workers gives the same."""

from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, TypeVar, get_args

Kind = Literal["both", "tags_only", "caption_only", "empty"]
"""The texts that a record has: tags and a caption, one of them, or neither."""
KINDS: tuple[Kind, ...] = get_args(Kind)
Kinds: TypeAlias = Counter[Kind]
"""Numbers of records by kind."""
_Counts = TypeVar("_Counts")


def kind_of(tags: object, caption: object) -> Kind:
    """The kind of a record, of which each of `tags` and `caption` is empty when it has none.

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


def by_name(counts: object) -> dict[str, int]:
    """A dataclass of counts by name, with each of `KINDS` in the place of its `kinds`."""
    named: dict[str, int] = {}
    for name, count in vars(counts).items():
        named |= {kind: count[kind] for kind in KINDS} if name == "kinds" else {name: count}
    return named


@dataclass
class Tally:
    """Counts of one run, or of one worker's share of it. All fields are numbers of records unless they say otherwise."""

    records: int = 0
    """Read from the source."""
    passed: int = 0
    """Rewritten by an earlier run and passed through unchanged (`--allow-rewritten`)."""
    rejected: int = 0
    """Left out of the output and listed in `OUT.rejects.jsonl` (`--on-error skip`)."""
    kinds: Kinds = field(default_factory=Counter)
    """Rewritten records by the texts that they had; the `caption` of an empty one is `""`."""
    lines: int = 0
    """Lines written, repeats and in-line options included."""
    capped: int = 0
    """Weights that did not fit into 64 lines and were rounded."""
    inline_as_lines: int = 0
    """`--layout inline` written as lines, because an in-line wildcard would have read differently."""
    image_size_added: int = 0
    paragraphs: int = 0
    """Captions with a blank line between two lines of text."""
    special_tokens: int = 0
    """Records whose text holds a literal `<|endoftext|>` or `<|startoftext|>`."""
    fit_left_out: int = 0
    """Alternatives longer than `--fit N drop` that were left out."""
    fit_cut: int = 0
    """Alternatives longer than `--fit N trim` that were cut."""
    fit_too_long: int = 0
    """Alternatives written although they are longer than `--fit N`: without them a record would end with nothing."""

    @property
    def rewritten(self) -> int:
        """Records written with a new `caption`."""
        return self.kinds.total()

    @property
    def captions(self) -> int:
        """Rewritten records that have a caption."""
        return self.kinds["both"] + self.kinds["caption_only"]

    def take(self) -> "Tally":
        """A copy of the counts; all of them are 0 afterwards."""
        taken = replace(self)
        vars(self).update(vars(Tally()))  # in place: whoever counts holds this very object
        return taken

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return {"rewritten": self.rewritten, **by_name(self)}
