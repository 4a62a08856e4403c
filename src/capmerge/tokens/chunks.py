"""Cuts captions into a model's chunks, as sd-scripts and as AUTOMATIC1111 do.

This module also owns the numbers of a chunk: 75 tokens, 77 ids, BOS and EOS.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from capmerge.errors import UsageError

if TYPE_CHECKING:
    from capmerge.tokens.tokenizer import ClipTokenizer

CHUNK_TOKENS = 75
CHUNK_IDS = 77  # BOS, 75 tokens, EOS or padding
BOS_ID = 49406
EOS_ID = 49407
COMMA_BACKTRACK = 20  # AUTOMATIC1111's default for comma_padding_backtrack


def chunks_needed(n_tokens: int) -> int:
    """The number of chunks of 75 that hold `n_tokens`; an empty caption takes one, too.

    >>> [chunks_needed(n) for n in (0, 75, 76)]
    [1, 1, 2]
    """
    return max(1, -(-n_tokens // CHUNK_TOKENS))


def kohya(ids: Sequence[int], max_tokens: int, tokenizer: "ClipTokenizer") -> list[list[int]]:
    """The chunks that sd-scripts gives the text encoder for `ids`.

    They are always `max_tokens` / 75 lists of 77 ids; tokens that exceed them are dropped. If the
    padding is not EOS, a chunk that ends or begins inside the padding gets the EOS that sd-scripts
    puts there, and a real id 0 in that position is mistaken for padding, as sd-scripts does.
    Source: sd-scripts, library/strategy_base.py, _get_input_ids.

    Raises `UsageError` if `max_tokens` is not a positive multiple of 75.
    """
    n_chunks = count_chunks(max_tokens)
    bos, eos, pad = tokenizer.bos, tokenizer.eos, tokenizer.pad
    kept = list(ids[:max_tokens])
    row = [*kept, eos, *[pad] * (max_tokens - len(kept))]  # without the leading BOS
    if n_chunks == 1:
        return [[bos, *row]]
    chunks = []
    for start in range(0, max_tokens, CHUNK_TOKENS):
        content, last = row[start : start + CHUNK_TOKENS], row[-1]
        if pad != eos:
            if content[-1] not in (eos, pad):
                last = eos
            if content[0] == pad:
                content[0] = eos
        chunks.append([bos, *content, last])
    return chunks


def count_chunks(max_tokens: int) -> int:
    """The number of chunks that `max_tokens` fill.

    Raises `UsageError` if they do not fill whole chunks.
    """
    if max_tokens < CHUNK_TOKENS or max_tokens % CHUNK_TOKENS:
        raise UsageError(
            f"{max_tokens} tokens: expected a multiple of {CHUNK_TOKENS}, such as 75, 150 or 225."
        )
    return max_tokens // CHUNK_TOKENS


class A1111Chunks(NamedTuple):
    """A text that is cut the way AUTOMATIC1111 cuts a prompt.

    `chunks` are lists of 77 ids. `spans` are the [start, end) of each chunk's content in the ids of
    all `a1111_parts`, one after the other. `token_count` is the number that the web UI shows: 75
    for every finished chunk, padded or not, plus the content of the last chunk.
    """

    chunks: list[list[int]]
    spans: list[tuple[int, int]]
    token_count: int


_BREAK = re.compile(r"\bBREAK\b")


def a1111_parts(text: str) -> list[str]:
    r"""The parts of `text` that AUTOMATIC1111 tokenizes.

    They are the parts between `BREAK`s, without the backslash escapes. A backslash before
    ( ) [ ] \ makes that character plain text, and any other backslash vanishes. There is no
    emphasis here: unescaped brackets and `:1.2` are text. Source: stable-diffusion-webui,
    modules/prompt_parser.py, parse_prompt_attention.

    >>> a1111_parts(r"saber \(fate\) BREAK 1girl")
    ['saber (fate)', '1girl']
    """
    first, *others = _BREAK.split(text) if "BREAK" in text else [text]
    if others:
        *inner, last = others
        first, *others = first.rstrip(), *(part.strip() for part in inner), last.lstrip()
    return [_unescaped(part) for part in (first, *others)]


def _unescaped(text: str) -> str:
    """Return `text` without its backslashes; two in a row are one."""
    if "\\" not in text:
        return text
    return "\\".join([part.replace("\\", "") for part in text.split("\\\\")])


def a1111(text: str, tokenizer: "ClipTokenizer") -> A1111Chunks:
    """The chunks that AUTOMATIC1111 makes of `text`: any number of them, but at least one.

    A chunk closes at `BREAK`, even if it is empty, and at 75 tokens. But if the 76th token is not a
    comma and there is a comma among the last 20, the tokens after that comma move to the next
    chunk. Only the token "," counts, not ",," or "),". EOS and padding follow the content. Source:
    stable-diffusion-webui, modules/sd_hijack_clip.py, tokenize_line, with its default settings.
    """
    parts = [tokenizer.encode(part) for part in a1111_parts(text)]
    spans, token_count = _a1111_spans(parts, tokenizer.comma)
    ids = [index for part in parts for index in part]
    chunks = []
    for start, end in spans:
        padding = [tokenizer.pad] * (CHUNK_TOKENS - (end - start))
        chunks.append([tokenizer.bos, *ids[start:end], tokenizer.eos, *padding])
    return A1111Chunks(chunks, spans, token_count)


def a1111_bounds(n_tokens: int) -> tuple[int, int]:
    """The fewest and the most chunks that `a1111` makes of that many tokens without BREAK.

    The commas decide where between these two the number is.

    >>> a1111_bounds(75), a1111_bounds(131), a1111_bounds(132)
    ((1, 1), (2, 2), (2, 3))
    """
    most = 1 + max(0, -(-(n_tokens - CHUNK_TOKENS) // (CHUNK_TOKENS - COMMA_BACKTRACK + 1)))
    return chunks_needed(n_tokens), most


def _a1111_spans(
    parts: Sequence[Sequence[int]], comma: int | None
) -> tuple[list[tuple[int, int]], int]:
    """The `spans` and the `token_count` of `A1111Chunks` for the ids of all parts."""
    # `start` is where the open chunk begins, `here` the current token, both counted over all parts.
    # `last_comma` is the last comma that the open chunk may be cut after.
    spans: list[tuple[int, int]] = []
    start = here = 0
    last_comma: int | None = None

    def close(end: int) -> None:
        nonlocal start, last_comma
        spans.append((start, end))
        start, last_comma = end, None

    for number, part in enumerate(parts):
        if number:
            close(here)
        for index in part:
            full = here - start == CHUNK_TOKENS
            if (
                full
                and index != comma
                and last_comma is not None
                and here - last_comma <= COMMA_BACKTRACK
            ):
                close(last_comma + 1)
            elif full:
                close(here)
            # A chunk is never cut after a comma that opens it.
            if index == comma and not full:
                last_comma = here
            here += 1
    finished = len(spans)
    if here > start or not spans:
        close(here)
    unfinished = sum(end - start for start, end in spans[finished:])
    return spans, finished * CHUNK_TOKENS + unfinished


Splitting = Literal["kohya", "a1111"]
"""The ways to cut a caption into any number of chunks: as sd-scripts or as AUTOMATIC1111 does."""
Chunking = Literal[Splitting, "crop"]
"""The ways to fit a caption into chunks: one of `Splitting`, or only its first chunk."""


class CutText(NamedTuple):
    """A caption cut for the tokenizers of a family."""

    ids: tuple[list[list[int]], ...]
    """The lists of ids for each tokenizer.

    With a1111 they are its chunks of 77 ids; otherwise one list of all ids, without BOS and EOS."""
    filled: tuple[int, ...]
    """The number of tokens in each chunk that the whole caption needs; at least one chunk."""

    @property
    def tokens(self) -> int:
        """The number of tokens in the whole caption."""
        return sum(self.filled)

    def dropped_tokens(self, n_chunks: int) -> int:
        """The number of tokens that do not fit into `n_chunks`."""
        return sum(self.filled[n_chunks:])


class Chunker(NamedTuple):
    """The one rule by which captions are cut, for training and for `capmerge preview` alike."""

    tokenizers: "tuple[ClipTokenizer, ...]"
    """The tokenizers of one family, which may differ in their padding, but not in their ids."""
    chunking: Chunking
    max_chunks: int | None
    """The largest number of chunks that are encoded; None for as many as a caption needs."""

    def cut(self, text: str) -> CutText:
        """The chunks of one caption, before any of them is dropped."""
        if self.chunking == "a1111":
            cuts = [a1111(text, tokenizer) for tokenizer in self.tokenizers]
            return CutText(
                tuple(cut.chunks for cut in cuts),
                tuple(end - start for start, end in cuts[0].spans),
            )
        ids = self.tokenizers[0].encode(text)
        n_tokens = len(ids)
        filled = [CHUNK_TOKENS] * chunks_needed(n_tokens)
        filled[-1] += n_tokens - sum(filled)
        return CutText(([ids],) * len(self.tokenizers), tuple(filled))

    def pieces(self, text: str) -> list[str]:
        """The part of the cleaned text that each token of `cut` encodes, in order."""
        parts = a1111_parts(text) if self.chunking == "a1111" else [text]
        encode = self.tokenizers[0].encode_with_text
        return [piece for part in parts for _, piece in encode(part)]

    def chunks_of(self, cut: CutText) -> int:
        """The number of chunks of a caption that are encoded: those it needs, up to the limit."""
        needed = 1 if self.chunking == "crop" else len(cut.filled)
        return needed if self.max_chunks is None else min(needed, self.max_chunks)

    def lay_out(self, cut: CutText, n_chunks: int) -> tuple[list[list[int]], ...]:
        """Exactly `n_chunks` lists of 77 ids for each tokenizer; tokens past them are dropped."""
        if self.chunking == "a1111":
            return tuple(
                (
                    chunks
                    + [[tokenizer.bos, tokenizer.eos, *[tokenizer.pad] * CHUNK_TOKENS]]
                    * (n_chunks - len(chunks))
                )[:n_chunks]
                for tokenizer, chunks in zip(self.tokenizers, cut.ids, strict=True)
            )
        return tuple(
            kohya(ids, n_chunks * CHUNK_TOKENS, tokenizer)
            for tokenizer, (ids,) in zip(self.tokenizers, cut.ids, strict=True)
        )
