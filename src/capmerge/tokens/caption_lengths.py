"""Measures the lengths of many captions for a trainer, by the tokenizers of SD 1 and of SD 2.

The lengths are in tokens, and in chunks as AUTOMATIC1111 cuts them. This module counts the chunks
of many texts at once, because cutting each of them would be slow.
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
# From this many tokens on, the number of chunks always depends on the commas.
_CERTAIN = 4 * CHUNK_TOKENS
_OPEN = np.array([len(set(a1111_bounds(n))) > 1 for n in range(_CERTAIN + 1)])


class TextLengths:
    """Measures texts with both tokenizers.

    They differ only in an added token, so a text without it is counted once.
    """

    def __init__(self) -> None:
        self._sd1, self._sd2 = _Lengths("sd1"), _Lengths("sd2")
        self._differ = [
            literal
            for literal in self._sd2.tokenizer.added
            if literal not in self._sd1.tokenizer.added
        ]

    def count(self, texts: Sequence[str]) -> Integers:
        """The lengths of all texts, (n_texts, 4).

        The columns are tokens by SD 1, tokens by SD 2, chunks by SD 1, and chunks by SD 2.
        """
        lengths = np.empty((len(texts), 4), np.int64)
        lengths[:, 0], lengths[:, 2] = lengths[:, 1], lengths[:, 3] = self._sd1.count(texts)
        other = _holding(self._differ, texts)
        if other:
            counted = self._sd2.count([texts[number] for number in other])
            lengths[other, 1], lengths[other, 3] = counted
        return lengths


class _Lengths:
    """Measures texts with one tokenizer."""

    def __init__(self, name: ClipName) -> None:
        self.tokenizer = load_clip(name)
        self._counter = TokenCounter(self.tokenizer)

    def count(self, texts: Sequence[str]) -> tuple[Integers, Integers]:
        """The numbers of tokens and of chunks of each text."""
        # AUTOMATIC1111 reads a text without its backslashes. So the chunks of a text with some are
        # counted from the unescaped text, which is put after all the texts. A text with BREAK is
        # cut by itself.
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
    """The numbers of the texts that contain one of `words`."""
    joined = "\n".join(texts)
    held = [word for word in words if word in joined]
    return (
        [number for number, text in enumerate(texts) if any(word in text for word in held)]
        if held
        else []
    )


def a1111_chunk_counts(counts: Integers, commas: Integers) -> Integers:
    """The number of chunks that `chunks.a1111` makes of each text without BREAK.

    `counts` and `commas` are those of `TokensAndCommas`.
    """
    # How it works: `here` is where the open chunk of each text begins. Each turn of the loop cuts
    # one chunk off every text that is still too long: after 75 tokens, or after the last comma
    # before that if it is near and the 76th token is not a comma.
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
    """The indices of the counts that do not decide the number of chunks without the commas."""
    return np.flatnonzero(_OPEN[np.minimum(counts, _CERTAIN)])
