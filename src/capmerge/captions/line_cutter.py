"""Cuts most lines that are too long from the counts of their pieces, without a search.

At a limit of 5 tokens, "1girl, solo, long hair" is cut before its last comma, and "A girl. She is
tall." after "girl.": the counts of the pieces between spaces, which counting the line has given,
add up to at most 5 there. `fit` states the rule and searches for the place; a test holds both
against each other.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from capmerge.captions.cut_places import has_plain_spaces, last_sentence_end
from capmerge.captions.lines import Tail
from capmerge.captions.longest_texts import unfolded
from capmerge.tokens.within_limit import count_within

if TYPE_CHECKING:
    from capmerge.tokens.counter import TokenCounter


class LineCutter:
    """Cuts lines into `limit` tokens where the counts of their pieces show the place."""

    def __init__(self, counter: "TokenCounter", limit: int) -> None:
        self._counter, self._limit = counter, limit

    def cut(
        self, lines: Sequence[str], tails: Sequence[Tail | None]
    ) -> tuple[list[int], list[str | None]]:
        """Return the token lengths of lines, in-line wildcards at their longest, and what fits.

        That is the line itself if it fits, or the line cut as `trim` cuts it. It is None where only
        a search can tell, as for a line with braces, and one without a tail.
        """
        texts, further = unfolded(lines, self._counter)
        commas_from = [-1 if tail is None else tail.commas_from for tail in tails]
        commas_from += [-1] * (len(texts) - len(lines))
        counts, places = count_within(self._counter, texts, self._limit, commas_from)
        for number, place in further.items():
            counts[number] = max([counts[number], *counts[place]])
            places.pop(number, None)
        lengths = counts[: len(lines)]
        fitting: list[str | None] = list(lines)
        for number, length in enumerate(lengths):
            if length > self._limit:
                end, tail = places.get(number), tails[number]
                fitting[number] = self._cut(lines[number], end, tail) if end and tail else None
        return lengths, fitting

    @staticmethod
    def _cut(line: str, end: int, tail: Tail) -> str | None:
        """Return `line` up to the last usable place before `end`."""
        if tail.commas_from >= 0:
            return line[:end]
        start = tail.start
        caption = line[start:] if start else line
        if not has_plain_spaces(caption):
            return None
        place = last_sentence_end(caption, end - start) if end > start else 0
        return line[: start + place] if place else None
