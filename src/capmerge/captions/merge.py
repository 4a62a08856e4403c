"""The merge rule: a record's `caption` and `tags` become the lines that sd-scripts draws from.

`Merger.merge` states the rule; it reads the texts of a record by `record_texts`, chooses templates
by `template_choice`, writes lines by `lines` and repeats them by `line_counts`. `Merger.merge_all`
takes the fast path of `merge_fast` for the records that allow it. No file is read or written here.
"""

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import Any

from capmerge.captions.fields import MARK, TAG_SPANS, WEIGHTS
from capmerge.captions.fit import FitResult, Fitter
from capmerge.captions.fit_fast import FastFit, Lengths
from capmerge.captions.like_names import note_like_names
from capmerge.captions.line_counts import DrawWeights
from capmerge.captions.lines import Alternative, LineWriter
from capmerge.captions.merge_fast import FastMerge
from capmerge.captions.record_texts import (
    Record,
    RecordTexts,
    TextReader,
    UnmergeableError,
    has_special_token,
    json_name,
    replaces_unread,
)
from capmerge.captions.size import is_size
from capmerge.captions.tally import Tally, count_sizes, kind_of
from capmerge.captions.template_choice import Choice, TemplateChooser
from capmerge.captions.templates import Draw, MergeOptions


class RewrittenError(ValueError):
    """Raised for a record that an earlier run has rewritten: its braces would double again."""


class Merger:
    """Merges records under one set of options and counts what it sees.

    `reserved` are further field names that a record must not have.
    """

    def __init__(self, options: MergeOptions, reserved: Collection[str] = ()) -> None:
        self.options = options
        self._tally = Tally()
        self._format_fields = tuple(reserved)
        self._reader = TextReader(options)
        self._chooser = TemplateChooser(options)
        self.lines = LineWriter(options)
        literals = self.lines.literals
        self._fitter = Fitter(options, self.lines.line, literals) if options.fit_tokens else None
        self._fast: FastMerge | None = None
        self._fast_fit: FastFit | None = None
        if FastMerge.serves(options):
            make_fast = partial(FastMerge, options, literals, reserved)
            if self._fitter:
                self._fast_fit = FastFit(self._fitter, self.lines, make_fast, self._tally)
            else:
                self._fast = make_fast(self._tally)

    @property
    def tally(self) -> Tally:
        """The counts of the records so far."""
        if fast := self._fast or self._fast_fit:
            fast.count()
        return self._tally

    def merge_all(
        self, records: Collection[Any]
    ) -> list[tuple[int, UnmergeableError | RewrittenError]]:
        """Merge all records of a block in place; return the number and error of each failure."""
        self._tally.records += len(records)
        listed = list(records)
        numbers, lengths = self._merge_fast(listed)
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

    def _merge_fast(self, records: list[Any]) -> tuple[Sequence[int], Lengths | None]:
        """Merge records in place by the fast path, and fit them if asked.

        Returns the numbers of the other records, which are not touched, and the token lengths of
        their draws where those are known.
        """
        if self._fast_fit:
            return self._fast_fit.merge_all(records)
        return self._fast.merge_all(records) if self._fast else range(len(records)), None

    def fit_all(
        self, records: Sequence[Any], lengths: Lengths | None = None
    ) -> list[FitResult | None]:
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
                    draws[number] = self.read(record)[1].draws
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
        tally = self._tally
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
        texts, choice = self.read(record)
        fit = fit or self._fit(choice.draws)
        found, places = self._distinct(fit.draws)
        by_field = self.options.weights == "field"
        shares = [(draw.template, draw.share) for draw in fit.draws]
        repeats = DrawWeights(shares, by_field=by_field).repeats(places)
        self._count(record, texts, choice, fit)
        tally.count_repeats(1, repeats)
        repeated = [
            alternative
            for alternative, count in zip(found, repeats.counts, strict=True)
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
            record[WEIGHTS] = repeats.weights
        spans = [list(alternative.tag_span) for alternative in repeated if alternative.tag_span]
        if spans:
            record[TAG_SPANS] = spans
        record[MARK] = "".join(alternative.style for alternative in repeated)

    def alternatives(self, record: Record) -> list[Alternative]:
        """Return the distinct alternatives of a source `record`, with their exact shares.

        The list is empty when the record has no text. Raises `UnmergeableError` as `merge` does.
        """
        return self._distinct(self.draws(record))[0]

    def _distinct(self, draws: list[Draw]) -> tuple[list[Alternative], list[int]]:
        """Return the alternatives of some draws, and the number of the alternative of each draw.

        Equal lines become one alternative, at the place of the first, and their shares add up.
        """
        found: list[Alternative] = []
        places: list[int] = []
        numbers: dict[str, int] = {}
        for draw in draws:
            new = self.lines.fill(draw)
            number = numbers.setdefault(new.line, len(found))
            if number == len(found):
                found.append(new)
            else:
                same = found[number]
                found[number] = replace(same, share=same.share + new.share)
            places.append(number)
        return found, places

    def draws(self, record: Record) -> list[Draw]:
        """Return the draws of a source `record`, in the order they are written; shares sum to 1."""
        return self.fit(record).draws

    def fit(self, record: Record) -> FitResult:
        """Return the draws of a source `record`, and what `--fit` changed, if it is on."""
        return self._fit(self.read(record)[1].draws)

    def _fit(self, draws: list[Draw]) -> FitResult:
        return self._fitter.fit([draws], [None])[0] if self._fitter else FitResult(draws, [], [], 0)

    def read(self, record: Record) -> tuple[RecordTexts, Choice]:
        """Return the texts of a source `record`, and the draws that the templates give for them."""
        texts = self._reader.texts(record)
        return texts, self._chooser.choose(texts)

    @staticmethod
    def _check_names(record: Record, reserved: Collection[str]) -> None:
        for name in reserved:
            if name in record:
                raise UnmergeableError(
                    f'found a field "{name}", which the output needs for itself.'
                )

    def _count(self, record: Record, texts: RecordTexts, choice: Choice, fit: FitResult) -> None:
        """Count the kind of a source record, and what happened to its draws."""
        tally = self._tally
        tally.fit_left_out += len(fit.left_out)
        tally.fit_cut += len(fit.cut)
        tally.fit_too_long += fit.too_long
        # Any field but the tags counts as caption.
        tally.kinds[kind_of(texts.tags, texts.captions or (not texts.tags and choice.draws))] += 1
        tally.lacking_fields.update(choice.lacking)
        tally.count_edits(texts.dropped, texts.replaced)
        all_dropped = bool(texts.dropped) and not texts.tags
        tally.all_tags_dropped += all_dropped
        all_texts = (texts.tags, *texts.captions, *texts.others.values())
        tally.special_tokens += any(map(has_special_token, all_texts))
        if texts.captions and self._reader.has_paragraphs(record):
            tally.paragraphs += 1
        has_tags = bool(texts.tags) or all_dropped
        note_like_names(record, self.options, tally, tags=has_tags, caption=bool(texts.captions))
        tally.replaced += replaces_unread(record, self.options)

    def _write(self, repeated: list[Alternative]) -> str:
        """Return the `caption` value: alternatives on lines, or as one in-line wildcard."""
        lines = [alternative.line for alternative in repeated]
        if self.options.inline and len(set(lines)) > 1:
            if wildcard := self.lines.wildcard(repeated):
                return wildcard
            self._tally.inline_as_lines += 1
        return "\n".join(lines)
