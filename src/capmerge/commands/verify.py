"""The work of `capmerge verify`: it reads source and output side by side and proves every record.

There are two proofs for each record. First, the record that the merge rules give must equal the one
in the output, field by field, in order and type. Second, sd-scripts' own grammar, read over the
caption in the output, must give exactly the texts that the templates ask for, with their
probabilities. Of the code that wrote the file, the second proof uses only the choice of templates
and what `--fit` leaves of them. Only a piece of each file is in memory at a time.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from capmerge.captions.fields import MARK
from capmerge.captions.line_counts import (
    MOST_LINES,
    lines_of_templates,
    weights_fit,
    whole_weights,
)
from capmerge.captions.line_template import Template
from capmerge.captions.merge import Merger, RewrittenError, copy_of
from capmerge.captions.record_texts import Record, UnmergeableError
from capmerge.captions.size import sizes_of
from capmerge.captions.templates import Draw, MergeOptions
from capmerge.captions.wildcard import (
    TooManyOutcomesError,
    has_stand_in,
    line_outcomes,
    space_groups,
    space_stand_ins,
)
from capmerge.captions.written import BrokenRecordError, read_written
from capmerge.errors import DataError, quoted
from capmerge.files.atomic import side_path
from capmerge.files.source import Source
from capmerge.metadata.blocks import read_layout
from capmerge.metadata.codec import Stray
from capmerge.metadata.format import REJECTS, Format, reserved_fields
from capmerge.metadata.pieces import iter_pairs, iter_source, place_of

_SPACES_BEFORE_BRACES = re.compile(r" +(?=[{}])")
_ANY_SPACES = re.compile(r" +")
_RUN_AGAIN = "Run `capmerge rewrite` again, or give verify the options it was run with."


@dataclass(slots=True)
class Verified:
    """The counts of what was proven."""

    records: int = 0
    rejected: int = 0
    passed: int = 0
    doubled: int = 0
    """Records of the source that have a field more than once, of which the last counts."""
    without_size: int = 0
    """Records of the output without a `train_resolution` and an own size that can be read."""
    too_many_outcomes: int = 0
    """Records whose intended wildcards give more texts than are listed.

    Only the first proof is made for them.
    """

    def text(self) -> str:
        """One line for a terminal, and one for each exception."""
        counted = f"{self.records:,} records are as expected and in order"
        lines = [f"verified: {counted}, and the output holds nothing else."]
        if self.rejected:
            lines.append(f"could not be merged, and listed whole: {self.rejected:,}")
        if self.passed:
            lines.append(f"already rewritten in the source, and unchanged: {self.passed:,}")
        if self.doubled:
            lines.append(f"with a field more than once, of which the last counts: {self.doubled:,}")
        if self.without_size:
            lines.append(f"without a size (train_resolution or image_size): {self.without_size:,}")
        if self.too_many_outcomes:
            lines.append(
                "right to the byte, but with too many wildcard outcomes to list: "
                f"{self.too_many_outcomes:,}"
            )
        return "\n".join(lines)


def verify(
    source: Source,
    written: Source,
    merge: MergeOptions,
    *,
    skips: bool,
    max_record_bytes: int,
    progress: Callable[[int], None] | None = None,
) -> Verified:
    """Prove that `written` is `source` rewritten with `merge`, and return the counts.

    `skips` says that records which cannot be merged are in OUT.rejects.jsonl. Raises `DataError` at
    the first difference, with its place in the output.
    """
    # Open both sides. Weights make the records of the output longer.
    layout = read_layout(source, max_record_bytes)
    out_layout = read_layout(written, max_record_bytes * MOST_LINES, may_be_empty=True)
    merger = Merger(merge, reserved_fields(Format(out_layout.kind)))
    found = iter_pairs(written, out_layout)
    rejects = _iter_rejects(written.name) if skips else iter(())
    verified = Verified()
    for piece in iter_source(source, layout):
        fits = merger.fit_all(piece.records.values())
        verified.doubled += len(piece.records.doubled)
        for number, (key, record) in enumerate(piece.records.pairs):
            fit = fits[number] if fits else None
            before = copy_of(record)

            # Merge the record of the source as a rewrite does.
            try:
                merger.merge(record, fit)
            except UnmergeableError:
                _check_reject(next(rejects, None), key, before, written.name)
                verified.rejected += 1
                continue
            except RewrittenError:
                problem = f'found a field "{MARK}" in the source: it is rewritten already.'
                raise DataError(
                    source.name,
                    place_of(source.name, layout, piece, number),
                    key,
                    problem,
                    "Give the original file.",
                ) from None

            # Compare it with the next record of the output, by both proofs.
            out_piece, out_number, (out_key, out_record) = next(found, (None, 0, ("", None)))
            if out_piece is None:
                problem = f"the output ends before record {quoted(key)} of the source."
                raise DataError(written.name, None, None, problem, _RUN_AGAIN)
            problem = _difference(key, record, out_key, out_record)
            if not problem and MARK in before:
                verified.passed += 1
            elif not problem:
                try:
                    draws = fit.draws if fit else merger.draws(before)
                    problem = _misread(merger, draws, out_record)
                except BrokenRecordError as error:
                    problem = str(error)
                except TooManyOutcomesError:
                    verified.too_many_outcomes += 1
            if problem:
                raise DataError(
                    written.name,
                    place_of(written.name, out_layout, out_piece, out_number),
                    out_key,
                    problem,
                    _RUN_AGAIN,
                )
            verified.records += 1
            verified.without_size += sizes_of(record) is None
        if progress:
            progress(piece.start + len(piece.data))

    # Nothing else may be in the output or among the rejects.
    out_piece, out_number, (out_key, _) = next(found, (None, 0, ("", None)))
    if out_piece is not None:
        place = place_of(written.name, out_layout, out_piece, out_number)
        raise DataError(
            written.name,
            place,
            out_key,
            "found a record that is not in the source, expected the end of the file.",
            _RUN_AGAIN,
        )
    _check_reject(next(rejects, None), None, None, written.name)
    source.check_unchanged()
    written.check_unchanged()
    return verified


def _difference(key: str, record: Record, found_key: str, found: Any) -> str:
    """The difference between the record found and the expected one; "" when they are equal."""
    if key != found_key:
        return f"found this key, expected record {quoted(key)}."
    # repr() tells 1 from 1.0, -0.0 from 0.0 and one order of keys from another; == does not.
    if repr(record) == repr(found):
        return ""
    if not isinstance(found, dict):
        return f"found {quoted(json.dumps(found))}, expected an object."
    for name, value in record.items():
        if name not in found:
            return f"the field {quoted(name)} is missing."
        if repr(value) != repr(found[name]):
            shown, expected = _excerpt(found[name], value), _excerpt(value, found[name])
            return f"the field {quoted(name)} is {shown}, expected {expected}."
    extra = [name for name in found if name not in record]
    return (
        f"found a field {quoted(extra[0])}, which the source and the options do not give."
        if extra
        else "the fields are in another order than expected."
    )


def _excerpt(value: object, other: object) -> str:
    """`value` for a message, from shortly before the character at which it differs from `other`."""
    text, other_text = (
        v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for v in (value, other)
    )
    same = next(
        (i for i, (a, b) in enumerate(zip(text, other_text, strict=False)) if a != b),
        min(len(text), len(other_text)),
    )
    start = max(0, same - 20)
    return ("…" if start else "") + quoted(text[start:], longest=60)


def _misread(merger: Merger, draws: list[Draw], found: Any) -> str:
    """The difference of what sd-scripts reads in the caption found from what the templates ask for.

    It is "" when the texts and their probabilities agree and each span holds the tags.
    """
    written = read_written(found)
    lines = written.caption.split("\n") if draws else []
    weights = written.weights or [1] * len(lines)
    # Spaces that keep braces and stand-ins apart may be drawn or not, with or without them beside.
    apart = _ANY_SPACES if has_stand_in(written.caption) else _SPACES_BEFORE_BRACES
    read: dict[str, Fraction] = {}
    for line, weight in zip(lines, weights, strict=True):
        _add(read, line_outcomes(line), Fraction(weight, sum(weights)), apart)
    by_template: dict[Template, dict[str, Fraction]] = {}
    meant: dict[str, Fraction] = {}
    for draw in draws:
        texts = _texts(merger, draw)
        _add(meant, texts, draw.share, apart)
        _add(by_template.setdefault(draw.template, {}), texts, draw.share, apart)
    rounded = written.weights is None and _is_rounded(merger, draws)
    if read.keys() - meant.keys() or (read.keys() != meant.keys() and not rounded):
        wrong, missing = sorted(read.keys() - meant.keys()), sorted(meant.keys() - read.keys())
        return f"sd-scripts draws {quoted(str(wrong))}, expected {quoted(str(missing))}."
    if not (_has_rounded_shares(read, by_template) if rounded else read == meant):
        return (
            "sd-scripts draws the right texts with other probabilities than the templates ask for."
        )
    for place, line in enumerate(written.lines):
        span = written.span_at(place)
        if span is None:
            continue
        start, end = span
        (tags,) = line_outcomes(line[start:end])
        # --fit cuts tags by template, so that they can differ from draw to draw.
        if apart.sub("", tags) not in {apart.sub("", draw.tags) for draw in draws}:
            return (
                f"the span [{start}, {end}) holds {quoted(tags)}, expected the tags of the record."
            )
    return ""


def _is_rounded(merger: Merger, draws: list[Draw]) -> bool:
    """True if the exact weights of these draws take more lines than a record may have."""
    shares: dict[str, Fraction] = {}
    for draw in draws:
        line = merger.lines.line(draw)
        shares[line] = shares.get(line, Fraction(0)) + draw.share
    return bool(shares) and not weights_fit(whole_weights(list(shares.values())), len(draws))


def _has_rounded_shares(
    read: dict[str, Fraction], by_template: dict[Template, dict[str, Fraction]]
) -> bool:
    """True if each template keeps the share of the lines that rounding leaves it.

    A text that two templates give may count for either of them.
    """
    lines = lines_of_templates([sum(texts.values(), Fraction(0)) for texts in by_template.values()])
    for texts, count in zip(by_template.values(), lines, strict=True):
        others = [more for more in by_template.values() if more is not texts]
        own = {text: read.get(text, Fraction(0)) for text in texts}
        alone = [p for text, p in own.items() if not any(text in more for more in others)]
        if not sum(alone) <= Fraction(count, sum(lines)) <= sum(own.values()):
            return False
    return True


def _texts(merger: Merger, draw: Draw) -> dict[str, Fraction]:
    """The texts that one draw is meant to train, wildcards expanded, with their probabilities."""
    first, *others = merger.lines.literals(draw.template)
    texts = {first: Fraction(1)}
    for field, literal in zip(draw.template.fields, others, strict=True):
        value = draw.value(field)
        intended = field == "caption" and merger.options.caption_wildcards
        values = line_outcomes(_spaced(value)) if intended else {value: Fraction(1)}
        texts = {
            text + drawn + literal: p * q
            for text, p in texts.items()
            for drawn, q in values.items()
        }
    return texts


def _add(
    total: dict[str, Fraction],
    texts: dict[str, Fraction],
    share: Fraction,
    ignored: re.Pattern[str],
) -> None:
    """Add texts to `total` with their share of its probability, without what `ignored` matches."""
    for text, probability in texts.items():
        plain = ignored.sub("", text)
        total[plain] = total.get(plain, Fraction(0)) + probability * share


def _spaced(value: str) -> str:
    """Return a caption with intended wildcards as the grammar reads it by itself."""
    return space_groups(space_stand_ins(value))[0]


def _iter_rejects(name: str) -> Iterator[tuple[Any, ...]]:
    """The key and the record of each line of OUT.rejects.jsonl, or what stands there instead."""
    path = side_path(Path(name), REJECTS)
    if path.exists():
        if not path.is_file():
            raise DataError(
                str(path), None, None, "found a folder, a pipe or a device.", _RUN_AGAIN
            )
        with path.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                try:
                    listed = json.loads(line)
                except ValueError as error:
                    raise DataError(
                        str(path), None, None, f"line {number} is not JSON ({error}).", _RUN_AGAIN
                    ) from None
                if isinstance(listed, dict):
                    yield listed.get("key"), listed.get("record")
                else:
                    yield (listed,)


def _check_reject(found: tuple[Any, ...] | None, key: str | None, record: Any, name: str) -> None:
    """Raise `DataError` unless `found`, the next line of the rejects, is this record, whole.

    `found` is None where no line is left, and `key` where none may be left.
    """
    value = record.value if isinstance(record, Stray) else record
    expected = None if key is None else (key, value)
    if repr(found) != repr(expected):
        shown = "the end of the file" if found is None else quoted(str(found))
        wanted = (
            "the end of the file"
            if key is None
            else f"{quoted(str(expected))}, a record that cannot be merged"
        )
        problem = f"found {shown}, expected {wanted}."
        raise DataError(str(side_path(Path(name), REJECTS)), None, key, problem, _RUN_AGAIN)
