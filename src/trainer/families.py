"""Everything that tells SD 1, SD 2 and SDXL apart, as data: text encoders, latents, conditioning."""

from dataclasses import dataclass
from typing import Literal, NamedTuple

from capmerge.tokens.families import ClipName

FamilyName = Literal["sd1", "sd2", "sdxl"]

LATENT_CHANNELS = 4
"""Channels of the latents of every family."""
PIXELS_PER_LATENT = 8
"""Pixels along each side of a picture that one latent position covers, in every family."""


class EncoderRule(NamedTuple):
    """One text encoder of a family, and the hidden states that the U-Net takes from it."""

    tokenizer: ClipName
    activation: Literal["quick_gelu", "gelu"]
    """CLIP's own encoder has quick_gelu, OpenCLIP's encoders have gelu, whatever their size."""
    layer: int
    """The layer whose output is taken, counted from the end: 1 is the last layer."""
    final_norm: bool
    """Whether the output goes through the encoder's final norm."""
    pooled: bool
    """Whether the U-Net takes the pooled vector of this encoder."""


@dataclass(frozen=True, slots=True)
class Family:
    """One model family."""

    name: FamilyName
    encoders: tuple[EncoderRule, ...]
    latent_scale: float
    """The factor of cached latents. Source: sd-scripts-facts D1 (fine_tune.py, sdxl_train.py)."""
    latent_suffix: tuple[str, ...]
    """Endings of `<stem>_{w}x{h}` latents; SD 1 full fine-tuning writes `_sdxl` too (facts A4)."""
    size_conditioning: bool
    """Whether the U-Net is told original size, crop and target size."""

    @property
    def tokenizers(self) -> tuple[ClipName, ...]:
        """The tokenizer of each text encoder."""
        return tuple(encoder.tokenizer for encoder in self.encoders)

    @property
    def index_tokens(self) -> Literal["sd1", "sd2"]:
        """The tokenizer whose lengths in the index hold: a second one differs in padding alone."""
        first = self.encoders[0].tokenizer
        assert first != "sdxl_g"  # the index has no column for it
        return first


# Source of the layers: sd-scripts-facts C3, C4. SD 2's encoder is stored with 23 of OpenCLIP's 24
# layers, so the last stored layer is the one meant.
FAMILIES: dict[FamilyName, Family] = {
    "sd1": Family(
        "sd1",
        (EncoderRule("sd1", "quick_gelu", layer=1, final_norm=True, pooled=False),),
        latent_scale=0.18215,
        latent_suffix=("_sd", "_sdxl"),
        size_conditioning=False,
    ),
    "sd2": Family(
        "sd2",
        (EncoderRule("sd2", "gelu", layer=1, final_norm=True, pooled=False),),
        latent_scale=0.18215,
        latent_suffix=("_sd", "_sdxl"),
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
        size_conditioning=True,
    ),
}
