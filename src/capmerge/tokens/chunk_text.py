"""Shows a text as a model reads it: which words are in which chunk, and which are dropped."""

from typing import NamedTuple

from capmerge.tokens.chunks import Chunker
from capmerge.tokens.tokenizer import FileTokenizer


class Part(NamedTuple):
    """One part of a chunked text."""

    chunk: int | None
    """The number of its chunk, from 1; None for the part that is dropped."""
    text: str
    """The text as the tokenizer reads it, which for CLIP is cleaned and in lower case."""
    tokens: int


class ChunkedText(NamedTuple):
    """The parts of a text in order, one for each chunk, and at the end the part that is dropped."""

    parts: list[Part]

    @property
    def tokens(self) -> int:
        """The number of tokens of the whole text."""
        return sum(part.tokens for part in self.parts)

    @property
    def dropped(self) -> int:
        """The number of tokens that the model never sees."""
        return sum(part.tokens for part in self.parts if part.chunk is None)


def chunk_text(text: str, chunker: Chunker) -> ChunkedText:
    """The parts of `text` in the chunks that a run with `chunker` encodes, without padding."""
    cut = chunker.cut(text)
    return _parts(chunker.pieces(text), cut.filled[: chunker.chunks_of(cut)])


def crop_text(text: str, tokenizer: FileTokenizer, limit: int) -> ChunkedText:
    """The first `limit` tokens of `text` as one chunk, and the rest as the part that is dropped."""
    pieces = [piece for _, piece in tokenizer.encode_with_text(text)]
    return _parts(pieces, (min(limit, len(pieces)),))


def _parts(pieces: list[str], filled: tuple[int, ...]) -> ChunkedText:
    """The parts of a text whose tokens encode `pieces`; `filled` tokens go into each chunk."""
    parts, start = [], 0
    for number, n_tokens in enumerate(filled, 1):
        parts.append(Part(number, "".join(pieces[start : start + n_tokens]), n_tokens))
        start += n_tokens
    if start < len(pieces):
        parts.append(Part(None, "".join(pieces[start:]), len(pieces) - start))
    return ChunkedText(parts)
