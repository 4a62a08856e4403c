"""What a record becomes, prepared once for all records of the same shape.

How often lines are repeated, the letters of the mark and the weights depend on few things: whether
a record has tags, how many caption lines it has, and which of its lines are equal. A `Shape` holds
the result of the general rule for one such combination. Only the texts differ from record to
record.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, TypeAlias

from capmerge.captions.fit import dealt_again
from capmerge.captions.line_counts import DrawWeights, Repeats
from capmerge.captions.line_template import Template
from capmerge.captions.record_texts import RecordTexts
from capmerge.captions.tally import Kind, kind_of
from capmerge.captions.template_choice import TemplateChooser
from capmerge.captions.templates import Draw, MergeOptions

# Shapes of more draws are too rare to be remembered, and those of some draws alone too different.
_MOST_DRAWS, _MOST_KEPT_DRAWS, _MOST_SHAPES = 192, 12, 1024

_Pick: TypeAlias = Callable[[Sequence[Any]], Sequence[Any]]
_Line: TypeAlias = tuple[str, str, str, str]
"""A template: the order of its fields (`t`, `c`, `tc` or `ct`), and the texts around them."""
_Span: TypeAlias = tuple[int, int, int]
"""Tags beside a caption: the length of the literal text before them, the number of the caption that
is before them or -1, and how often their line is written."""
_BARE: list[_Line] = [("t", "", "", ""), ("c", "", "", "")]


@dataclass(eq=False, frozen=True, slots=True)
class _Draws:
    """The draws of all records with the same number of texts."""

    prepared: list[tuple[Draw, int]]
    """Each draw, but for its texts, and the number of its caption."""
    templates: list[_Line]
    letters: list[str]
    """The letter of each draw."""
    spans: list[tuple[int, int]]
    """The first two numbers of each draw's `_Span`; they count only where its letter is `b`."""
    weights: DrawWeights
    by_field: bool
    is_bare: bool
    """True for the tags and then the captions, without any text around."""

    def of(self, tags: str, captions: list[str]) -> list[Draw]:
        """Return the draws of a record with these texts."""
        return [
            Draw(draw.template, tags, captions[number] if captions else "", draw.share)
            for draw, number in self.prepared
        ]

    def part(self, kept: list[int]) -> "_Draws":
        """Return some of the draws, which take over the shares of the others."""
        draws = [draw for draw, _ in self.prepared]
        dealt = dealt_again(draws, [draws[number] for number in kept])
        return replace(
            self,
            letters=[self.letters[number] for number in kept],
            spans=[self.spans[number] for number in kept],
            weights=_weights(dealt, by_field=self.by_field),
        )


@dataclass(eq=False, frozen=True, slots=True)
class Shape:
    """What all records of one shape become, but for their texts."""

    kind: Kind
    draws: _Draws
    repeats: Repeats
    letters: str
    """The mark."""
    weights: list[int] | None
    """The value of `capmerge_weights`, if the field is written."""
    is_wildcard: bool
    """True if the alternatives are written as one in-line wildcard where that is possible."""
    repeated: _Pick | None
    """Picks the lines that are written from those of the draws; None if they are the same."""
    spanned: list[_Span]
    """The spans that are written."""

    def lines(self, tags: str, captions: list[str]) -> list[str]:
        """Return the line of each draw."""
        if self.draws.is_bare:
            return [tags, *captions]
        lines: list[str] = []
        for order, before, between, after in self.draws.templates:
            if order == "t":
                lines.append(f"{before}{tags}{after}" if before or after else tags)
            elif order == "c":
                bare = not (before or after)
                lines += captions if bare else [f"{before}{text}{after}" for text in captions]
            elif order == "tc":
                head = f"{before}{tags}{between}"
                lines += [f"{head}{caption}{after}" for caption in captions]
            else:
                lines += [f"{before}{caption}{between}{tags}{after}" for caption in captions]
        return lines

    def spans(self, tags: str, captions: list[str]) -> list[list[int]]:
        """Return the [start, end) of the tags in each written line of tags beside a caption."""
        size = len(tags)
        spans: list[list[int]] = []
        for start, number, times in self.spanned:
            begin = start + len(captions[number]) if number >= 0 else start
            spans += [[begin, begin + size]] * times
        return spans


