"""`--fit` for the records of the fast path: the lines of a block are counted and cut at once.

Of a record with tags of 80 tokens and a caption of 12, `FastMerge` has drawn two lines. At a limit
of 75, `trim` cuts the first by `line_cutter` and `drop` leaves it out; then `FastMerge` merges the
record with the lines that are left. The records that need a search or the general rule are left to
`fit` and `merge`.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, TypeAlias

from capmerge.captions.fit import Fitter
from capmerge.captions.lines import LineWriter, Tail
from capmerge.captions.merge_fast import Drawn, FastMerge, Fitted
from capmerge.captions.record_texts import copy_of
from capmerge.captions.tally import Tally

if TYPE_CHECKING:
    from capmerge.captions.shapes import Shape

Lengths: TypeAlias = list[list[int] | None]
"""The token lengths of each record's lines, or None where they are not known."""
_Found: TypeAlias = dict[int, Fitted | None]
"""The lines that are left of a record, by the number of its `Drawn`; None if all fit."""

_MOST_SHAPES = 1024


class FastFit:
    """Merges the records of a block with lines that fit, and counts in `tally`.

    `make_fast` makes a `FastMerge` that counts in the tally that it is given.
    """

    def __init__(
        self,
        fitter: Fitter,
        lines: LineWriter,
        make_fast: Callable[[Tally], FastMerge],
        tally: Tally,
    ) -> None:
        self._fitter, self._lines, self._tally = fitter, lines, tally
        self._fast, self._tried = make_fast(tally), make_fast(Tally())
        self._tails: dict[int, tuple[Shape, list[Tail | None]]] = {}

    def merge_all(self, records: Sequence[Any]) -> tuple[list[int], Lengths]:
        """Merge records in place; return the numbers of those left to the rule, and their lengths.

        These are not touched.
        """
        # The lines of a record are known only after a merge, so a copy is merged first. That counts
        # into a tally of its own.
        drawn: list[Drawn] = []
        unknown = set(self._tried.merge_all(map(copy_of, records), drawn))
        self._tried.count()
        tried = [number for number in range(len(records)) if number not in unknown]

        # Fit the lines, and merge the records again with what is left of them.
        lengths, found = self._trim(drawn) if self._fitter.cuts else self._drop(drawn)
        fitted = {tried[place]: lines for place, lines in found.items()}
        numbers = sorted(fitted)
        self._fast.merge_all(
            [records[number] for number in numbers], fitted=[fitted[number] for number in numbers]
        )
        known = dict(zip(tried, lengths, strict=True))
        others = [number for number in range(len(records)) if number not in fitted]
        return others, [known.get(number) for number in others]

    def count(self) -> None:
        """Count the shapes of the records that were merged since the last call."""
        self._fast.count()

    def _drop(self, drawn: list[Drawn]) -> tuple[list[list[int]], _Found]:
        """Return the token lengths of the lines of each record, and those that `drop` leaves."""
        lengths = self._fitter.lengths_of([one.lines for one in drawn])
        found: _Found = {}
        for place, (one, counts) in enumerate(zip(drawn, lengths, strict=True)):
            found[place] = None
            if max(counts, default=0) > self._fitter.limit:
                kept, too_long = self._fitter.kept(counts)
                self._tally.fit_left_out += len(counts) - len(kept)
                self._tally.fit_too_long += too_long
                found[place] = self._fast.keep(one, kept)
        return lengths, found

    def _trim(self, drawn: list[Drawn]) -> tuple[list[list[int]], _Found]:
        """Return the token lengths of the lines of each record, and the lines cut by `trim`.

        A record is left to the rule where a field would have to be removed, or where a line has
        braces.
        """
        counts, fitting = self._fitter.cut_lines(
            [line for one in drawn for line in one.lines],
            list(chain.from_iterable(map(self._tails_of, drawn))),
        )
        exceeds = self._fitter.limit.__lt__
        lengths: list[list[int]] = []
        found: _Found = {}
        searched: list[int] = []
        end = 0
        for place, one in enumerate(drawn):
            start, end = end, end + len(one.lines)
            of_one = counts[start:end]
            lengths.append(of_one)
            too_long = sum(map(exceeds, of_one))
            if not too_long:
                found[place] = None
            elif one.can_be_cut:
                lines = [line for line in fitting[start:end] if line is not None]
                if len(lines) == len(of_one):
                    found[place] = one.shape, lines
                    self._tally.fit_cut += too_long
                else:
                    searched.append(place)
        return lengths, found | self._search(drawn, lengths, searched)

    def _tails_of(self, one: Drawn) -> list[Tail | None]:
        """Return the tail of each line of a record, which is that of all records of its shape."""
        known = self._tails.get(id(one.shape))
        if known is None:
            if len(self._tails) >= _MOST_SHAPES:
                self._tails.clear()
            # The shape is held here, so that no other object gets its identity.
            known = self._tails[id(one.shape)] = (
                one.shape,
                [self._lines.tail(draw.template) for draw in one.draws()],
            )
        return known[1]

    def _search(
        self, drawn: list[Drawn], lengths: list[list[int]], places: list[int]
    ) -> dict[int, Fitted]:
        """Return the lines of the records in some places that `trim` finds by a search."""
        fits = self._fitter.fit(
            [drawn[place].draws() for place in places], [lengths[place] for place in places]
        )
        found: dict[int, Fitted] = {}
        for place, fit in zip(places, fits, strict=True):
            one = drawn[place]
            if all(was.template is now.template for was, now in fit.cut):
                self._tally.fit_cut += len(fit.cut)
                self._tally.fit_too_long += fit.too_long
                cut = {id(now) for _, now in fit.cut}
                found[place] = (
                    one.shape,
                    [
                        self._lines.line(draw) if id(draw) in cut else line
                        for draw, line in zip(fit.draws, one.lines, strict=True)
                    ],
                )
        return found
