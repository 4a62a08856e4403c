"""The options of the merge: templates, weights and how captions and tags are treated."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import gcd, lcm
from typing import Literal, NamedTuple

from capmerge.captions.fields import MARK, TAG_SPANS, WEIGHTS
from capmerge.errors import UsageError
from capmerge.tokens.families import TokenizerFamily

CaptionLayout = Literal["lines", "concat", "concat-caption-first", "inline"]
Weights = Literal["repeat", "field"]
CaptionLines = Literal["each", "join", "first"]
Underscores = Literal["keep", "space"]
FitBy = Literal["drop", "trim"]
LAYOUTS: dict[CaptionLayout, tuple[str, ...]] = {
    "lines": ("{tags}", "{caption}"),
    "concat": ("{tags}, {caption}",),
    "concat-caption-first": ("{caption}, {tags}",),
    "inline": ("{tags}", "{caption}"),
}
MOST_LINES = 64
"""The most lines that one record may have through repeats before its weights are rounded."""

MOST_WEIGHT = 10**9

_NAMED_FIELD = re.compile(r"\{([^{}]*)\}")
_WEIGHTED = re.compile(r"(.*)=([0-9]+)\Z", re.DOTALL)
_NEWLINE = re.compile(r"[\r\n]")


@dataclass(frozen=True, slots=True)
class Template:
    """One way to build a line: literal text around one or two fields.

    `fields` are `"tags"` and `"caption"` in their order in the line; `literals` are the texts
    before, between and after them, so there is one more literal than fields.
    """

    fields: tuple[str, ...]
    literals: tuple[str, ...]
    weight: int = 1

    @property
    def style(self) -> str:
        """The letter of its lines in the mark: `t` tags only, `c` caption only, `b` both."""
        return "b" if len(self.fields) > 1 else self.fields[0][0]

    def without(self, missing: str) -> "Template | None":
        """Return this template for a record without the field `missing`; None if no field is left.

        The text between the missing field and its neighbour goes with it; the text before the first
        and after the last field stays.
        """
        kept = tuple(field for field in self.fields if field != missing)
        if kept == self.fields:
            return self
        return Template(kept, (self.literals[0], self.literals[-1]), self.weight) if kept else None


class Draw(NamedTuple):
    """One template with the texts of its fields, before anything is escaped."""

    template: Template
    tags: str
    caption: str
    share: Fraction
    """Its share of the probability."""

    def value(self, field: str) -> str:
        """Return the text of a field."""
        return self.tags if field == "tags" else self.caption

    def with_value(self, field: str, text: str) -> "Draw":
        """Return this draw with another text in a field."""
        tags, caption = (text, self.caption) if field == "tags" else (self.tags, text)
        return Draw(self.template, tags, caption, self.share)  # `_replace` takes five times as long


def parse_template(text: str) -> Template:
    """Return the template that `--line TEXT` asks for: `TEMPLATE` or `TEMPLATE=WEIGHT`.

    >>> parse_template("{tags}, {caption}=4")
    Template(fields=('tags', 'caption'), literals=('', ', ', ''), weight=4)

    Raises `UsageError` for a weight of 0, a name other than tags and caption, a field used twice or
    none at all, and a line break.
    """
    weighted = _WEIGHTED.match(text)
    template, weight = (
        (weighted[1], int(weighted[2].lstrip("0")[:12] or "0")) if weighted else (text, 1)
    )
    where = f"--line {text!r}"
    if weight > MOST_WEIGHT:
        raise UsageError(f"{where}: the weight is too large, expected at most {MOST_WEIGHT:,}.")
    if weight == 0:
        raise UsageError(
            f"{where}: the weight is 0, expected 1 or more. Leave the line out instead."
        )
    if _NEWLINE.search(template):
        raise UsageError(
            f"{where}: the template holds a line break, expected one line. "
            "Give --line once for each line."
        )
    *pieces, last = _NAMED_FIELD.split(template)
    literals, names = (*pieces[::2], last), tuple(pieces[1::2])
    for name in names:
        if name not in ("tags", "caption"):
            raise UsageError(
                f"{where}: unknown field {{{name}}}, expected {{tags}} or {{caption}}."
            )
    if not names:
        raise UsageError(
            f"{where}: the template has no field, expected {{tags}} or {{caption}} in it."
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(
            f"{where}: found {{{twice}}} twice, expected each field at most once in a template."
        )
    return Template(names, literals, weight)


@dataclass(frozen=True, slots=True)
class MergeOptions:
    """All options that decide what a record becomes; equal options give equal bytes.

    `lines` are the `--line` texts as given; when there are none, `layout` names the templates.
    Raises `UsageError` for combinations that cannot be carried out.
    """

    layout: CaptionLayout | None = None
    lines: tuple[str, ...] = ()
    weights: Weights = "repeat"
    caption_lines: CaptionLines = "each"
    underscores: Underscores = "keep"
    caption_wildcards: bool = False
    prefix: str = ""
    suffix: str = ""
    image_size: bool | None = None
    """True or None to add `image_size` where only `train_resolution` is there.

    `rewrite` makes True or False of None, by the names of the latents if it is given their folder.
    """
    allow_rewritten: bool = False
    fit_tokens: int | None = None
    """The token length of the longest alternative wanted; see `fit`."""
    fit_by: FitBy = "drop"
    fit_family: TokenizerFamily = "sd1"
    """The family whose tokenizer counts for `fit_tokens`."""
    caption_field: str = "caption"
    """The field that the caption is read from."""
    tags_field: str = "tags"
    """The field that the tags are read from."""
    lists: bool = False
    """True to take a list of strings as caption or tags."""

    def __post_init__(self) -> None:
        self._check_fields()
        if self.fit_tokens is not None and self.fit_tokens < 1:
            raise UsageError(
                f"--fit {self.fit_tokens}: expected 1 token or more, such as 75, 150 or 225."
            )
        if self.lines and self.layout:
            raise UsageError("--line and --layout both say which lines to write. Give one of them.")
        if self.inline and self.weights == "field":
            raise UsageError(
                "--weights field stores one weight per line, but --layout inline writes one "
                "line. Use --weights repeat."
            )
        for name, text in (
            ("--prefix", self.prefix),
            ("--suffix", self.suffix),
            *(("--line", line) for line in self.lines),
        ):
            if _NEWLINE.search(text):
                raise UsageError(f"{name} {text!r}: found a line break, expected one line.")
            if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
                raise UsageError(
                    f"{name} {text!r}: the text is not valid UTF-8. Check the terminal's encoding."
                )
        self.templates()

    def _check_fields(self) -> None:
        """Raise `UsageError` for fields that captions and tags cannot be read from."""
        for option, name, other in (
            ("--caption-field", self.caption_field, "tags"),
            ("--tags-field", self.tags_field, "caption"),
        ):
            if name == other or name in (MARK, TAG_SPANS, WEIGHTS):
                raise UsageError(
                    f"{option} {name!r}: a rewrite writes or removes this field itself. "
                    "Name another field."
                )
            if not name.isascii() and any("\ud800" <= char <= "\udfff" for char in name):
                raise UsageError(
                    f"{option} {name!r}: the name is not valid UTF-8. "
                    "Check the terminal's encoding."
                )
        if self.caption_field == self.tags_field:
            raise UsageError(
                f"--caption-field and --tags-field both name {self.tags_field!r}. "
                "Name two different fields."
            )

    @property
    def inline(self) -> bool:
        """True when the alternatives are written as one in-line wildcard."""
        return self.layout == "inline"

    def templates(self) -> tuple[Template, ...]:
        """Return the templates, in the order their lines are written."""
        return tuple(parse_template(text) for text in self.lines or LAYOUTS[self.layout or "lines"])


def shares_of(templates: Sequence[Template]) -> list[Fraction]:
    """Return each template's share of the probability."""
    total = sum(template.weight for template in templates)
    return [Fraction(template.weight, total) for template in templates]


