"""The merge rule: a record's `caption` and `tags` become the lines that sd-scripts draws from.

`Merger.merge` states the rule in full; `Merger.merge_all` takes the fast path of `merge_plain` for
the records that allow it. No file is read or written here.
"""

import re
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypeAlias

from capmerge.captions.fields import MARK, TAG_SPANS, WEIGHTS
from capmerge.captions.fit import FitResult, Fitter
from capmerge.captions.like_names import note_like_names
from capmerge.captions.merge_plain import PlainMerge
from capmerge.captions.size import is_size
from capmerge.captions.tags import one_line, spaced
from capmerge.captions.tally import Tally, count_sizes, kind_of
from capmerge.captions.templates import (
    Draw,
    MergeOptions,
    Template,
    line_counts,
    shares_of,
    whole_weights,
)
from capmerge.captions.wildcard import (
    TooManyOutcomesError,
    escape,
    has_brace,
    outcomes,
    space_groups,
    space_stand_ins,
)
from capmerge.errors import quoted
from capmerge.tokens.vocabulary import BOS, EOS

Record: TypeAlias = dict[str, Any]

_Lengths: TypeAlias = list[list[int] | None] | None

_SPECIAL_TOKEN = re.compile("|".join(map(re.escape, (BOS, EOS))), re.IGNORECASE)
_LINE_BREAK = re.compile(r"\r\n|\r|\n")
_JSON_NAMES = {
    list: "a list",
    dict: "an object",
    bool: "true or false",
    int: "a number",
    float: "a number",
    type(None): "null",
}


