"""The VAE beside a model, which makes pictures of latents. It is never trained."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from capmerge.errors import printable
from capmerge.index.latent_names import PIXELS_PER_LATENT
from trainer.config.model_file import is_model_file, read_header
from trainer.config.settings import RANDOM, Config, family_of
from trainer.errors import ModelError
from trainer.model.original_layout import VAE
from trainer.model.source import Held, find_vae
from trainer.model.tensor_file import ReadTensors

_WITHOUT_SAMPLES = "remove [[samples.prompts]]"


def load_vae(config: Config, *, instead: str = _WITHOUT_SAMPLES) -> Any | None:
    """The VAE of the model or of `model.vae`, float32 on the CPU; None when there is none.

    Raises `ModelError` when it is damaged, or makes no latents of the kind that are trained;
    `instead` says there what else the user can do.
    """
    vae, held = _checked_vae(config, instead)
    if vae is None:
        return None
    with ReadTensors() as tensors:
        for name, shape in [(name, one.shape) for name, one in vae.named_parameters()]:
            value = held[f"{VAE}.{name}"].read(tensors).reshape(shape)
            module, _, kind = name.rpartition(".")
            parameter = nn.Parameter(value.to(torch.float32), requires_grad=False)
            setattr(vae.get_submodule(module), kind, parameter)
    return vae.eval()


def has_vae(config: Config) -> bool:
    """True if there is a VAE to load; raises `ModelError` as `load_vae` does, except for damage."""
    return _checked_vae(config, _WITHOUT_SAMPLES)[0] is not None


def _checked_vae(config: Config, instead: str) -> tuple[Any | None, dict[str, Held]]:
    """The VAE, without memory for its weights, and where its tensors are."""
    path = config.model.path
    file = read_header(Path(path)) if path != RANDOM and is_model_file(path) else None
    shown = printable(config.model.vae or path)
    try:
        vae, held, _ = find_vae(config, file)
    except (OSError, ValueError, TypeError) as error:
        raise ModelError(
            f"{shown}: the VAE cannot be read ({error}). Copy it again, or {instead}."
        ) from error
    if vae is None:
        return None, {}
    settings: Any = vae.config
    found = settings.latent_channels, 2 ** (len(settings.block_out_channels) - 1)
    expected = family_of(config.model).latent_channels, PIXELS_PER_LATENT
    if found != expected:
        raise ModelError(
            f"{shown}: a VAE with {found[0]} latent channels and {found[1]} pixels per latent "
            f"position, expected {expected[0]} and {expected[1]}, as the latents have. "
            f"Take the VAE that made them, or {instead}."
        )
    return vae, held


def decode(vae: Any, latents_1CHW: Tensor, config: Config) -> Tensor:
    """The picture of the latents as (H, W, 3) uint8 on the CPU.

    The latents are scaled as in training. Source: diffusers, AutoencoderKL and VaeImageProcessor.
    """
    family = family_of(config.model)
    cached_1CHW = latents_1CHW.float() / family.latent_scale + family.latent_shift
    (picture_13HW,) = vae.decode(cached_1CHW, return_dict=False)
    shown_HW3: Tensor = ((picture_13HW[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
    return shown_HW3.to("cpu", torch.uint8)