def whole_weights(shares: Sequence[Fraction]) -> list[int]:
    """Return the smallest whole numbers with the ratio of `shares`.

    >>> whole_weights([Fraction(1, 2), Fraction(1, 4), Fraction(1, 4)])
    [2, 1, 1]
    """
    scale = lcm(*(share.denominator for share in shares))
    weights = [int(share * scale) for share in shares]
    divisor = gcd(*weights)
    return [weight // divisor for weight in weights]


def line_counts(shares: Sequence[Fraction]) -> list[int]:
    """Return how often each alternative is written, at most `MOST_LINES` lines in all.

    Up to that limit these are the `whole_weights`, and over it the counts come near their ratio:
    alternatives whose share of the lines is under one line get one each, until none of the others
    is under one; the remaining lines go to those others by largest remainder, ties to the earlier.
    With `MOST_LINES` alternatives or more, each gets one line.

    >>> line_counts([Fraction(999, 1000), Fraction(1, 1000)])
    [63, 1]
    """
    weights = whole_weights(shares)
    if sum(weights) <= MOST_LINES:
        return weights
    if len(weights) >= MOST_LINES:
        return [1] * len(weights)
    counts = [1] * len(weights)
    others = list(range(len(weights)))
    while True:
        free = MOST_LINES - (len(weights) - len(others))
        total = sum(weights[i] for i in others)
        large_enough = [i for i in others if weights[i] * free >= total]
        if len(large_enough) == len(others):
            break
        others = large_enough
    for i in others:
        counts[i] = weights[i] * free // total
    left_over = free - sum(counts[i] for i in others)
    # sorted() is stable, so ties go to the earlier.
    by_remainder = sorted(others, key=lambda i: -(weights[i] * free % total))
    for i in by_remainder[:left_over]:
        counts[i] += 1
    return counts
