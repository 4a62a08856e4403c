"""The `--fit` option: alternatives over N tokens are left out or cut to the limit.

Tokens are counted on the text as it is trained: braces unescaped, an in-line wildcard at its
longest. Two draws of one record, "1girl, solo, ..." of 80 tokens with share 1/2 and "A girl."
of 3 tokens with share 1/2, become at a limit of 75

    drop    the draw "A girl." with share 1; the tags are in `left_out`
    trim    "1girl, solo, ...", cut at the last comma within 75 tokens, and "A girl.", 1/2 each

A `Fitter` takes the draws that the templates give for many records and returns a `FitResult` for
each: the draws that are written, and what happened to the others. `Merger.fit` calls it.
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import chain, islice, product
from operator import itemgetter
from typing import NamedTuple, TypeAlias

from capmerge.captions.line_template import Template
from capmerge.captions.templates import Draw, MergeOptions
from capmerge.captions.wildcard import has_brace, parse_line, unbreakable_spans
from capmerge.errors import UsageError
from capmerge.tokens.counter import TokenCounter
from capmerge.tokens.families import CLIP_OF_FAMILY
from capmerge.tokens.load import load_clip

# A full stop, question mark or exclamation mark, with the quotes and brackets that close after it;
# the Chinese and Japanese marks need no space after them.
_SENTENCE_END = re.compile(r"""[.!?…]+["'”’»)\]]*(?=\s+[^a-z\s])|[。！？]+[」』”’）]*""")  # noqa: RUF001
_SENTENCE_MARK = re.compile("[.!?…。！？]")  # noqa: RUF001
_ABBREVIATION = re.compile(r"\b(?:[^\W\d_]|mr|mrs|ms|dr|st|vs|no|e\.g|i\.e)\.\Z", re.IGNORECASE)
_LOOSE = ", \t"
_WORD_END = re.compile(r"(?<=\S)(?=\s)")


_Search: TypeAlias = Generator[Draw, bool, tuple[Draw, bool]]
"""A search for the longest cut that fits.

It yields a draw to be measured, is sent whether that draw fits, and returns its result and whether
the result fits.
"""


class FitResult(NamedTuple):
    """The draws of one record that are written, and the changes that made them fit."""

    draws: list[Draw]
    """The draws that are written; their shares sum to 1."""
    left_out: list[Draw]
    """The draws that `drop` left out."""
    cut: list[tuple[Draw, Draw]]
    """The draws that `trim` cut: each as it was, and as it is written."""
    too_long: int
    """The number of draws that are written although they have more than N tokens."""


