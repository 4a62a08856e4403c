"""The VAE beside a model, which makes pictures of latents. It is never trained."""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import Tensor

from capmerge.index.latent_names import PIXELS_PER_LATENT
from trainer.config.settings import Config
from trainer.errors import ModelError
from trainer.families import FAMILIES, LATENT_CHANNELS
from trainer.model.shapes import RANDOM

_FOLDER = "vae"


def load_vae(config: Config) -> Any | None:
    """The VAE in the folder of the model, float32 on the CPU; None when there is none.

    Raises `ModelError` when it is damaged, or makes no latents of the kind that are trained.
    """
    if config.model.path == RANDOM:
        return None
    folder = Path(config.model.path) / _FOLDER
    if not (folder / "config.json").exists():
        return None
    try:
        vae: Any = AutoencoderKL.from_pretrained(  # type: ignore[no-untyped-call]
            folder, use_safetensors=True, local_files_only=True, torch_dtype=torch.float32
        )
    except (OSError, ValueError, TypeError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{folder}: the VAE cannot be read ({error}). Copy the folder again, or remove "
            "[[samples.prompts]]."
        ) from error
    found = vae.config.latent_channels, 2 ** (len(vae.config.block_out_channels) - 1)
    if found != (LATENT_CHANNELS, PIXELS_PER_LATENT):
        raise ModelError(
            f"{folder}: a VAE with {found[0]} latent channels and {found[1]} pixels per latent "
            f"position, expected {LATENT_CHANNELS} and {PIXELS_PER_LATENT}, as the latents have. "
            "Take the VAE that made them, or remove [[samples.prompts]]."
        )
    return vae.eval().requires_grad_(False)


def decode(vae: Any, latents_1CHW: Tensor, config: Config) -> Tensor:
    """The picture of the latents as (H, W, 3) uint8 on the CPU.

    The latents are scaled as in training. Source: diffusers, AutoencoderKL and VaeImageProcessor.
    """
    scale = FAMILIES[config.model.family].latent_scale
    (picture_13HW,) = vae.decode(latents_1CHW.float() / scale, return_dict=False)
    shown_HW3: Tensor = ((picture_13HW[0] / 2 + 0.5).clamp(0, 1) * 255).round().permute(1, 2, 0)
    return shown_HW3.to("cpu", torch.uint8)
