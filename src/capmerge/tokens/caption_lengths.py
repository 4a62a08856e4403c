"""How long many captions are for a trainer: tokens, and chunks as AUTOMATIC1111 cuts them, by the tokenizers of SD 1 and of SD 2.

Owns what makes this fast. Knows nothing of records or of the index.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from capmerge.tokens.chunks import CHUNK_TOKENS, COMMA_BACKTRACK, a1111, a1111_bounds, a1111_parts
from capmerge.tokens.counter import TokenCounter
from capmerge.tokens.families import ClipName
from capmerge.tokens.load import load_clip

Integers = NDArray[np.int64]

_NOWHERE = -(1 << 62)
_CERTAIN = (
    4 * CHUNK_TOKENS
)  # from this many tokens on the number of chunks always depends on the commas
_OPEN = np.array([len(set(a1111_bounds(n))) > 1 for n in range(_CERTAIN + 1)])


class TextLengths:
    """Counts with both tokenizers. They differ in an added token alone, so a text without it is counted once."""

    def __init__(self) -> None:
        self._sd1, self._sd2 = _Lengths("sd1"), _Lengths("sd2")
        self._differ = [
            literal
            for literal in self._sd2.tokenizer.added
            if literal not in self._sd1.tokenizer.added
        ]

    def count(self, texts: Sequence[str]) -> Integers:
        """(n_texts, 4): tokens by SD 1 and by SD 2, chunks by SD 1 and by SD 2."""
        found = np.empty((len(texts), 4), np.int64)
        found[:, 0], found[:, 2] = found[:, 1], found[:, 3] = self._sd1.count(texts)
        other = _holding(self._differ, texts)
        if other:
            found[other, 1], found[other, 3] = self._sd2.count([texts[number] for number in other])
        return found


class _Lengths:
    """Counts with one tokenizer."""

    def __init__(self, name: ClipName) -> None:
        self.tokenizer = load_clip(name)
        self._counter = TokenCounter(self.tokenizer)

    def count(self, texts: Sequence[str]) -> tuple[Integers, Integers]:
        """Tokens and chunks of each text."""
        # What AUTOMATIC1111 reads of a text without its backslashes is counted beside the text
        # itself.
        with_breaks: list[int] = []
        unescaped: dict[int, str] = {}
        for number in _holding(("\\", "BREAK"), texts):
            parts = a1111_parts(texts[number])
            if len(parts) > 1:
                with_breaks.append(number)
            elif parts[0] != texts[number]:
                unescaped[number] = parts[0]
        counts, commas = self._counter.count_tokens_and_commas(
            [*texts, *unescaped.values()], _depends_on_commas
        )
        chunks = a1111_chunk_counts(counts, commas)
        chunks[[*unescaped]] = chunks[len(texts) :]
        for number in with_breaks:
            chunks[number] = len(a1111(texts[number], self.tokenizer).chunks)
        return counts[: len(texts)], chunks[: len(texts)]


def _holding(words: Sequence[str], texts: Sequence[str]) -> list[int]:
    """The numbers of the texts that hold one of `words`."""
    joined = "\n".join(texts)
    held = [word for word in words if word in joined]
    return (
        [number for number, text in enumerate(texts) if any(word in text for word in held)]
        if held
        else []
    )


def a1111_chunk_counts(counts: Integers, commas: Integers) -> Integers:
    """How many chunks `tokens.a1111` makes of texts of so many tokens and without BREAK, given the places of their tokens ",".

    `commas`: as in `TokensAndCommas`. All texts are cut at once, one more chunk off each in a turn.
    """
    ends = np.cumsum(counts)
    here = ends - counts
    edges = np.concatenate(([_NOWHERE], commas, [-_NOWHERE]))
    chunks = np.ones(len(counts), np.int64)
    long = np.flatnonzero(counts > CHUNK_TOKENS)
    while len(long):
        full = here[long] + CHUNK_TOKENS
        number = np.searchsorted(edges, full)
        near = (edges[number - 1] >= full - COMMA_BACKTRACK) & (edges[number] != full)
        here[long] = np.where(near, edges[number - 1] + 1, full)
        chunks[long] += 1
        long = long[ends[long] - here[long] > CHUNK_TOKENS]
    return chunks


def _depends_on_commas(counts: Integers) -> Integers:
    return np.flatnonzero(_OPEN[np.minimum(counts, _CERTAIN)])
