"""Tokens: how many a caption has, which they are, and how a model's chunks are cut from them.

Owns CLIP's numbers - 75, 77, BOS, EOS - the families, and the two ways of cutting. The parts below it: `tokens_clean` (text to clean text),
`tokens_vocabulary` (files to vocabularies), `tokens_ids` (text to ids), `tokens_table` (pieces of text to remembered counts) and
`tokens_count` (texts to counts). Knows nothing of records, templates or statistics.
ftfy, regex, tokenizers and numpy are imported at the first use, not with this module.
"""

import functools
import itertools
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from capmerge.errors import UsageError, printable
from capmerge.families import CLIP, T5_IDS, Family
from capmerge.tokens_clean import clean
from capmerge.tokens_count import TokenCounter
from capmerge.tokens_ids import ClipTokenizer, FileTokenizer
from capmerge.tokens_vocabulary import ClipVocabulary, read_clip_vocabulary, read_tokenizer_file

__all__ = [
    "BOS_ID",
    "CHUNK_IDS",
    "CHUNK_TOKENS",
    "COMMA_BACKTRACK",
    "EOS_ID",
    "FAMILIES",
    "A1111Chunks",
    "ClipTokenizer",
    "FileTokenizer",
    "TokenCounter",
    "Tokenizer",
    "a1111",
    "a1111_bounds",
    "a1111_parts",
    "chunks_needed",
    "clean",
    "count_chunks",
    "dropped_tokens",
    "kohya",
    "kohya_spans",
    "load_readers",
    "load_tokenizer",
    "load_tokenizer_file",
]

CHUNK_TOKENS = 75
CHUNK_IDS = 77  # BOS, 75 tokens, EOS or padding
BOS_ID = 49406
EOS_ID = 49407
COMMA_BACKTRACK = 20  # AUTOMATIC1111's default for comma_padding_backtrack

Tokenizer = ClipTokenizer | FileTokenizer

# family -> padding, and the literals it adds to CLIP's two. sd1 is SDXL's first encoder too, sdxl_g its second; SD2's padding "!" is an
# added token, so it is cut out of every word, while SDXL's second encoder pads with the same id and leaves "!" alone.
FAMILIES: dict[str, tuple[int, dict[str, int]]] = {"sd1": (EOS_ID, {}), "sd2": (0, {"!": 0}), "sdxl_g": (0, {})}


@functools.cache
def _clip_vocabulary() -> ClipVocabulary:
    return read_clip_vocabulary()


@functools.cache
def _load_family(family: str) -> ClipTokenizer:
    pad, added = FAMILIES[family]
    vocabulary = _clip_vocabulary()
    return ClipTokenizer(family, vocabulary._replace(pad=pad, added=vocabulary.added | added))


