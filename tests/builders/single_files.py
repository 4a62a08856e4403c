"""Tiny single-file models for tests, written by safetensors itself."""

from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from torch import Tensor

from builders.model import make_config
from trainer.families import FamilyName
from trainer.model.build import build_model
from trainer.model.model import Model
from trainer.model.original_layout import list_originals
from trainer.model.shapes import VAE_SHAPES

POSITIONS = torch.arange(77)[None]
SECOND = "conditioner.embedders.1.model."
OTHERS: dict[FamilyName, dict[str, Tensor]] = {
    "sd1": {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": POSITIONS,
        "alphas_cumprod": torch.rand(1000, dtype=torch.float64),
    },
    "sd2": {
        "cond_stage_model.model.logit_scale": torch.tensor(100.0),
        "cond_stage_model.model.text_projection": torch.rand(24, 24),
        "cond_stage_model.model.transformer.resblocks.3.ln_1.weight": torch.rand(24),
    },
    "sdxl": {
        f"{SECOND}logit_scale": torch.tensor(4.5),
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": POSITIONS,
    },
}
"""Tensors that files of a family hold besides, and that nothing here has a use for."""


def random_model(family: FamilyName, seed: int = 3, **sections: dict[str, object]) -> Model:
    """A tiny model whose weights differ from those of any other seed, norms included."""
    model = build_model(make_config(family, **sections))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.02)
    return model


def tiny_vae(channels: int = 4) -> AutoencoderKL:
    """A tiny VAE with random weights, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(11)
        return AutoencoderKL(**(VAE_SHAPES["tiny"] | {"latent_channels": channels}))


def originals_of(model: Model, *, vae: bool = True) -> dict[str, Tensor]:
    """The tensors of a single file with the weights of a model, and those of `tiny_vae`."""
    parts = model.parts() | ({"vae": tiny_vae()} if vae else {})
    held = {
        f"{part}.{name}": value.detach()
        for part, module in parts.items()
        for name, value in module.named_parameters()
    }
    return {
        one.name: one.to_file([held[part] for part in one.parts]).contiguous().clone()
        for one in list_originals(model.family, parts)
    }


def write_single(
    path: Path,
    model: Model,
    dtype: torch.dtype = torch.float32,
    *,
    vae: bool = True,
    others: Mapping[str, Tensor | None] | None = None,
    metadata: dict[str, str] | None = None,
) -> dict[str, Tensor]:
    """Write a single file in `dtype` with `OTHERS` of its family; its tensors.

    `others` are added as they are, or left out where None.
    """
    tensors = {name: value.to(dtype) for name, value in originals_of(model, vae=vae).items()}
    changed = tensors | OTHERS[model.family] | dict(others or {})
    tensors = {name: value for name, value in changed.items() if value is not None}
    save_file(tensors, path, metadata)
    return tensors