class Fitter:
    """Fits draws into `options.fit_tokens` tokens.

    `write` returns the line of a draw, and `literals` the fixed texts of a template. Raises
    `UsageError` when the fixed text of a template already uses all the tokens, so that no cut fits.
    """

    def __init__(
        self,
        options: MergeOptions,
        write: Callable[[Draw], str],
        literals: Callable[[Template], Sequence[str]],
    ) -> None:
        assert options.fit_tokens is not None  # without --fit no Fitter is built
        self.limit = options.fit_tokens
        self._cuts = options.fit_by == "trim"
        self._wildcards = options.caption_wildcards
        self._write = write
        self._counter = TokenCounter(load_clip(CLIP_OF_FAMILY[options.fit_family]))
        for template in options.templates() if self._cuts else ():
            fixed = "".join(literals(template))
            (count,) = self._counter.count_tokens([fixed])
            if count >= self.limit:
                raise UsageError(
                    f"--fit {self.limit} trim: the fixed text {fixed!r} has {count} tokens by "
                    "itself, which leaves none for tags or caption. Give a larger number, or a "
                    "shorter --line, --prefix, --suffix or --tags-prefix."
                )

    def lengths_of(self, records: Sequence[Sequence[str]]) -> list[list[int]]:
        """Return the token lengths of each record's lines, in-line wildcards at their longest.

        The method is fastest for hundreds of records at once.
        """
        longest = longest_texts(list(chain.from_iterable(records)), self._counter)
        lengths = (length for _, length in longest)
        return [list(islice(lengths, len(lines))) for lines in records]

    def fit(
        self, records: Sequence[list[Draw]], lengths: Sequence[list[int] | None]
    ) -> list[FitResult]:
        """Return the draws of each record, none longer than the limit unless no text would be left.

        `drop` leaves out the draws that are too long; when all are, the shortest stays. The share
        of a draw that is left out goes to the other lines of its template, and to the other
        templates when none is left. `trim` cuts the last field at the end of a whole tag or
        sentence. A field that does not fit even then is removed, unless it is the only one: that
        is cut after a word, or inside its first word if that is too long already.

        `lengths` are the token lengths of each record's draws, or None where they are not known.
        The method is fastest for hundreds of records at once.
        """
        unknown = [
            draw
            for draws, known in zip(records, lengths, strict=True)
            if known is None
            for draw in draws
        ]
        counted = iter(self._count_tokens(unknown))
        measured = [
            list(zip(draws, islice(counted, len(draws)) if known is None else known, strict=True))
            for draws, known in zip(records, lengths, strict=True)
        ]
        return self._trim(measured) if self._cuts else [self._drop(draws) for draws in measured]

    def _drop(self, measured: list[tuple[Draw, int]]) -> FitResult:
        draws = [draw for draw, _ in measured]
        if all(length <= self.limit for _, length in measured):
            return FitResult(draws, [], [], 0)
        numbers, too_long = self.kept([length for _, length in measured])
        kept = [draws[number] for number in numbers]
        left_out = [draw for number, draw in enumerate(draws) if number not in numbers]
        return FitResult(dealt_again(draws, kept), left_out, [], too_long)

    def kept(self, lengths: Sequence[int]) -> tuple[list[int], int]:
        """Return the numbers of the draws that `drop` keeps of a record, and how many are too long.

        `lengths` are the token lengths of its draws.
        """
        longest = max(self.limit, min(lengths))
        kept = [number for number, length in enumerate(lengths) if length <= longest]
        return kept, len(kept) if longest > self.limit else 0

    def _trim(self, records: list[list[tuple[Draw, int]]]) -> list[FitResult]:
        too_long = [
            (draw, length)
            for measured in records
            for draw, length in measured
            if length > self.limit
        ]
        found = iter(self._cut_all(too_long))
        results = []
        for measured in records:
            after = [
                next(found) if length > self.limit else (draw, True) for draw, length in measured
            ]
            changed = [
                (was, now)
                for (was, _), (now, _) in zip(measured, after, strict=True)
                if was is not now and was != now
            ]
            results.append(
                FitResult(
                    [draw for draw, _ in after], [], changed, sum(not fits for _, fits in after)
                )
            )
        return results

    def _cut_all(self, measured: list[tuple[Draw, int]]) -> list[tuple[Draw, bool]]:
        """Return each draw cut, and whether it fits.

        All searches run in step, so that the texts they ask about in a round are counted at once.
        """
        searches = [self._cut(draw, length) for draw, length in measured]
        found: dict[int, tuple[Draw, bool]] = {}
        answers: dict[int, bool | None] = dict.fromkeys(range(len(searches)))
        while answers:
            asked: dict[int, Draw] = {}
            for number, fits in answers.items():
                try:
                    # None starts a generator, although its type does not say so.
                    asked[number] = searches[number].send(fits)  # type: ignore[arg-type]
                except StopIteration as stop:
                    found[number] = stop.value
            lengths = self._count_tokens(list(asked.values()))
            answers = {
                number: length <= self.limit for number, length in zip(asked, lengths, strict=True)
            }
        return [found[number] for number in range(len(searches))]

    def _count_tokens(self, draws: list[Draw]) -> list[int]:
        """Return the token length of each trained draw, in-line wildcards at their longest."""
        return [
            tokens
            for _, tokens in longest_texts([self._write(draw) for draw in draws], self._counter)
        ]

    def _cut(self, draw: Draw, length: int) -> _Search:
        """Search for the longest cut of a draw of `length` tokens that fits."""
        letters = sum(map(len, map(draw.value, draw.template.fields)))
        letters_that_fit = letters * self.limit // length
        for field in reversed(draw.template.fields):
            letters -= len(draw.value(field))
            likely = letters_that_fit - letters
            found = yield from _longest_that_fits(draw, field, self._units(draw, field), likely)
            if found:
                return found, True
            shorter = draw.template.without(field)
            if shorter is None:
                break
            draw = draw._replace(template=shorter)
            if (yield draw):
                return draw, True
        return (yield from self._cut_at_word(draw, likely))

    def _cut_at_word(self, draw: Draw, likely: int) -> _Search:
        """Cut a draw of one field after as many whole words as fit, or else inside the first word.

        At least one character stays, even if it does not fit.
        """
        (field,) = draw.template.fields
        value = draw.value(field)
        words = self._ends(draw, field, [match.start() for match in _WORD_END.finditer(value)])
        found = yield from _longest_that_fits(draw, field, words, likely)
        if found:
            return found, True
        inside = self._ends(draw, field, range(1, words[0] if words else len(value)))
        found = yield from _longest_that_fits(draw, field, inside, likely)
        if found:
            return found, True
        return draw.with_value(field, value[: [*inside, *words, len(value)][0]]), False

    def _units(self, draw: Draw, field: str) -> list[int]:
        """Return where a field may end: after each whole tag or sentence but the last."""
        value = draw.value(field)
        ends = (
            [match.start() for match in re.finditer(",", value)]
            if field == "tags"
            else list(_sentence_ends(value))
        )
        return self._ends(draw, field, ends)

    def _ends(self, draw: Draw, field: str, ends: Iterable[int]) -> list[int]:
        """Return the usable ones of the ascending `ends`, each moved before commas and spaces.

        An end is usable when it leaves some text and does not cut through an intended wildcard.
        """
        value = draw.value(field)
        if field == "caption" and self._wildcards:
            spans = unbreakable_spans(value)
            ends = [end for end in ends if not any(start < end < stop for start, stop in spans)]
        size = len(value)
        kept = [
            len(value[:end].rstrip(_LOOSE)) if value[end - 1] in _LOOSE else end
            for end in ends
            if end < size
        ]
        return [end for end in dict.fromkeys(kept) if end]


