"""Settings and inputs of tiny random models, for the tests of models."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from capmerge.tokens.chunks import Chunker, Chunking
from capmerge.tokens.load import load_clip
from trainer.config.settings import Config
from trainer.families import FAMILIES, FamilyName
from trainer.model.build import build_model
from trainer.model.model import Model

ALL_TRAINED = {"learning_rate": 1e-4, "text_learning_rate": 1e-5, "text2_learning_rate": 2e-5}
SIZES = [[1024.0, 1024.0, 0.0, 0.0, 1024.0, 1024.0], [832.0, 1216.0, 8.0, 16.0, 1216.0, 832.0]]


def make_config(
    family: FamilyName, path: str | Path = "random", **sections: dict[str, Any]
) -> Config:
    """A config of `family`; the values in `sections` are added to it or replace its own."""
    plain: dict[str, Any] = {
        "model": {"family": family, "path": str(path)},
        "train": {"output_dir": "out", "seed": 7},
    }
    for name, values in sections.items():
        plain[name] = plain.get(name, {}) | values
    return Config.model_validate(
        plain | {"data": [{"metadata": "meta.json", "latents": "latents"}]}
    )


def make_ids(
    family: FamilyName, captions: list[str], n_chunks: int, chunking: Chunking = "kohya"
) -> tuple[Tensor, ...]:
    """The ids (B, N, L) for each tokenizer of the family, cut by the real chunker."""
    tokenizers = tuple(load_clip(name) for name in FAMILIES[family].tokenizers)
    chunker = Chunker(tokenizers, chunking, n_chunks)
    rows = [chunker.lay_out(chunker.cut(caption), n_chunks) for caption in captions]
    return tuple(torch.tensor(chunks_BNL) for chunks_BNL in zip(*rows, strict=True))


def predict(
    model: Model,
    n_chunks: int = 2,
    chunking: Chunking = "kohya",
    *,
    batch: slice = slice(None),
    **arguments: Any,
) -> Tensor:
    """The prediction of `model` for two fixed samples, or for a part of them."""
    generator = torch.Generator().manual_seed(5)
    noisy_BCHW = torch.randn(2, 4, 16, 8, generator=generator)
    ids = make_ids(model.family, ["cat, dog, ! , " * 20, "a hat"], n_chunks, chunking)
    size_B6 = torch.tensor(SIZES)[batch] if FAMILIES[model.family].size_conditioning else None
    return model(
        noisy_BCHW[batch],
        torch.tensor([1, 900])[batch],
        tuple(each[batch] for each in ids),
        size_B6,
        **arguments,
    )


def make_model(family: FamilyName, **sections: dict[str, Any]) -> Model:
    """A tiny model of random weights."""
    return build_model(make_config(family, **sections))
