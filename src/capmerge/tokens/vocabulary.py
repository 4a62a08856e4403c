"""Reads the CLIP vocabulary of an installed package, or the tokenizer files of the user.

This module owns the paths, the file formats, and the messages about files that are missing or
something else. It does not tokenize.
"""

import itertools
from pathlib import Path
from typing import Any, NamedTuple

from capmerge.errors import CapmergeError, UsageError

BOS = "<|startoftext|>"
EOS = "<|endoftext|>"

_PACKAGE_FILE = "clip/bpe_simple_vocab_16e6.txt.gz"
_MERGES = 49_152 - 256 - 2  # the file holds 262,145 merges; CLIP's vocabulary stops here


class ClipVocabulary(NamedTuple):
    """The parts of a CLIP tokenizer.

    `ids` maps tokens to ids; tokens are in the byte alphabet, with `</w>` at the end of a word.
    `merges` are pairs, most urgent first. `added` maps literals to ids; they are searched in the
    raw text, in their exact case, before anything else happens to it. `pad` is the padding id.
    """

    ids: dict[str, int]
    merges: list[tuple[str, str]]
    added: dict[str, int]
    pad: int


def byte_alphabet() -> dict[int, str]:
    """The printable character that the vocabulary uses for each byte.

    The bytes are in the order of the vocabulary's first 256 ids. Source: openai/CLIP,
    clip/simple_tokenizer.py, bytes_to_unicode.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {
        byte: chr(256 + n) for n, byte in enumerate(others)
    }


def read_clip_vocabulary() -> ClipVocabulary:
    """CLIP's own vocabulary of 49,408 ids, with EOS as padding.

    Reading it takes about 0.06 s and no network. The file is in the package openai-clip, which is
    found by its metadata and never imported, because importing it would import torch.

    Raises `CapmergeError` if the package or the file is missing or damaged.
    """
    import gzip
    from importlib import metadata  # takes 20 ms, which only those who count have to pay

    try:
        path = Path(str(metadata.distribution("openai-clip").locate_file(_PACKAGE_FILE)))
        with gzip.open(path, "rt", encoding="utf-8") as file:
            lines = list(itertools.islice(file, _MERGES + 1))[1:]  # the first line is a version
    except metadata.PackageNotFoundError:
        raise CapmergeError(
            "CLIP's vocabulary: the package openai-clip is not installed. "
            "Run: pip install openai-clip"
        ) from None
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise CapmergeError(_damaged(path, str(error))) from error
    merges = [tuple(line.split()) for line in lines]
    if len(merges) != _MERGES or any(len(merge) != 2 for merge in merges):
        raise CapmergeError(
            _damaged(path, f"{len(merges):,} lines of merges, expected {_MERGES:,} pairs")
        )
    return _from_merges([(first, second) for first, second in merges])


def _damaged(path: Path, found: str) -> str:
    return f"{path}: {found}. Run: pip install --force-reinstall --no-deps openai-clip"


def _from_merges(merges: list[tuple[str, str]]) -> ClipVocabulary:
    alphabet = list(byte_alphabet().values())
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *map("".join, merges), BOS, EOS]
    ids = {token: index for index, token in enumerate(tokens)}
    return ClipVocabulary(ids, merges, {BOS: ids[BOS], EOS: ids[EOS]}, ids[EOS])


def read_tokenizer_file(path: Path) -> ClipVocabulary | str:
    """The content of a Hugging Face tokenizer folder or of a `tokenizer.json`.

    It is a vocabulary for a CLIP tokenizer, and the JSON text of the `tokenizer.json` for any other
    model. A folder needs `tokenizer.json`, or `vocab.json` and `merges.txt` of a CLIP tokenizer. A
    vocabulary is CLIP's if it marks word ends by `</w>` and holds CLIP's two literals; its added
    tokens and its padding come from the files beside it.

    Raises `UsageError` if the path or the files are missing, or are not what their names say.
    """
    try:
        return _read_tokenizer_file(path)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UsageError(
            f"{path}: the contents are not those of a Hugging Face tokenizer: {error!r}. "
            "Save it again with transformers."
        ) from error


def _read_tokenizer_file(path: Path) -> ClipVocabulary | str:
    if not path.exists():
        raise UsageError(
            f"{path}: no such file or folder. "
            "Expected a Hugging Face tokenizer folder or a tokenizer.json."
        )
    if path.is_dir():
        file = path / "tokenizer.json"
        if not file.is_file():
            return _read_vocab_and_merges(path)
    else:
        file = path

    # Any JSON file may be given, but only a tokenizer.json has a model.
    text, content = _read_json(file)
    if "model" not in content:
        found = ", ".join(list(content)[:4]) or "no keys"
        raise UsageError(
            f"{file}: found {found}; expected a tokenizer.json, which has a key `model`. "
            "Give the path of the tokenizer's folder, or of its tokenizer.json."
        )

    # CLIP's word ends and literals make it a CLIP tokenizer. Any other is returned as it is.
    model = content["model"] if isinstance(content["model"], dict) else {}
    ids = model.get("vocab")
    if (
        model.get("end_of_word_suffix") != "</w>"
        or not isinstance(ids, dict)
        or not {BOS, EOS} <= ids.keys()
    ):
        return text
    merges = [
        tuple(merge.split(" ") if isinstance(merge, str) else merge) for merge in model["merges"]
    ]
    added = {token["content"]: token["id"] for token in content.get("added_tokens", ())}
    return _with_settings(file.parent, ids, merges, added)


def _read_vocab_and_merges(folder: Path) -> ClipVocabulary:
    vocab_file, merges_file = folder / "vocab.json", folder / "merges.txt"
    if not vocab_file.is_file() or not merges_file.is_file():
        raise UsageError(_no_tokenizer(folder))
    _, ids = _read_json(vocab_file)
    if not {BOS, EOS} <= ids.keys():
        raise UsageError(
            f"{vocab_file}: found no {BOS} and {EOS}, so it is not CLIP's. "
            f"Other models need a tokenizer.json.{_convert(folder)}"
        )
    lines = merges_file.read_text(encoding="utf-8").strip().split("\n")[1:]
    merges = [tuple(line.split()) for line in lines[:_MERGES]]
    if any(len(merge) != 2 for merge in merges):
        raise UsageError(
            f"{merges_file}: found a line that is not a pair of tokens; expected a version line, "
            "then two tokens per line, separated by a space. Copy or download the file again."
        )
    return _with_settings(folder, ids, merges, {})


def _with_settings(
    folder: Path, ids: dict[str, int], merges: list[Any], added: dict[str, int]
) -> ClipVocabulary:
    """The vocabulary with the added tokens and the padding that are named in the files of a folder.

    Files that are missing name none.
    """
    added = added | {BOS: ids[BOS], EOS: ids[EOS]}
    settings: dict[str, Any] = {}
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            settings |= _read_json(folder / name)[1]
    if (folder / "added_tokens.json").is_file():
        added |= _read_json(folder / "added_tokens.json")[1]
    added |= {
        token["content"]: int(index)
        for index, token in settings.get("added_tokens_decoder", {}).items()
    }
    pad = settings.get("pad_token") or EOS
    pad = pad["content"] if isinstance(pad, dict) else pad
    added.setdefault(pad, ids[pad])
    return ClipVocabulary(ids, merges, added, added[pad])


def _no_tokenizer(folder: Path) -> str:
    for inner in ("tokenizer", "tokenizer_2", "tokenizer_3"):
        if (folder / inner).is_dir():
            return (
                f"{folder}: found the folder of a model, expected that of a tokenizer. "
                f"Try {folder / inner}."
            )
    names = sorted(entry.name for entry in folder.iterdir())
    found = (", ".join(names[:4]) + (" ..." if len(names) > 4 else "")) or "nothing"
    hint = _convert(folder) if any(name.endswith(".model") for name in names) else ""
    return (
        f"{folder}: found {found}; expected tokenizer.json, "
        f"or CLIP's vocab.json and merges.txt.{hint}"
    )


def _convert(folder: Path) -> str:
    return (
        " Where transformers is installed, write one with: "
        'python -c "from transformers import AutoTokenizer as T; '
        f"T.from_pretrained('{folder}').save_pretrained('{folder}')\""
    )


def _read_json(file: Path) -> tuple[str, dict[str, Any]]:
    import json

    if file.exists() and not file.is_file():  # it may never end, or nobody may write to it
        raise UsageError(
            f"{file}: found a pipe or device, expected the file tokenizer.json of a tokenizer."
        )
    try:
        text = file.read_text(encoding="utf-8")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(
            f"{file}: not JSON: {error}. "
            "Expected a Hugging Face tokenizer folder or its tokenizer.json."
        ) from error
    if not isinstance(content, dict):
        raise UsageError(f"{file}: found a JSON {type(content).__name__}, expected an object.")
    return text, content
