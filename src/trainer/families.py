"""The differences between SD 1, SD 2 and SDXL as data: text encoders, latents, conditioning."""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from capmerge.tokens.families import ClipName

FamilyName = Literal["sd1", "sd2", "sdxl"]

LATENT_CHANNELS = 4
"""The number of channels of the latents of each family's own VAE."""
TIMESTEPS = 1000
"""The number of timesteps that every family was trained with; a flow has all numbers up to it."""


def resolution_shift(n_pixels: int) -> float:
    """The shift of a flow by the size of a picture, 1 at 1024 x 1024. Source: model-facts 1.

    >>> resolution_shift(512 * 512)
    0.5
    """
    return math.sqrt(n_pixels / (1 << 20))


class EncoderRule(NamedTuple):
    """One text encoder of a family, and the hidden states that the U-Net takes from it."""

    tokenizer: ClipName
    activation: Literal["quick_gelu", "gelu"]
    """quick_gelu for CLIP's own encoder; gelu for OpenCLIP's encoders of any size."""
    layer: int
    """The layer whose output is taken, counted from the end: 1 is the last layer."""
    final_norm: bool
    """True when the output goes through the encoder's final norm."""
    pooled: bool
    """True when the U-Net takes the pooled vector of this encoder."""


@dataclass(frozen=True, slots=True)
class Family:
    """One model family."""

    name: FamilyName
    encoders: tuple[EncoderRule, ...]
    latent_scale: float
    """The factor that cached latents are multiplied by.

    Source: sd-scripts-facts D1 (fine_tune.py, sdxl_train.py).
    """
    latent_suffix: tuple[str, ...]
    """Endings of `<stem>_{w}x{h}` files; full fine-tuning of SD 1 writes `_sdxl` too (facts A4)."""
    side_px: int
    """The side of the square pictures that the family's own models are made for."""
    size_conditioning: bool
    """True when the U-Net is conditioned on original size, crop and target size."""
    latent_channels: int = LATENT_CHANNELS
    latent_shift: float = 0.0
    """The number that is taken from cached latents before they are multiplied."""

    @property
    def tokenizers(self) -> tuple[ClipName, ...]:
        """The tokenizers of the text encoders, in their order."""
        return tuple(encoder.tokenizer for encoder in self.encoders)

    @property
    def index_tokens(self) -> Literal["sd1", "sd2"]:
        """The tokenizer whose token lengths in the index are valid for this family.

        A second tokenizer differs in its padding alone, so its lengths are the same.
        """
        first = self.encoders[0].tokenizer
        # The index has no column for it.
        assert first != "sdxl_g"
        return first


# Source of the layers: sd-scripts-facts C3, C4. SD 2's encoder is stored with 23 of OpenCLIP's 24
# layers, so its last stored layer is the one that is meant.
FAMILIES: dict[FamilyName, Family] = {
    "sd1": Family(
        "sd1",
        (EncoderRule("sd1", "quick_gelu", layer=1, final_norm=True, pooled=False),),
        latent_scale=0.18215,
        latent_suffix=("_sd", "_sdxl"),
        side_px=512,
        size_conditioning=False,
    ),
    "sd2": Family(
        "sd2",
        (EncoderRule("sd2", "gelu", layer=1, final_norm=True, pooled=False),),
        latent_scale=0.18215,
        latent_suffix=("_sd", "_sdxl"),
        side_px=768,
        size_conditioning=False,
    ),
    "sdxl": Family(
        "sdxl",
        (
            EncoderRule("sd1", "quick_gelu", layer=2, final_norm=False, pooled=False),
            EncoderRule("sdxl_g", "gelu", layer=2, final_norm=False, pooled=True),
        ),
        latent_scale=0.13025,
        latent_suffix=("_sdxl",),
        side_px=1024,
        size_conditioning=True,
    ),
}
