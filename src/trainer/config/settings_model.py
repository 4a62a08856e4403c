"""`[model]`: which model a run trains, and the family that it belongs to."""

from dataclasses import replace
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainer.config.section import Section, checked_path
from trainer.families import FAMILIES, Family, FamilyName

RANDOM = "random"
"""The `model.path` that means untrained weights."""


class ModelSettings(Section):
    """`[model]`: the model to train."""

    family: FamilyName
    """sd1, sd2 or sdxl. A single file tells it itself."""
    path: Annotated[str, AfterValidator(checked_path)] = Field(min_length=1)
    """A single-file .safetensors, a diffusers folder, or "random" for untrained weights.

    A folder of that name is "./random".
    """
    variant: str = ""
    """With a folder: the variant of its files to read, such as fp16. Empty: the usual files.

    Where there are no usual files, those of the variant fp16 are read.
    """
    vae: Annotated[str, AfterValidator(checked_path)] = ""
    """A VAE to write beside the trained model, as a folder or a file. Empty: that of `path`."""
    latent_channels: int | None = Field(default=None, ge=1, le=256)
    """Channels of the latents. Not set: those of the VAE, else 4."""
    latent_scale: float | None = Field(default=None, gt=0)
    """Factor of the cached latents. Not set: that of the VAE's config, else of the family."""
    latent_shift: float | None = None
    """Number to subtract from them before. Not set: that of the VAE's config, else 0."""
    size: Literal["tiny", "full"] = "tiny"
    """With `path = "random"`: a model of a few hundred kB, or one of the family's real shape."""
    train_only: tuple[str, ...] = Field(default=(), strict=False)
    """Patterns (`fnmatch`) of the only U-Net parameters to train. Empty: all of them."""
    freeze: tuple[str, ...] = Field(default=(), strict=False)
    """Patterns (`fnmatch`) of U-Net parameters not to train, even if `train_only` names them."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a quarter slower."""


def family_of(model: ModelSettings) -> Family:
    """The family of a model, with the latents of its own VAE where they are set."""
    given = {
        "latent_channels": model.latent_channels,
        "latent_scale": model.latent_scale,
        "latent_shift": model.latent_shift,
    }
    return replace(
        FAMILIES[model.family],
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
