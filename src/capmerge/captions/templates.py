"""The options of the merge: templates, weights and how captions and tags are treated."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal, NamedTuple, TypeAlias

from capmerge.captions.fields import MARK, TAG_SPANS, WEIGHTS
from capmerge.captions.line_template import Template, parse_template
from capmerge.captions.tag_edits import TagEditor
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

_NEWLINE = re.compile(r"[\r\n]")

Others: TypeAlias = Mapping[str, str]
"""The texts of fields other than tags and caption, by the names of the fields."""
NO_OTHERS: Others = {}


class Draw(NamedTuple):
    """One template with the texts of its fields, before anything is escaped."""

    template: Template
    tags: str
    caption: str
    share: Fraction
    """Its share of the probability."""
    others: Others = NO_OTHERS

    def value(self, field: str) -> str:
        """Return the text of a field."""
        if field == "tags":
            return self.tags
        return self.caption if field == "caption" else self.others[field]

    def with_value(self, field: str, text: str) -> "Draw":
        """Return this draw with another text in a field."""
        # `_replace` takes five times as long.
        if field == "tags":
            return Draw(self.template, text, self.caption, self.share, self.others)
        if field == "caption":
            return Draw(self.template, self.tags, text, self.share, self.others)
        return self._replace(others={**self.others, field: text})


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
    tags_prefix: str = ""
    """The text that comes before the tags wherever a line holds them."""
    drop_tags: tuple[str, ...] = ()
    """The tags that are dropped, in any of their spellings."""
    replace_tags: tuple[str, ...] = ()
    """The tags that are replaced: in each string the old tag, a tab and the new one."""

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
            ("--tags-prefix", self.tags_prefix),
            *(("--line", line) for line in self.lines),
        ):
            if _NEWLINE.search(text):
                raise UsageError(f"{name} {text!r}: found a line break, expected one line.")
            if not text.isascii() and any("\ud800" <= char <= "\udfff" for char in text):
                raise UsageError(
                    f"{name} {text!r}: the text is not valid UTF-8. Check the terminal's encoding."
                )
        self.templates()
        self.tag_editor()

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

    def tag_editor(self) -> TagEditor:
        """Return what drops and replaces tags; it raises `UsageError` for entries that cannot."""
        return TagEditor(self.drop_tags, self.replace_tags)

    def other_fields(self) -> tuple[str, ...]:
        """Return the fields other than tags and caption that templates name, each once."""
        names = (name for template in self.templates() for name in template.other_fields)
        return tuple(dict.fromkeys(names))

    def templates(self) -> tuple[Template, ...]:
        """Return the templates, in the order their lines are written."""
        lines = self.lines or LAYOUTS[self.layout or "lines"]
        return tuple(parse_template(text, lines) for text in lines)


def shares_of(templates: Sequence[Template]) -> list[Fraction]:
    """Return each template's share of the probability."""
    total = sum(template.weight for template in templates)
    return [Fraction(template.weight, total) for template in templates]
