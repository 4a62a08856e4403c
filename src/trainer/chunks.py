"""A caption as chunks of ids for each text encoder of a family. The rules of cutting are `capmerge.tokens`'s; knows no tensors.

A caption is cut once, and laid out when its batch is known: chunks of padding alone fill it up to the batch's chunk count.
"""

from typing import Literal, NamedTuple

from capmerge.tokens import CHUNK_TOKENS, ClipTokenizer, a1111, chunks_needed, kohya

Chunking = Literal["kohya", "a1111", "crop"]


class CutText(NamedTuple):
    """A caption cut for the tokenizers of a family."""

    ids: tuple[list[list[int]], ...]
    """For each tokenizer: a1111's chunks of 77 ids; otherwise one list of all ids, without BOS and EOS."""
    filled: tuple[int, ...]
    """How many tokens stand in each chunk that the whole caption needs; at least one chunk."""

    @property
    def tokens(self) -> int:
        """Of the whole caption."""
        return sum(self.filled)

    def dropped_tokens(self, n_chunks: int) -> int:
        """How many tokens `n_chunks` do not hold."""
        return sum(self.filled[n_chunks:])


class Chunker(NamedTuple):
    """How the captions of a run are cut."""

    tokenizers: tuple[ClipTokenizer, ...]
    """Of one family: they may differ in their padding, not in their ids."""
    chunking: Chunking
    max_chunks: int | None
    """None: as many as a caption needs."""

    def cut(self, text: str) -> CutText:
        """The chunks of one caption, before anything is dropped."""
        if self.chunking == "a1111":
            cuts = [a1111(text, tokenizer) for tokenizer in self.tokenizers]
            return CutText(tuple(cut.chunks for cut in cuts), tuple(end - start for start, end in cuts[0].spans))
        ids = self.tokenizers[0].encode(text)
        n_tokens = len(ids)
        filled = [CHUNK_TOKENS] * chunks_needed(n_tokens)
        filled[-1] += n_tokens - sum(filled)
        return CutText(([ids],) * len(self.tokenizers), tuple(filled))

    def chunks_of(self, cut: CutText) -> int:
        """How many chunks of it are encoded: those it needs, up to the limit."""
        needed = 1 if self.chunking == "crop" else len(cut.filled)
        return needed if self.max_chunks is None else min(needed, self.max_chunks)

    def lay_out(self, cut: CutText, n_chunks: int) -> tuple[list[list[int]], ...]:
        """For each tokenizer exactly `n_chunks` lists of 77 ids; tokens past them are dropped."""
        if self.chunking == "a1111":
            return tuple(
                (chunks + [[tokenizer.bos, tokenizer.eos, *[tokenizer.pad] * CHUNK_TOKENS]] * (n_chunks - len(chunks)))[:n_chunks]
                for tokenizer, chunks in zip(self.tokenizers, cut.ids, strict=True)
            )
        return tuple(kohya(ids, n_chunks * CHUNK_TOKENS, tokenizer) for tokenizer, (ids,) in zip(self.tokenizers, cut.ids, strict=True))
