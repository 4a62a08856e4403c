"""Tokens: how many a caption has, which they are, and how a model's chunks are cut from them.

Owns CLIP's numbers - 75, 77, BOS, EOS - the families, and the two ways of cutting. The parts below
it: `tokens_clean` (text to clean text), `tokens_vocabulary` (files to vocabularies), `tokens_ids`
(text to ids), `tokens_table` (pieces of text to remembered counts) and `tokens_count` (texts to
counts). Knows nothing of records, templates or statistics. ftfy, regex, tokenizers and numpy are
imported at the first use, not with this module.
"""

import functools
import os
from pathlib import Path

from capmerge.errors import UsageError, printable
from capmerge.tokens.chunks import (
    BOS_ID,
    CHUNK_IDS,
    CHUNK_TOKENS,
    COMMA_BACKTRACK,
    EOS_ID,
    A1111Chunks,
    a1111,
    a1111_bounds,
    a1111_parts,
    chunks_needed,
    count_chunks,
    dropped_tokens,
    kohya,
    kohya_spans,
)
from capmerge.tokens.clean import clean
from capmerge.tokens.counter import TokenCounter
from capmerge.tokens.families import CLIP, T5_IDS, Family
from capmerge.tokens.tokenizer import ClipTokenizer, FileTokenizer
from capmerge.tokens.vocabulary import ClipVocabulary, read_clip_vocabulary, read_tokenizer_file

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


Tokenizer = ClipTokenizer | FileTokenizer

# family -> padding, and the literals it adds to CLIP's two. sd1 is SDXL's first encoder too, sdxl_g
# its second; SD2's padding "!" is an added token, so it is cut out of every word, while SDXL's
# second encoder pads with the same id and leaves "!" alone.
FAMILIES: dict[str, tuple[int, dict[str, int]]] = {
    "sd1": (EOS_ID, {}),
    "sd2": (0, {"!": 0}),
    "sdxl_g": (0, {}),
}


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

    Raises UsageError for a path that holds none, CapmergeError if the package with CLIP's
    vocabulary is missing.
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

    A CLIP tokenizer works as in sd-scripts, clean-up included, whatever the file says of it; any
    other works as its file says.

    Raises UsageError: no such path, no tokenizer there, or a broken file.
    """
    found = read_tokenizer_file(Path(path))
    if isinstance(found, ClipVocabulary):
        return ClipTokenizer(os.fspath(path), found)
    return FileTokenizer(os.fspath(path), found)


def load_readers(
    family: Family, path: str | os.PathLike[str] | None = None
) -> tuple[ClipTokenizer, FileTokenizer | None]:
    """What reads the captions of a model `family`: its CLIP, or the one at `path`, and the T5 at `path` if the family has a T5.

    Raises UsageError for a tokenizer that is no CLIP's where there is no T5, and as
    `load_tokenizer_file`.
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