class UnmergeableError(ValueError):
    """Raised for a record that cannot be merged; the message says what was found and expected.

    `hint` names an option with which the record can be merged; "" where there is none.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class RewrittenError(ValueError):
    """Raised for a record that an earlier run has rewritten: its braces would double again."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """One alternative that can be drawn for a record."""

    line: str
    """The line as written, with braces doubled."""
    text: str
    """The text meant to be trained: nothing doubled, no spaces that `wildcard.escape` adds."""
    style: str
    """The letter of the line in the mark: `t`, `c` or `b`."""
    tag_span: tuple[int, int] | None
    """The [start, end) of the tags in `line`, for style `b`; else None."""
    share: Fraction
    """Its share of the probability; the shares of a record sum to 1."""


def json_name(value: object) -> str:
    """Return the JSON name of the type of `value`: "a list", "an object" ..."""
    return _JSON_NAMES.get(type(value), "a string")


def copy_of(record: Any) -> Any:
    """Return a copy that stays as it is when `Merger.merge` changes `record`.

    A shallow copy is enough, because the merge only adds, replaces and removes fields.
    """
    return dict(record) if isinstance(record, dict) else record


class Merger:
    """Merges records under one set of options and counts what it sees in `tally`.

    `reserved` are further field names that a record must not have.
    """

    def __init__(self, options: MergeOptions, reserved: Collection[str] = ()) -> None:
        self.options = options
        self.tally = Tally()
        self._templates = options.templates()
        self._shares = shares_of(self._templates)
        self._format_fields = tuple(reserved)
        self._literals: dict[Template, list[str]] = {}
        self._fitter = Fitter(options, self.line, self.literals) if options.fit_tokens else None
        self._plain = self._tried = None
        if PlainMerge.serves(options):
            names = (MARK, TAG_SPANS, WEIGHTS, *reserved)
            self._plain = PlainMerge(options, self.literals, names, self.tally)
            self._tried = (
                PlainMerge(options, self.literals, names, Tally()) if self._fitter else None
            )

    def merge_all(
        self, records: Collection[Any]
    ) -> list[tuple[int, UnmergeableError | RewrittenError]]:
        """Merge all records of a block in place; return the number and error of each failure."""
        self.tally.records += len(records)
        listed = list(records)
        numbers, lengths = self._merge_plain(listed)
        if not numbers:
            return []
        failures: list[tuple[int, UnmergeableError | RewrittenError]] = []
        others = [listed[number] for number in numbers]
        fits = self.fit_all(others, lengths) or [None] * len(others)
        for number, record, fit in zip(numbers, others, fits, strict=True):
            try:
                self.merge(record, fit)
            except (UnmergeableError, RewrittenError) as error:
                failures.append((number, error))
        return failures

    def _merge_plain(self, records: list[Any]) -> tuple[Sequence[int], _Lengths]:
        """Merge the plain records in place; with `--fit`, only those whose lines all fit.

        Returns the numbers of the other records, which are not touched, and the token lengths of
        their lines where those are known.
        """
        if self._plain is None:
            return range(len(records)), None
        if self._fitter is None or self._tried is None:
            return self._plain.merge_all(records), None
        # With --fit a record may be merged the fast way only if its lines fit. They are known only
        # after a merge, so a copy is merged first, which counts into a tally of its own.
        copies = [copy_of(record) for record in records]
        unknown = set(self._tried.merge_all(copies))
        plain = [number for number in range(len(records)) if number not in unknown]
        lengths = dict(
            zip(
                plain,
                self._fitter.lengths_of(
                    [copies[number]["caption"].split("\n") for number in plain]
                ),
                strict=True,
            )
        )
        fitting = {number for number in plain if max(lengths[number]) <= self._fitter.limit}
        self._plain.merge_all([records[number] for number in plain if number in fitting])
        others = [number for number in range(len(records)) if number not in fitting]
        return others, [lengths.get(number) for number in others]

    def fit_all(self, records: Sequence[Any], lengths: _Lengths = None) -> list[FitResult | None]:
        """Return the `fit` of each of many records, faster than one by one; empty without `--fit`.

        It is None for a record that `merge` refuses or passes through. `lengths` are the token
        lengths of each record's lines, or None where they are not known.
        """
        if self._fitter is None:
            return []
        draws: dict[int, list[Draw]] = {}
        for number, record in enumerate(records):
            if isinstance(record, dict) and MARK not in record:
                with suppress(UnmergeableError):  # `merge` will raise it for this record
                    draws[number] = self._draws_before_fit(record)
        known = [lengths[number] if lengths else None for number in draws]
        fits = dict(zip(draws, self._fitter.fit(list(draws.values()), known), strict=True))
        return [fits.get(number) for number in range(len(records))]

    def merge(self, record: Any, fit: FitResult | None = None) -> None:
        """Turn one record into its rewritten form, in place; `fit` is its result of `fit_all`.

        Raises before anything is changed: `UnmergeableError` when the record is not an object, its
        `caption` or `tags` is neither a string nor null, or it has a field of ours;
        `RewrittenError` when it has the mark and `allow_rewritten` is off.
        """
        if not isinstance(record, dict):
            raise UnmergeableError(f"the record is {json_name(record)}, expected an object.")
        tally = self.tally
        # A record that an earlier run has rewritten is refused, or passed through unchanged.
        if MARK in record:
            if not self.options.allow_rewritten:
                raise RewrittenError
            self._check_names(record, self._format_fields)
            if not isinstance(record[MARK], str):
                raise UnmergeableError(
                    f'"{MARK}" is {json_name(record[MARK])}, '
                    "expected the string that a rewrite writes."
                )
            tally.passed += 1
            count_sizes(record, tally)
            return
        self._check_names(record, (TAG_SPANS, WEIGHTS, *self._format_fields))
        # The alternatives, and how often each is written.
        fit = fit or self.fit(record)
        found = self._distinct(fit.draws)
        self._count(record, fit)
        shares = tuple(alternative.share for alternative in found)
        weights, counts = _weights_and_counts(shares)
        by_field = self.options.weights == "field"
        if by_field:
            counts = [1] * len(found)
        elif weights != counts:
            tally.capped += 1
        repeated = [
            alternative
            for alternative, count in zip(found, counts, strict=True)
            for _ in range(count)
        ]
        # The fields: `tags` goes, `caption` is replaced, the size and our own fields are added.
        record.pop("tags", None)
        record["caption"] = self._write(repeated)
        count_sizes(record, tally)
        if (
            self.options.image_size is not False
            and "image_size" not in record
            and is_size(record.get("train_resolution"))
        ):
            record["image_size"] = record["train_resolution"]
            tally.image_size_added += 1
        if by_field and found:
            record[WEIGHTS] = weights
        spans = [list(alternative.tag_span) for alternative in repeated if alternative.tag_span]
        if spans:
            record[TAG_SPANS] = spans
        record[MARK] = "".join(alternative.style for alternative in repeated)
        tally.lines += len(repeated)

    def alternatives(self, record: Record) -> list[Alternative]:
        """Return the distinct alternatives of a source `record`, in the order they are written.

        The list is empty when the record has no text. Raises `UnmergeableError` as `merge` does.
        """
        return self._distinct(self.draws(record))

    def _distinct(self, draws: list[Draw]) -> list[Alternative]:
        """Return the alternatives of some draws; equal lines become one and their shares add up."""
        distinct: dict[str, Alternative] = {}
        for draw in draws:
            new = self._fill(draw)
            same = distinct.get(new.line)
            if same:
                new = Alternative(
                    same.line, same.text, same.style, same.tag_span, same.share + new.share
                )
            distinct[new.line] = new
        return list(distinct.values())

    def draws(self, record: Record) -> list[Draw]:
        """Return the draws of a source `record`, in the order they are written; shares sum to 1."""
        return self.fit(record).draws

    def fit(self, record: Record) -> FitResult:
        """Return the draws of a source `record`, and what `--fit` changed, if it is on."""
        draws = self._draws_before_fit(record)
        return self._fitter.fit([draws], [None])[0] if self._fitter else FitResult(draws, [], [], 0)

    def _draws_before_fit(self, record: Record) -> list[Draw]:
        """Return the draws that the templates give for the fields of `record`; shares sum to 1."""
        tags, captions = self._tags(record), self._captions(record)
        templates, shares = self._templates, self._shares
        if not tags or not captions:
            templates = self._templates_for(tags, captions)
            shares = shares_of(templates)
        return [
            Draw(template, tags, caption, share / len(lines) if len(lines) > 1 else share)
            for template, share in zip(templates, shares, strict=True)
            for lines in [captions if "caption" in template.fields else [""]]
            for caption in lines
        ]

    def _templates_for(self, tags: str, captions: list[str]) -> tuple[Template, ...]:
        """Return the templates for a record that lacks tags, captions or both."""
        missing = [name for name, found in (("tags", tags), ("caption", captions)) if not found]
        templates: list[Template] = []
        for given in self._templates:
            template: Template | None = given
            for name in missing:
                template = template and template.without(name)
            if template:
                templates.append(template)
        if not templates and len(missing) == 1:
            # Every template needs the field that is missing, and the text that the record has must
            # not be lost.
            templates = [Template(("tags",) if tags else ("caption",), ("", ""))]
        return tuple(templates)

    @staticmethod
    def _check_names(record: Record, reserved: Collection[str]) -> None:
        for name in reserved:
            if name in record:
                raise UnmergeableError(
                    f'found a field "{name}", which the output needs for itself.'
                )

    def _count(self, record: Record, fit: FitResult) -> None:
        """Count the kind of a source record, and what happened to its draws."""
        tally = self.tally
        tally.fit_left_out += len(fit.left_out)
        tally.fit_cut += len(fit.cut)
        tally.fit_too_long += fit.too_long
        tags, captions = self._tags(record), self._captions(record)
        tally.kinds[kind_of(tags, captions)] += 1
        options = self.options
        texts = [
            text
            for name in (options.tags_field, options.caption_field)
            for text in _texts(record, name, lists=options.lists)
        ]
        if any(_SPECIAL_TOKEN.search(text) for text in texts):
            tally.special_tokens += 1
        if captions and options.caption_lines == "each":
            found = _texts(record, options.caption_field, lists=options.lists)
            tally.paragraphs += any(map(_has_paragraphs, found))
        lacking = [name for name, has in (("caption", captions), ("tags", tags)) if not has]
        if lacking:
            read = options.tags_field, options.caption_field
            note_like_names(record, lacking, read, tally)
        tally.replaced += any(
            record.get(name)
            for name, read_from in (
                ("tags", options.tags_field),
                ("caption", options.caption_field),
            )
            if name != read_from
        )

    def _write(self, repeated: list[Alternative]) -> str:
        """Return the `caption` value: alternatives on lines, or as one in-line wildcard."""
        lines = [alternative.line for alternative in repeated]
        if self.options.inline and len(set(lines)) > 1:
            wildcard = "{" + "|".join(lines) + "}"
            if self._reads_as_meant(wildcard, repeated):
                return wildcard
            self.tally.inline_as_lines += 1
        return "\n".join(lines)

    def _reads_as_meant(self, wildcard: str, repeated: list[Alternative]) -> bool:
        """Return whether the grammar reads the in-line `wildcard` as these alternatives.

        The grammar itself decides, because braces of neighbours may fuse.
        """
        if any("|" in alternative.line for alternative in repeated):
            return False
        if self.options.caption_wildcards and any(
            alternative.style != "t" and has_brace(alternative.text) for alternative in repeated
        ):
            return False
        if not any(has_brace(alternative.line) for alternative in repeated):
            return True
        try:
            return outcomes(wildcard) == outcomes(
                "\n".join(alternative.line for alternative in repeated)
            )
        except TooManyOutcomesError:
            return False

    def literals(self, template: Template) -> list[str]:
        """Return the texts before, between and after the fields of a line.

        Fields are stripped and not blank, so stripping the line affects only its first and last
        literal.
        """
        texts = [
            self.options.prefix + template.literals[0],
            *template.literals[1:-1],
            template.literals[-1] + self.options.suffix,
        ]
        return [texts[0].lstrip(), *texts[1:-1], texts[-1].rstrip()]

    def line(self, draw: Draw) -> str:
        """Return the line of one draw, as written."""
        first, *others = self._literals_of(draw.template)
        line = first
        for field, literal in zip(draw.template.fields, others, strict=True):
            line += draw.value(field) + literal
        # Without a brace there is nothing to escape.
        return self._fill(draw).line if has_brace(line) else line

    def _literals_of(self, template: Template) -> list[str]:
        """Return `literals`, computed once per template."""
        found = self._literals.get(template)
        if found is None:
            found = self._literals[template] = self.literals(template)
        return found

    def _fill(self, draw: Draw) -> Alternative:
        """Return the alternative of one draw."""
        template = draw.template
        first, *others = self._literals_of(template)
        line, text, start, end = escape(first), first, 0, 0
        for field, literal in zip(template.fields, others, strict=True):
            value = draw.value(field)
            written = (
                space_stand_ins(value)
                if field == "caption" and self.options.caption_wildcards
                else escape(value)
            )
            line += _seam(line, written)
            start, end = (len(line), len(line) + len(written)) if field == "tags" else (start, end)
            line += written
            line += _seam(line, escape(literal)) + escape(literal)
            text += value + literal
        if self.options.caption_wildcards:
            line, spaces = space_groups(line)
            start += sum(space <= start for space in spaces)
            end += sum(space < end for space in spaces)
        return Alternative(
            line, text, template.style, (start, end) if template.style == "b" else None, draw.share
        )

    def _tags(self, record: Record) -> str:
        """Return the record's tags as one line; "" when it has none."""
        found = _texts(record, self.options.tags_field, lists=self.options.lists)
        tags = ", ".join(map(one_line, found))
        return spaced(tags) if self.options.underscores == "space" else tags

    def _captions(self, record: Record) -> list[str]:
        """Return the record's caption lines as `caption_lines` asks; empty when it has none.

        Each string of a list is a caption of its own.
        """
        found = _texts(record, self.options.caption_field, lists=self.options.lists)
        return [line for caption in found for line in self._lines_of(caption)]

    def _lines_of(self, caption: str) -> list[str]:
        """Return the lines of one stripped caption as `caption_lines` asks."""
        if "\n" not in caption and "\r" not in caption:
            return [caption] if caption else []
        lines = [stripped for line in _LINE_BREAK.split(caption) if (stripped := line.strip())]
        match self.options.caption_lines:
            case "each":
                return lines
            case "join":
                return [" ".join(lines)]
            case "first":
                return lines[:1]