class Shapes(dict[int, Shape]):
    """The shapes of records with different lines, under one set of options, made when asked for.

    The key of records with tags and N caption lines is N, and that of records without tags ~N.
    """

    def __init__(self, options: MergeOptions, literals: Callable[[Template], list[str]]) -> None:
        super().__init__()
        self._options, self._literals = options, literals
        self._chooser = TemplateChooser(options)
        self._equal: dict[tuple[_Draws, tuple[int, ...]], Shape] = {}
        self._kept: dict[tuple[_Draws, tuple[int, ...]], Shape] = {}
        shape = self[1]
        self.bare = shape.draws.is_bare
        """True if the lines of tags and captions are these texts alone, the tags first."""
        as_they_are = self.bare and not (shape.repeated or shape.is_wildcard or shape.weights)
        self.two_lines = shape if as_they_are else None
        """The shape of tags and one caption line, if these are written as they are."""

    def __missing__(self, key: int) -> Shape:
        has_tags, captions = key >= 0, key if key >= 0 else ~key
        texts = RecordTexts("tags" if has_tags else "", [str(number) for number in range(captions)])
        draws = self._chooser.choose(texts).draws
        shape = self._shape(
            kind_of(texts.tags, texts.captions),
            self._draws(draws, captions),
            range(len(draws)),
        )
        if len(draws) <= _MOST_DRAWS:
            self[key] = shape
        return shape

    def of_equal(self, shape: Shape, lines: Sequence[str]) -> Shape:
        """Return what becomes of a record of this shape if some of its lines are equal."""
        # Equal lines are one alternative, which is written as the first draw that gives it.
        numbers: dict[str, int] = {}
        places = tuple(numbers.setdefault(line, len(numbers)) for line in lines)
        key = shape.draws, places
        found = self._equal.get(key)
        if found is None:
            found = self._shape(shape.kind, shape.draws, places)
            if len(places) <= _MOST_DRAWS and len(self._equal) < _MOST_SHAPES:
                self._equal[key] = found
        return found

    def of_kept(self, shape: Shape, kept: list[int]) -> Shape:
        """Return what becomes of a record of this shape if only some of its draws are kept."""
        key = shape.draws, tuple(kept)
        found = self._kept.get(key)
        if found is None:
            found = self._shape(shape.kind, shape.draws.part(kept), range(len(kept)))
            small = len(shape.draws.letters) <= _MOST_KEPT_DRAWS
            if small and len(self._kept) < _MOST_SHAPES:
                self._kept[key] = found
        return found

    def _shape(self, kind: Kind, draws: _Draws, places: Sequence[int]) -> Shape:
        """Return the shape of records whose draws give the alternatives of these numbers."""
        repeats = draws.weights.repeats(places)
        firsts: dict[int, int] = {}
        for number, place in enumerate(places):
            firsts.setdefault(place, number)
        written = [
            firsts[place] for place, count in enumerate(repeats.counts) for _ in range(count)
        ]
        letters = "".join([draws.letters[number] for number in written])
        return Shape(
            kind,
            draws,
            repeats,
            letters,
            repeats.weights if self._options.weights == "field" and written else None,
            self._options.inline and len(firsts) > 1,
            None if written == list(range(len(places))) else _picker(written),
            [
                (*draws.spans[first], count)
                for first, count in zip(firsts.values(), repeats.counts, strict=True)
                if draws.letters[first] == "b" and count
            ],
        )

    def _draws(self, draws: Sequence[Draw], captions: int) -> _Draws:
        # A template that holds the caption gives a draw for each of its lines.
        templates: list[_Line] = []
        spans: list[tuple[int, int]] = []
        while len(spans) < len(draws):
            template = draws[len(spans)].template
            order = "".join(field[0] for field in template.fields)
            literals = self._literals(template)
            between = literals[1] if len(literals) > 2 else ""
            templates.append((order, literals[0], between, literals[-1]))
            before = len(literals[0])
            spans += (
                (before + len(between), number) if order == "ct" else (before, -1)
                for number in range(captions if "caption" in template.fields else 1)
            )
        by_field = self._options.weights == "field"
        return _Draws(
            [(draw, int(draw.caption or 0)) for draw in draws],
            templates,
            [draw.template.style for draw in draws],
            spans,
            _weights(draws, by_field=by_field),
            by_field,
            templates == _BARE,
        )


def _weights(draws: Sequence[Draw], *, by_field: bool) -> DrawWeights:
    return DrawWeights([(draw.template, draw.share) for draw in draws], by_field=by_field)


def _picker(numbers: list[int]) -> _Pick:
    """Return a function that picks the items of these numbers."""
    if len(numbers) == 1:
        return lambda items: [items[numbers[0]]]
    return itemgetter(*numbers)  # fast, but a single number would give the bare item