def load_tokenizer(family_or_path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer of a family (`sd1`, `sd2`, `sdxl_g`), or the one at a path. A family takes about 0.2 s the first time in a process.

    Raises UsageError for a path that holds none, CapmergeError if the package with CLIP's vocabulary is missing.
    """
    if isinstance(family_or_path, str) and family_or_path in FAMILIES:
        return _load_family(family_or_path)
    if not Path(family_or_path).exists():
        raise UsageError(
            f"tokenizer {os.fspath(family_or_path)}: neither a family nor an existing path. "
            f"Expected {', '.join(FAMILIES)}, a Hugging Face tokenizer folder, or a tokenizer.json."
        )
    return load_tokenizer_file(family_or_path)


def load_tokenizer_file(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a Hugging Face folder or `tokenizer.json`.

    A CLIP tokenizer works as in sd-scripts, clean-up included, whatever the file says of it; any other works as its file says.

    Raises UsageError: no such path, no tokenizer there, or a broken file.
    """
    found = read_tokenizer_file(Path(path))
    if isinstance(found, ClipVocabulary):
        return ClipTokenizer(os.fspath(path), found)
    return FileTokenizer(os.fspath(path), found)


def load_readers(family: Family, path: str | os.PathLike[str] | None = None) -> tuple[ClipTokenizer, FileTokenizer | None]:
    """What reads the captions of a model `family`: its CLIP, or the one at `path`, and the T5 at `path` if the family has a T5.

    Raises UsageError for a tokenizer that is no CLIP's where there is no T5, and as `load_tokenizer_file`.
    """
    given = load_tokenizer_file(path) if path else None
    if isinstance(given, ClipTokenizer):
        return given, None
    if given and family not in T5_IDS:
        raise UsageError(
            f"--tokenizer {printable(given.name)}: it is no CLIP tokenizer, and --family {family} reads with CLIP alone. "
            f"Give one of CLIP, or --family {' or '.join(T5_IDS)}."
        )
    return _load_family(CLIP[family]), given


def chunks_needed(n_tokens: int) -> int:
    """How many chunks of 75 hold `n_tokens`; an empty caption takes one too.

    >>> [chunks_needed(n) for n in (0, 75, 76)]
    [1, 1, 2]
    """
    return max(1, -(-n_tokens // CHUNK_TOKENS))


def dropped_tokens(n_tokens: int, max_tokens: int) -> int:
    """How many of `n_tokens` a limit of `max_tokens` drops."""
    return max(0, n_tokens - max_tokens)


def kohya(ids: Sequence[int], max_tokens: int, tokenizer: ClipTokenizer) -> list[list[int]]:
    """The chunks that sd-scripts gives the text encoder for `ids`: always `max_tokens` / 75 lists of 77 ids; what exceeds them is dropped.

    Where the padding is not EOS, a chunk that ends or begins inside the padding gets the EOS that sd-scripts puts there, and a real id 0
    in that place is mistaken for padding as it is there. Source: sd-scripts, library/strategy_base.py, _get_input_ids.

    Raises UsageError if `max_tokens` is not a positive multiple of 75.
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


def kohya_spans(n_tokens: int, max_tokens: int) -> list[tuple[int, int]]:
    """[start, end) of the tokens in each chunk of `kohya`; chunks without content are empty spans, tokens past the last end are dropped.

    >>> kohya_spans(80, 225)
    [(0, 75), (75, 80), (80, 80)]

    Raises UsageError if `max_tokens` is not a positive multiple of 75.
    """
    edges = [min(n_tokens, chunk * CHUNK_TOKENS) for chunk in range(count_chunks(max_tokens) + 1)]
    return list(itertools.pairwise(edges))


def count_chunks(max_tokens: int) -> int:
    """How many chunks `max_tokens` are. Raises UsageError if they do not fill whole ones."""
    if max_tokens < CHUNK_TOKENS or max_tokens % CHUNK_TOKENS:
        raise UsageError(f"{max_tokens} tokens: expected a multiple of {CHUNK_TOKENS}, such as 75, 150 or 225.")
    return max_tokens // CHUNK_TOKENS


class A1111Chunks(NamedTuple):
    """A text cut the way AUTOMATIC1111 cuts a prompt.

    `chunks`: lists of 77 ids. `spans`: [start, end) of each chunk's content in the ids of all `a1111_parts`, one after the other.
    `token_count`: what the web UI shows, 75 for every finished chunk, padded or not, plus the last chunk's content.
    """

    chunks: list[list[int]]
    spans: list[tuple[int, int]]
    token_count: int


_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_ESCAPE = re.compile(r"\\([()\[\]\\]?)")


def a1111_parts(text: str) -> list[str]:
    r"""What AUTOMATIC1111 tokenizes for `text`: the parts between `BREAK`s, without the backslash escapes.

    A backslash before ( ) [ ] \ makes that character plain text, and any other backslash vanishes. There is no emphasis here:
    unescaped brackets and `:1.2` are text. Source: stable-diffusion-webui, modules/prompt_parser.py, parse_prompt_attention.

    >>> a1111_parts(r"saber \(fate\) BREAK 1girl")
    ['saber (fate)', '1girl']
    """
    return [_ESCAPE.sub(r"\1", part) for part in _BREAK.split(text)]


def a1111(text: str, tokenizer: ClipTokenizer) -> A1111Chunks:
    """The chunks that AUTOMATIC1111 makes of `text`: any number of them, at least one.

    A chunk closes at `BREAK`, even if empty, and at 75 tokens; but if the 76th is not a comma and a comma lies among the last 20, what
    follows that comma moves to the next chunk. Only the token "," counts, not ",," or "),". Behind the content stand EOS and padding.
    Source: stable-diffusion-webui, modules/sd_hijack_clip.py, tokenize_line, with its default settings.
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
    """The fewest and the most chunks that `a1111` makes of so many tokens without BREAK, wherever the commas stand.

    >>> a1111_bounds(75), a1111_bounds(131), a1111_bounds(132)
    ((1, 1), (2, 2), (2, 3))
    """
    most = 1 + max(0, -(-(n_tokens - CHUNK_TOKENS) // (CHUNK_TOKENS - COMMA_BACKTRACK + 1)))
    return chunks_needed(n_tokens), most


def _a1111_spans(parts: Sequence[Sequence[int]], comma: int | None) -> tuple[list[tuple[int, int]], int]:
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
            if full and index != comma and last_comma is not None and here - last_comma <= COMMA_BACKTRACK:
                close(last_comma + 1)
            elif full:
                close(here)
            if index == comma and not full:  # a comma that opens a chunk is never looked back to
                last_comma = here
            here += 1
    finished = len(spans)
    if here > start or not spans:
        close(here)
    unfinished = sum(end - start for start, end in spans[finished:])
    return spans, finished * CHUNK_TOKENS + unfinished