def longest_texts(lines: Sequence[str], counter: TokenCounter) -> list[tuple[str, int]]:
    """Return the longest text that each line can become, and its length in tokens.

    Among equally long texts it is the first. For a line with too many texts to list it is the text
    that combines each group's longest option.
    """
    # Nearly all lines are their only text. The further texts of the others come after all lines.
    texts = [*lines]
    further: dict[int, slice] = {}
    for number, line in enumerate(lines):
        if has_brace(line):
            texts[number], *others = _texts(line, counter)
            further[number] = slice(len(texts), len(texts) + len(others))
            texts += others
    counted = list(zip(texts, counter.count_tokens(texts), strict=True))
    for number, place in further.items():
        counted[number] = max([counted[number], *counted[place]], key=itemgetter(1))
    return counted[: len(lines)]


def _texts(line: str, counter: TokenCounter) -> list[str]:
    parsed = parse_line(line)
    if parsed.is_listable():
        return [
            parsed.text(drawn)
            for drawn in product(*(range(len(options)) for options in parsed.groups))
        ]
    counts = [counter.count_tokens(options) for options in parsed.groups]
    return [parsed.text([of_group.index(max(of_group)) for of_group in counts])]


def _longest_that_fits(
    draw: Draw, field: str, ends: Sequence[int], likely: int
) -> Generator[Draw, bool, Draw | None]:
    """Search for an end that fits while the next of `ends` does not, and cut the field there.

    Returns None when no end fits. `likely` is a guess at the end, in characters of the field. The
    tokens of a caption are spread so evenly that the end is mostly next to that guess: two or three
    questions find it, where bisection over all ends takes five.
    """
    value = draw.value(field)
    fitting, too_long = -1, len(ends)
    middle, step = bisect_right(ends, likely) - 1, 1
    some_fit = some_do_not = False
    # Steps from the guess double until one end fits and another does not; from there on the
    # interval between them is halved.
    while too_long - fitting > 1:
        middle = min(max(middle, fitting + 1), too_long - 1)
        fits = yield draw.with_value(field, value[: ends[middle]])
        fitting, too_long = (middle, too_long) if fits else (fitting, middle)
        some_fit, some_do_not = some_fit or fits, some_do_not or not fits
        if some_fit and some_do_not:
            middle = (fitting + too_long) // 2
        else:
            middle += step if fits else -step
        step *= 2
    return draw.with_value(field, value[: ends[fitting]]) if fitting >= 0 else None


def _sentence_ends(text: str) -> Iterator[int]:
    # To look for the marks first, and for the rest only where there is one, takes half the time.
    end = 0
    for mark in _SENTENCE_MARK.finditer(text):
        match = _SENTENCE_END.match(text, mark.start()) if mark.start() >= end else None
        if match:
            end = match.end()
            word = text[max(0, end - 5) : end - 1]
            is_long = len(word) == 4 and word.isalpha()  # abbreviations have three
            if is_long or not _ABBREVIATION.search(text, max(0, end - 8), end):
                yield end


def dealt_again(draws: list[Draw], kept: list[Draw]) -> list[Draw]:
    """Return the kept draws with the shares of those left out dealt among them.

    A share stays with its template while a draw of that template is kept; the shares of templates
    without a kept draw are dealt over all others, in proportion.
    """
    if len(kept) == 1:
        return [kept[0]._replace(share=Fraction(1))]
    asked, left = _shares(draws), _shares(kept)
    total = sum((asked[template] for template in left), Fraction(0))
    return [
        draw._replace(share=draw.share / left[draw.template] * asked[draw.template] / total)
        for draw in kept
    ]


def _shares(draws: list[Draw]) -> dict[Template, Fraction]:
    shares: dict[Template, Fraction] = {}
    for draw in draws:
        shares[draw.template] = shares.get(draw.template, Fraction(0)) + draw.share
    return shares
