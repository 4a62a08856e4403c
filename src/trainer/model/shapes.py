"""The shapes of the families' U-Nets and text encoders: the real ones, and tiny ones for tests.

Only data, in the arguments of diffusers and transformers. The real shapes have the parameter counts
of the original files: tests/data/original_keys_*.json.
"""

from typing import Any, Literal, NamedTuple

from capmerge.tokens.chunks import BOS_ID, CHUNK_IDS, EOS_ID
from capmerge.tokens.families import CLIP_VARIANTS
from trainer.families import FAMILIES, LATENT_CHANNELS, FamilyName

Size = Literal["tiny", "full"]


class Shape(NamedTuple):
    """The arguments of a UNet2DConditionModel, and of a CLIPTextConfig for each encoder."""

    unet: dict[str, Any]
    encoders: tuple[dict[str, Any], ...]


VOCABULARY = EOS_ID + 1
SIZE_WIDTH = 256
"""Number of sines and cosines for each of the six numbers of SDXL's size conditioning."""


def _encoder(width: int, layers: int, heads: int, projection: int) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "max_position_embeddings": CHUNK_IDS,
        "bos_token_id": BOS_ID,
        "eos_token_id": EOS_ID,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "projection_dim": projection,
    }


def _with_size(pooled_width: int) -> dict[str, Any]:
    return {
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": SIZE_WIDTH,
        "projection_class_embeddings_input_dim": pooled_width + 6 * SIZE_WIDTH,
    }


_SDXL_BLOCKS = {
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
}
# Attention only at the lower of two levels: a training step of two 4x32x24 latents takes 0.1 s on
# one core, 0.25 s with attention at both.
_TINY = {
    "sample_size": 32,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 8,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
}

_SHAPES: dict[tuple[FamilyName, Size], Shape] = {
    ("sd1", "full"): Shape(
        {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
        (_encoder(768, 12, 12, 768),),
    ),
    ("sd2", "full"): Shape(
        {
            "sample_size": 96,
            "cross_attention_dim": 1024,
            "attention_head_dim": (5, 10, 20, 20),
            "use_linear_projection": True,
        },
        (_encoder(1024, 23, 16, 512),),
    ),
    ("sdxl", "full"): Shape(
        {
            "sample_size": 128,
            "block_out_channels": (320, 640, 1280),
            "cross_attention_dim": 2048,
            "attention_head_dim": (5, 10, 20),
            "transformer_layers_per_block": (1, 2, 10),
            "use_linear_projection": True,
            **_SDXL_BLOCKS,
            **_with_size(1280),
        },
        (_encoder(768, 12, 12, 768), _encoder(1280, 32, 20, 1280)),
    ),
    ("sd1", "tiny"): Shape({**_TINY, "cross_attention_dim": 16}, (_encoder(16, 3, 2, 16),)),
    ("sd2", "tiny"): Shape(
        {**_TINY, "cross_attention_dim": 24, "use_linear_projection": True},
        (_encoder(24, 3, 2, 24),),
    ),
    ("sdxl", "tiny"): Shape(
        {
            **_TINY,
            "cross_attention_dim": 16 + 24,
            "transformer_layers_per_block": (1, 2),
            "use_linear_projection": True,
            **_with_size(20),
        },
        (_encoder(16, 3, 2, 16), _encoder(24, 3, 2, 20)),
    ),
}


_VAES: tuple[tuple[Size, tuple[int, ...], int, int], ...] = (
    ("full", (128, 256, 512, 512), 2, 32),
    ("tiny", (8, 16, 16, 16), 1, 8),
)
"""Size, widths of the levels, layers per level and groups of the norms."""
VAE_SHAPES: dict[Size, dict[str, Any]] = {
    size: {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
        "block_out_channels": widths,
        "layers_per_block": layers,
        "latent_channels": 4,
        "norm_num_groups": groups,
        "sample_size": 8 * widths[0],
    }
    for size, widths, layers, groups in _VAES
}
"""The arguments of an AutoencoderKL, the same for all families."""


def first_width(shape: Shape) -> int:
    """The channels of the U-Net's first layer."""
    width: int = shape.unet.get("block_out_channels", (320,))[0]  # the default of diffusers
    return width


def shape_of(family: FamilyName, size: Size, latent_channels: int = LATENT_CHANNELS) -> Shape:
    """The shape of a model of the family, for latents of so many channels."""
    unet, encoders = _SHAPES[family, size]
    return Shape(
        unet | {"in_channels": latent_channels, "out_channels": latent_channels},
        tuple(
            {
                **arguments,
                "hidden_act": rule.activation,
                "pad_token_id": CLIP_VARIANTS[rule.tokenizer].pad,
            }
            for arguments, rule in zip(encoders, FAMILIES[family].encoders, strict=True)
        ),
    )
