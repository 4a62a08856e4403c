"""What a run counted: whole numbers that add up, so any number of workers gives the same totals."""

from dataclasses import asdict, dataclass, fields, replace


@dataclass
class Tally:
    """Counts of one run, or of one worker's share of it. All fields are numbers of records unless they say otherwise."""

    records: int = 0
    """Read from the source."""
    passed: int = 0
    """Rewritten by an earlier run and passed through unchanged (`--allow-rewritten`)."""
    rejected: int = 0
    """Left out of the output and listed in `OUT.rejects.jsonl` (`--on-error skip`)."""
    both: int = 0
    """Rewritten records that have tags and a caption."""
    tags_only: int = 0
    caption_only: int = 0
    empty: int = 0
    """Neither tags nor caption: their `caption` is `""`."""
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
        return self.both + self.tags_only + self.caption_only + self.empty

    @property
    def captions(self) -> int:
        """Rewritten records that have a caption."""
        return self.both + self.caption_only

    def add(self, other: "Tally") -> None:
        """Add the counts of `other` to this one."""
        for field in fields(self):
            setattr(self, field.name, getattr(self, field.name) + getattr(other, field.name))

    def take(self) -> "Tally":
        """A copy of the counts; all of them are 0 afterwards."""
        taken = replace(self)
        for field in fields(self):
            setattr(self, field.name, 0)
        return taken

    def as_dict(self) -> dict[str, int]:
        """The counts by name."""
        return {"rewritten": self.rewritten, **asdict(self)}
