"""The search for the longest cut of a draw that fits, which `--fit N trim` asks for.

The draw "{tags}, {caption}" of "1girl, solo" and "A girl. She is tall." is cut, as the limit gets
lower, to "1girl, solo, A girl.", then to "1girl, solo", "1girl" and "1gir". A search does not count
tokens: it yields the draws that it wants to be measured, so that those of many searches are counted
together.
"""

from bisect import bisect_right
from collections.abc import Generator, Iterable, Sequence
from typing import TypeAlias

from capmerge.captions.cut_places import LOOSE, sentence_ends, tag_ends, word_ends
from capmerge.captions.templates import Draw
from capmerge.captions.wildcard import unbreakable_spans

Search: TypeAlias = Generator[Draw, bool, tuple[Draw, bool]]
"""A search for the longest cut that fits.

It yields a draw to be measured, is sent whether that draw fits, and returns its result and whether
the result fits.
"""


class CutSearch:
    """Makes searches for cuts of at most `limit` tokens.

    With `wildcards`, braces in captions are intended in-line wildcards, which no cut goes through.
    """

    def __init__(self, limit: int, *, wildcards: bool) -> None:
        self._limit, self._wildcards = limit, wildcards

    def of(self, draw: Draw, length: int) -> Search:
        """Search for the longest cut of a draw of `length` tokens that fits.

        The last field is cut at the end of a whole tag or sentence. A field that does not fit even
        then is removed, unless it is the only one: that is cut after a word, or inside its first
        word if that is too long already.
        """
        letters = sum(map(len, map(draw.value, draw.template.fields)))
        letters_that_fit = letters * self._limit // length
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

    def _cut_at_word(self, draw: Draw, likely: int) -> Search:
        """Cut a draw of one field after as many whole words as fit, or else inside the first word.

        At least one character stays, even if it does not fit.
        """
        (field,) = draw.template.fields
        value = draw.value(field)
        words = self._ends(draw, field, word_ends(value))
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
        return self._ends(draw, field, tag_ends(value) if field == "tags" else sentence_ends(value))

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
            len(value[:end].rstrip(LOOSE)) if value[end - 1] in LOOSE else end
            for end in ends
            if end < size
        ]
        return [end for end in dict.fromkeys(kept) if end]


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
