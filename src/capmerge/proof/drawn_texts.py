"""What sd-scripts draws from a caption, text by text, beside what the templates ask for.

This is the slow way of `draws`: it lists all texts that the caption gives, with their
probabilities, by sd-scripts' own grammar (`captions.wildcard`).
"""

import re
from fractions import Fraction
from typing import Any

from capmerge.captions.line_counts import lines_of_templates, weights_fit, whole_weights
from capmerge.captions.line_template import Template
from capmerge.captions.merge import Merger
from capmerge.captions.templates import Draw
from capmerge.captions.wildcard import has_stand_in, line_outcomes, space_groups, space_stand_ins
from capmerge.captions.written import read_written
from capmerge.errors import quoted

_SPACES_BEFORE_BRACES = re.compile(r" +(?=[{}])")
_ANY_SPACES = re.compile(r" +")


def misread(merger: Merger, draws: list[Draw], found: Any) -> str:
    """Return how what sd-scripts reads in the caption found differs from what `draws` ask for.

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
