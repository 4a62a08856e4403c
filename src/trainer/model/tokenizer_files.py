"""The tokenizer of a text encoder, written as files that `transformers.CLIPTokenizer` reads."""

import json
from pathlib import Path

from capmerge.tokens.chunks import CHUNK_IDS
from capmerge.tokens.families import CLIP_VARIANTS, ClipName
from capmerge.tokens.vocabulary import BOS, EOS, read_clip_vocabulary


def write_tokenizer(folder: Path, tokenizer: ClipName) -> None:
    """Make `folder` with vocab.json, merges.txt and the two small files of a CLIP tokenizer."""
    vocabulary = read_clip_vocabulary()
    pad_id = CLIP_VARIANTS[tokenizer].pad
    padding = next(token for token, index in vocabulary.ids.items() if index == pad_id)
    special = {
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": padding.removesuffix("</w>"),
        "unk_token": EOS,
    }
    settings = {
        **special,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": CHUNK_IDS,
        "tokenizer_class": "CLIPTokenizer",
    }
    folder.mkdir()
    _write_json(folder / "vocab.json", vocabulary.ids)
    merges = [f"{first} {second}\n" for first, second in vocabulary.merges]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(merges), encoding="utf-8")
    _write_json(folder / "tokenizer_config.json", settings)
    _write_json(folder / "special_tokens_map.json", special)


def _write_json(path: Path, content: dict[str, object] | dict[str, int] | dict[str, str]) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
