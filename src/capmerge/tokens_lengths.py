"""How long many captions are for a trainer: tokens, and chunks as AUTOMATIC1111 cuts them, by the tokenizers of SD 1 and of SD 2.

Owns what makes this fast. Knows nothing of records or of the index.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from capmerge.tokens import (
    CHUNK_TOKENS,
    ClipTokenizer,
    TokenCounter,
    a1111,
    a1111_bounds,
    a1111_chunk_count,
    a1111_parts,
    load_tokenizer,
)

__all__ = ["TextLengths"]

Integers = NDArray[np.int64]

_CERTAIN = 4 * CHUNK_TOKENS  # from this many tokens on the number of chunks always depends on the commas
_OPEN = np.array([len(set(a1111_bounds(n))) > 1 for n in range(_CERTAIN + 1)])


class TextLengths:
    """Counts with both tokenizers. They differ in an added token alone, so a text without it is counted once."""

    def __init__(self) -> None:
        self._sd1, self._sd2 = _Lengths("sd1"), _Lengths("sd2")
        self._differ = [literal for literal in self._sd2.tokenizer.added if literal not in self._sd1.tokenizer.added]

    def count(self, texts: Sequence[str]) -> Integers:
        """(n_texts, 4): tokens by SD 1 and by SD 2, chunks by SD 1 and by SD 2."""
        found = np.empty((len(texts), 4), np.int64)
        found[:, 0], found[:, 2] = found[:, 1], found[:, 3] = self._sd1.count(texts)
        other = sorted({number for literal in self._differ for number, text in enumerate(texts) if literal in text})
        if other:
            found[other, 1], found[other, 3] = self._sd2.count([texts[number] for number in other])
        return found


class _Lengths:
    """Counts with one tokenizer."""

    def __init__(self, family: str) -> None:
        tokenizer = load_tokenizer(family)
        assert isinstance(tokenizer, ClipTokenizer)  # a family's always is
        self.tokenizer = tokenizer
        self._counter = TokenCounter(tokenizer)

    def count(self, texts: Sequence[str]) -> tuple[Integers, Integers]:
        """Tokens and chunks of each text."""
        # What AUTOMATIC1111 reads of a text without its backslashes is counted beside the text itself.
        with_breaks: list[int] = []
        unescaped: dict[int, str] = {}
        for number, text in enumerate(texts):
            if "\\" in text or "BREAK" in text:
                parts = a1111_parts(text)
                if len(parts) > 1:
                    with_breaks.append(number)
                elif parts[0] != text:
                    unescaped[number] = parts[0]
        found = self._counter.count_tokens_and_commas([*texts, *unescaped.values()], _depends_on_commas)
        chunks = np.maximum(1, -(-found.counts // CHUNK_TOKENS))
        for number, commas in found.commas.items():
            chunks[number] = a1111_chunk_count(int(found.counts[number]), commas)
        chunks[[*unescaped]] = chunks[len(texts) :]
        for number in with_breaks:
            chunks[number] = len(a1111(texts[number], self.tokenizer).chunks)
        return found.counts[: len(texts)], chunks[: len(texts)]


def _depends_on_commas(counts: Integers) -> Integers:
    return np.flatnonzero(_OPEN[np.minimum(counts, _CERTAIN)])
