"""A text as a model reads it: which words stand in which chunk, and which are dropped."""

from itertools import chain
from typing import Literal, NamedTuple

from capmerge.tokens.chunks import CHUNK_TOKENS, a1111, a1111_parts, kohya_spans
from capmerge.tokens.load import Tokenizer
from capmerge.tokens.tokenizer import ClipTokenizer

Chunking = Literal["kohya", "a1111"]


class Part(NamedTuple):
    """A piece of a cut text."""

    chunk: int | None
    """Its number from 1; None for what is dropped."""
    text: str
    """As CLIP reads it: cleaned, in lower case."""
    tokens: int


class Cut(NamedTuple):
    """A text cut into chunks."""

    parts: list[Part]
    chunks: int
    """Chunks that are encoded, those of padding alone included."""

    @property
    def tokens(self) -> int:
        """Tokens of the whole text."""
        return sum(part.tokens for part in self.parts)

    @property
    def dropped(self) -> int:
        """Tokens that the model never sees."""
        return sum(part.tokens for part in self.parts if part.chunk is None)


class Cutter(NamedTuple):
    """How texts are cut: sd-scripts' way or AUTOMATIC1111's, up to `max_tokens` (None: no limit, a1111 only)."""

    tokenizer: ClipTokenizer
    chunking: Chunking
    max_tokens: int | None

    def cut(self, text: str) -> Cut:
        """The chunks of one text as it is trained."""
        if self.chunking == "a1111":
            pairs = list(
                chain.from_iterable(
                    self.tokenizer.encode_with_text(part) for part in a1111_parts(text)
                )
            )
            spans = a1111(text, self.tokenizer).spans
            if self.max_tokens:
                spans = spans[: self.max_tokens // CHUNK_TOKENS]
        else:
            assert self.max_tokens is not None  # kohya always has a limit
            pairs = self.tokenizer.encode_with_text(text)
            spans = kohya_spans(len(pairs), self.max_tokens)
        pieces = [piece for _, piece in pairs]
        parts = [
            Part(number, "".join(pieces[start:end]), end - start)
            for number, (start, end) in enumerate(spans, 1)
        ]
        end = spans[-1][1]
        if end < len(pieces):
            parts.append(Part(None, "".join(pieces[end:]), len(pieces) - end))
        return Cut(parts, len(spans))


def crop(text: str, tokenizer: Tokenizer, limit: int) -> Cut:
    """The first `limit` tokens of a text as one chunk, and the rest as dropped."""
    pairs = tokenizer.encode_with_text(text)
    kept, rest = pairs[:limit], pairs[limit:]
    parts = [
        Part(number, "".join(piece for _, piece in some), len(some))
        for number, some in ((1, kept), (None, rest))
        if some or number
    ]
    return Cut(parts, 1)
