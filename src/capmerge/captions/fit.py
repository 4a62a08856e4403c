"""The `--fit` option: alternatives over N tokens are left out or cut to the limit.

Tokens are counted on the text as it is trained: braces unescaped, an in-line wildcard at its
longest. Two draws of one record, "1girl, solo, ..." of 80 tokens with share 1/2 and "A girl."
of 3 tokens with share 1/2, become at a limit of 75

    drop    the draw "A girl." with share 1; the tags are in `left_out`
    trim    "1girl, solo, ...", cut at the last comma within 75 tokens, and "A girl.", 1/2 each

A `Fitter` takes the draws that the templates give for many records and returns a `FitResult` for
each: the draws that are written, and what happened to the others. `Merger.fit` calls it.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import chain, islice
from typing import NamedTuple

from capmerge.captions.cut_search import CutSearch
from capmerge.captions.line_cutter import LineCutter
from capmerge.captions.line_template import Template
from capmerge.captions.lines import Tail
from capmerge.captions.longest_texts import longest_texts
from capmerge.captions.templates import Draw, MergeOptions
from capmerge.errors import UsageError
from capmerge.tokens.families import CLIP_OF_FAMILY


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
        from capmerge.tokens.counter import TokenCounter
        from capmerge.tokens.load import load_clip

        assert options.fit_tokens is not None  # without --fit no Fitter is built
        self.limit = options.fit_tokens
        self.cuts = options.fit_by == "trim"
        """True for `trim`, False for `drop`."""
        self._write = write
        self._counter = TokenCounter(load_clip(CLIP_OF_FAMILY[options.fit_family]))
        self._search = CutSearch(self.limit, wildcards=options.caption_wildcards)
        self._cutter = LineCutter(self._counter, self.limit)
        for template in options.templates() if self.cuts else ():
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

    def cut_lines(
        self, lines: Sequence[str], tails: Sequence[Tail | None]
    ) -> tuple[list[int], list[str | None]]:
        """Return the token lengths of lines, and what fits of each, as `LineCutter.cut` does."""
        return self._cutter.cut(lines, tails)

    def fit(
        self, records: Sequence[list[Draw]], lengths: Sequence[list[int] | None]
    ) -> list[FitResult]:
        """Return the draws of each record, none longer than the limit unless no text would be left.

        `drop` leaves out the draws that are too long; when all are, the shortest stays. The share
        of a draw that is left out goes to the other lines of its template, and to the other
        templates when none is left. `trim` cuts a draw as `CutSearch` does.

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
        return self._trim(measured) if self.cuts else [self._drop(draws) for draws in measured]

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
        searches = [self._search.of(draw, length) for draw, length in measured]
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
