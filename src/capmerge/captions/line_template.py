"""The templates of lines: literal text around fields, as `--line` gives them."""

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from capmerge.captions.fields import MARK, TAG_SPANS, WEIGHTS
from capmerge.captions.line_counts import whole_weights
from capmerge.errors import UsageError, printable

MOST_WEIGHT = 10**9

_NAMED_FIELD = re.compile(r"\{([^{}]*)\}")
_WEIGHTED = re.compile(r"(.*)=([0-9]+)\Z", re.DOTALL)
_BEHIND_BRACE = re.compile(r"\}\s*=")
_NUMBER = re.compile(
    r"(?:[0-9]{1,12}(?:[.,][0-9]{0,12})?|[.,][0-9]{1,12})%?|[0-9]{1,12}/0{0,9}[1-9][0-9]{0,9}"
)
_NEWLINE = re.compile(r"[\r\n]")


@dataclass(frozen=True, slots=True)
class Template:
    """One way to build a line: literal text around some fields.

    `fields` are the names of the fields in their order in the line; `literals` are the texts
    before, between and after them, so there is one more literal than fields.
    """

    fields: tuple[str, ...]
    literals: tuple[str, ...]
    weight: int = 1

    @property
    def style(self) -> str:
        """The letter of its lines in the mark: `t` tags, `c` caption, `b` tags beside caption.

        Any field but `tags` counts as caption, so that its text is never shuffled like tags.
        """
        if "tags" not in self.fields:
            return "c"
        return "b" if len(self.fields) > 1 else "t"

    @property
    def other_fields(self) -> tuple[str, ...]:
        """The fields that are neither tags nor caption."""
        return tuple(field for field in self.fields if field not in ("tags", "caption"))

    def without(self, missing: str) -> "Template | None":
        """Return this template for a record without the field `missing`; None if no field is left.

        The text before the missing field goes with it, or that behind it if it is the first: the
        text before the first and after the last field stays.
        """
        if missing not in self.fields:
            return self
        number = self.fields.index(missing)
        kept = self.fields[:number] + self.fields[number + 1 :]
        gone = max(1, number)
        literals = self.literals[:gone] + self.literals[gone + 1 :]
        return Template(kept, literals, self.weight) if kept else None


def parse_template(text: str, lines: Sequence[str] = ()) -> Template:
    """Return the template that `--line TEXT` asks for: `TEMPLATE` or `TEMPLATE=WEIGHT`.

    `lines` are all lines that are given with it; the message about a fraction scales them together.

    >>> parse_template("{tags}, {caption}=4")
    Template(fields=('tags', 'caption'), literals=('', ', ', ''), weight=4)

    Raises `UsageError` for a weight that is no whole number from 1 on, for no field at all, a field
    used twice or a name that no field has, and for a line break.
    """
    where = f"--line {text!r}"
    if _NEWLINE.search(text):
        raise UsageError(
            f"{where}: the template holds a line break, expected one line. "
            "Give --line once for each line."
        )
    template, digits = _split_weight(text)
    if not (digits.isascii() and digits.isdigit()):
        found = repr(digits) if digits else "nothing"
        raise UsageError(
            f"{where}: found {found} after the =, expected a whole number from 1 on, because an "
            f"= right behind a closing }} gives the line its weight.{_scaled(lines or (text,))}"
        )
    weight = int(digits.lstrip("0")[:12] or "0")
    if weight > MOST_WEIGHT:
        raise UsageError(f"{where}: the weight is too large, expected at most {MOST_WEIGHT:,}.")
    if weight == 0:
        raise UsageError(
            f"{where}: the weight is 0, expected 1 or more. Leave the line out instead."
        )
    *pieces, last = _NAMED_FIELD.split(template)
    literals, names = (*pieces[::2], last), tuple(pieces[1::2])
    for name in names:
        if not name or name != name.strip() or "|" in name:
            raise UsageError(
                f"{where}: no field can have the name {{{name}}}, expected {{tags}}, {{caption}} "
                "or the name of another field. A wildcard {a|b} in a template is not possible."
            )
        if name in (MARK, TAG_SPANS, WEIGHTS):
            raise UsageError(
                f"{where}: a rewrite writes the field {{{name}}} itself, expected {{tags}}, "
                "{caption} or another field of the source."
            )
    if not names:
        raise UsageError(
            f"{where}: the template has no field, expected {{tags}}, {{caption}} or another "
            "field in it."
        )
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UsageError(
            f"{where}: found {{{twice}}} twice, expected each field at most once in a template."
        )
    return Template(names, literals, weight)


def _split_weight(text: str) -> tuple[str, str]:
    """Return the template and the weight of a `--line`, as text; "1" where no weight is given.

    The first `=` right behind a closing brace, with or without spaces, gives the weight, whatever
    follows it. Behind other text, only `=` and digits at the end do.
    """
    if behind_brace := _BEHIND_BRACE.search(text):
        return text[: behind_brace.end() - 1], text[behind_brace.end() :].strip()
    if weighted := _WEIGHTED.match(text):
        return weighted[1], weighted[2]
    return text, "1"


def _scaled(lines: Sequence[str]) -> str:
    """Return the advice to give `lines` whole weights in the same ratio.

    It is "" unless each of them has a number above 0 for its weight.
    """
    templates, given = zip(*map(_split_weight, lines), strict=True)
    if not all(map(_NUMBER.fullmatch, given)):
        return ""
    weights = [_number(weight) for weight in given]
    if not all(weights):
        return ""
    if len(lines) == 1:
        return f" A single line needs no weight: give {_flag(templates[0].rstrip())}."
    whole = whole_weights(weights)
    if max(whole) > MOST_WEIGHT:
        return ""
    ratio = f"{' : '.join(given)} is {':'.join(map(str, whole))}"
    flags = (_flag(f"{text}={weight}") for text, weight in zip(templates, whole, strict=True))
    return f" {ratio} in whole numbers: give {' '.join(flags)}."


def _flag(line: str) -> str:
    """Return `line` as it is given in a shell."""
    return f"--line {printable(shlex.quote(line))}"


def _number(text: str) -> Fraction:
    """Return a number as people write weights: `0.5`, `0,5`, `1/2` or `50%`."""
    number = Fraction(text.rstrip("%").replace(",", "."))
    return number / 100 if text.endswith("%") else number
