"""What tells the model families apart, as data: tokenizers, latents, text states, size conditioning."""

from dataclasses import dataclass
from typing import Literal

FamilyName = Literal["sd1", "sd2", "sdxl"]


@dataclass(frozen=True, slots=True)
class Family:
    """One model family."""

    name: FamilyName
    tokenizers: tuple[str, ...]
    """One for each text encoder, as `capmerge.tokens.FAMILIES` names them."""
    index_tokens: Literal["sd1", "sd2"]
    """Whose token lengths in the index are this family's: SDXL's second encoder differs from the first in padding alone."""
    latent_scale: float
    """What cached latents are multiplied by. Source: sd-scripts-facts D1 (fine_tune.py, sdxl_train.py)."""
    latent_suffix: tuple[str, ...]
    """Endings of `<stem>_{w}x{h}` latents of this family; SD1 full fine-tuning writes `_sdxl` too (facts A4)."""
    size_conditioning: bool
    """Whether the U-Net is told original size, crop and target size."""


FAMILIES: dict[FamilyName, Family] = {
    "sd1": Family("sd1", ("sd1",), "sd1", 0.18215, ("_sd", "_sdxl"), size_conditioning=False),
    "sd2": Family("sd2", ("sd2",), "sd2", 0.18215, ("_sd", "_sdxl"), size_conditioning=False),
    "sdxl": Family("sdxl", ("sd1", "sdxl_g"), "sd1", 0.13025, ("_sdxl",), size_conditioning=True),
}