def _seam(line: str, written: str) -> str:
    """Return a space where the grammar would read a brace across the seam, else "".

    The seam is that between `line` and the text `written` after it.
    """
    if written.startswith("{{"):
        return " " if line.rstrip("{").endswith("\u2985") else ""
    if written.startswith("}}"):
        closing = len(line) - len(line.rstrip("}"))
        return " " if closing % 2 or line.endswith("\u2986") else ""
    return ""


def _texts(record: Record, name: str, *, lists: bool) -> list[str]:
    """Return the stripped texts of a field, those of a list with `lists`.

    There are none when the field is absent, null or blank.
    """
    value = record.get(name)
    if value is None:
        return []
    if isinstance(value, str):
        return [text] if (text := value.strip()) else []
    if not isinstance(value, list) or not all(isinstance(text, str) for text in value):
        wanted = "a string or a list of strings" if lists else "a string"
        is_mixed = lists and isinstance(value, list)
        found = "a list that holds something else than strings" if is_mixed else json_name(value)
        raise UnmergeableError(f"{quoted(name)} is {found}, expected {wanted}.")
    if not lists:
        hint = "Use --lists to read a list of strings as alternatives or tags."
        raise UnmergeableError(f"{quoted(name)} is a list, expected a string.", hint)
    return [text for listed in value if (text := listed.strip())]


def _has_paragraphs(caption: str) -> bool:
    """Return whether there is a blank line between two lines of text."""
    lines = _LINE_BREAK.split(caption.strip())
    return any(not line.strip() for line in lines)


@lru_cache(maxsize=4096)
def _weights_and_counts(shares: tuple[Fraction, ...]) -> tuple[list[int], list[int]]:
    """Return the exact whole weights of `shares`, and how often each line is repeated for them."""
    return (whole_weights(shares), line_counts(shares)) if shares else ([], [])
