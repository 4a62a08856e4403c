"""Loads the tokenizers of a model family or at a path.

This module combines the parts of this folder into a tokenizer. ftfy, regex, tokenizers and numpy
are imported at the first use, not with this module.
"""

import functools
import os
from pathlib import Path

from capmerge.errors import UsageError, printable
from capmerge.tokens.families import (
    CLIP_OF_FAMILY,
    CLIP_VARIANTS,
    T5_IDS,
    ClipName,
    TokenizerFamily,
)
from capmerge.tokens.tokenizer import ClipTokenizer, FileTokenizer
from capmerge.tokens.vocabulary import ClipVocabulary, read_clip_vocabulary, read_tokenizer_file

Tokenizer = ClipTokenizer | FileTokenizer


@functools.cache
def _clip_vocabulary() -> ClipVocabulary:
    return read_clip_vocabulary()


@functools.cache
def load_clip(name: ClipName) -> ClipTokenizer:
    """The CLIP tokenizer of that name, which takes about 0.2 s the first time in a process.

    Raises `CapmergeError` if the package with CLIP's vocabulary is missing.
    """
    pad, added = CLIP_VARIANTS[name]
    vocabulary = _clip_vocabulary()
    return ClipTokenizer(name, vocabulary._replace(pad=pad, added=vocabulary.added | added))


def load_tokenizer_file(path: str | os.PathLike[str]) -> Tokenizer:
    """The tokenizer in a Hugging Face folder or `tokenizer.json`.

    A CLIP tokenizer works as in sd-scripts, including the clean-up, whatever its file says; any
    other works as its file says.

    Raises `UsageError` if the path does not exist, holds no tokenizer, or holds a broken file.
    """
    content = read_tokenizer_file(Path(path))
    if isinstance(content, ClipVocabulary):
        return ClipTokenizer(os.fspath(path), content)
    return FileTokenizer(os.fspath(path), content)


def load_readers(
    family: TokenizerFamily, path: str | os.PathLike[str] | None = None
) -> tuple[ClipTokenizer, FileTokenizer | None]:
    """The CLIP tokenizer that reads the captions of a model `family`, and its T5 tokenizer, if any.

    A CLIP tokenizer at `path` replaces the family's own. Any other tokenizer at `path` is the T5 of
    a family that has one; without it the second result is None.

    Raises `UsageError` for a tokenizer that is not CLIP's if the family has no T5, and what
    `load_tokenizer_file` and `load_clip` raise.
    """
    given = load_tokenizer_file(path) if path else None
    if isinstance(given, ClipTokenizer):
        return given, None
    if given and family not in T5_IDS:
        raise UsageError(
            f"--tokenizer {printable(given.name)}: found a tokenizer that is not CLIP's, "
            f"but --family {family} uses CLIP alone. "
            f"Give a CLIP tokenizer, or --family {' or '.join(T5_IDS)}."
        )
    return load_clip(CLIP_OF_FAMILY[family]), given
