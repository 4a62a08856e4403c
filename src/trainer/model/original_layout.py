"""The tensor names of single-file models, beside the names of the same tensors here.

A single file holds a U-Net, text encoders and a VAE as the programs of the first authors named
them; diffusers and transformers name them differently, and store a few in another form. One table
serves both directions. Pure: it knows neither files nor values.

Source: the key lists of sd-scripts (tests/data/original_keys_*.json), which a test holds it to.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from trainer.families import FamilyName
from trainer.model.model import PARTS

Form = Literal["same", "joined", "transposed", "convolution"]
INNER = "text_model."
"""Prefix of the names of a text encoder's tensors in files; transformers 5 has it no longer."""
VAE = "vae"

_CLIP_END = "transformer."

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
ENCODER_PREFIXES: dict[FamilyName, tuple[str, ...]] = {
    "sd1": (f"cond_stage_model.{_CLIP_END}",),
    "sd2": ("cond_stage_model.model.",),
    "sdxl": (f"conditioner.embedders.0.{_CLIP_END}", "conditioner.embedders.1.model."),
}
"""The prefixes of the text encoders, in the order of the family's encoders."""


class Original(NamedTuple):
    """One tensor of a single file, and the tensors that it is made of here."""

    name: str
    parts: tuple[str, ...]
    """Names here, such as `unet.conv_in.weight`: one, or query, key and value."""
    form: Form
    """What the file holds: the same, the parts joined along the first axis, the transpose, or the
    matrix as a convolution of 1 x 1."""

    def to_file(self, parts: list[Tensor]) -> Tensor:
        """The tensor of the file, of the values here."""
        if self.form == "joined":
            return torch.cat(parts)
        (value,) = parts
        if self.form == "transposed":
            return value.T
        return value[:, :, None, None] if self.form == "convolution" else value

    def from_file(self, value: Tensor) -> list[Tensor]:
        """The values of `parts`, of the tensor in a file; views of it."""
        if self.form == "joined":
            return list(value.chunk(len(self.parts)))
        if self.form == "transposed":
            return [value.T]
        return [value.flatten(1) if self.form == "convolution" else value]


def list_originals(family: FamilyName, parts: Mapping[str, Any]) -> list[Original]:
    """All tensors of a single file that `parts` have a value for.

    `parts` are modules by their names in a diffusers folder: those of `Model.parts()`, and `vae`.
    """
    originals: list[Original] = []
    for part, module in parts.items():
        names = [name for name, _ in module.named_parameters()]
        if part == "unet":
            originals += _in_modules(part, names, _unet_modules(module), UNET_PREFIX)
        elif part == VAE:
            originals += _in_modules(part, names, _vae_modules(module), VAE_PREFIX)
        else:
            prefix = ENCODER_PREFIXES[family][PARTS.index(part) - 1]
            layout = _clip if prefix.endswith(_CLIP_END) else _open_clip
            originals += layout(part, names, prefix)
    return originals


def _in_modules(
    part: str, names: Iterable[str], modules: Mapping[str, str], prefix: str
) -> Iterator[Original]:
    """The tensors of a U-Net or VAE, whose modules have the original names `modules`."""
    for name in names:
        ours = next(ours for ours in _outer(name) if ours in modules)
        inner = name.removeprefix(f"{ours}.")
        theirs = modules[ours]
        if ".resnets." in ours:
            layer, _, kind = inner.rpartition(".")
            inner = f"{(_UNET_RESNET if part == 'unet' else _VAE_RESNET)[layer]}.{kind}"
        form: Form = "same"
        if part == VAE and ".attentions." in ours:
            layer, _, kind = inner.rpartition(".")
            inner = f"{_VAE_ATTENTION[layer]}.{kind}"
            if layer != "group_norm" and kind == "weight":
                form = "convolution"
        yield Original(f"{prefix}{theirs}.{inner}", (f"{part}.{name}",), form)


def _outer(name: str) -> Iterator[str]:
    """The modules that a parameter is in, the innermost first."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


# U-Net.

_UNET_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _unet_modules(unet: Any) -> dict[str, str]:
    """The original names of a UNet2DConditionModel's modules: its blocks are numbered through."""
    modules = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    number = 1
    for level, block in enumerate(unet.down_blocks):
        for layer in range(len(block.resnets)):
            modules[f"down_blocks.{level}.resnets.{layer}"] = f"input_blocks.{number}.0"
            modules[f"down_blocks.{level}.attentions.{layer}"] = f"input_blocks.{number}.1"
            number += 1
        if block.downsamplers:
            modules[f"down_blocks.{level}.downsamplers.0.conv"] = f"input_blocks.{number}.0.op"
            number += 1
    number = 0
    for level, block in enumerate(unet.up_blocks):
        for layer in range(len(block.resnets)):
            modules[f"up_blocks.{level}.resnets.{layer}"] = f"output_blocks.{number}.0"
            modules[f"up_blocks.{level}.attentions.{layer}"] = f"output_blocks.{number}.1"
            number += 1
        if block.upsamplers:
            # In the last of the level's blocks, behind its attention if it has one.
            place = 2 if getattr(block, "attentions", None) else 1
            modules[f"up_blocks.{level}.upsamplers.0.conv"] = (
                f"output_blocks.{number - 1}.{place}.conv"
            )
    return modules


# VAE.

_VAE_RESNET = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
_VAE_ATTENTION = {
    "group_norm": "norm",
    "to_q": "q",
    "to_k": "k",
    "to_v": "v",
    "to_out.0": "proj_out",
}


def _vae_modules(vae: Any) -> dict[str, str]:
    """The original names of an AutoencoderKL's modules: the decoder counts its levels backwards."""
    modules = {"quant_conv": "quant_conv", "post_quant_conv": "post_quant_conv"}
    for side in ("encoder", "decoder"):
        modules |= {
            f"{side}.conv_in": f"{side}.conv_in",
            f"{side}.mid_block.resnets.0": f"{side}.mid.block_1",
            f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1",
            f"{side}.mid_block.resnets.1": f"{side}.mid.block_2",
            f"{side}.conv_norm_out": f"{side}.norm_out",
            f"{side}.conv_out": f"{side}.conv_out",
        }
    levels = len(vae.encoder.down_blocks)
    for level, block in enumerate(vae.encoder.down_blocks):
        ours, theirs = f"encoder.down_blocks.{level}", f"encoder.down.{level}"
        modules[f"{ours}.downsamplers.0.conv"] = f"{theirs}.downsample.conv"
        for layer in range(len(block.resnets)):
            modules[f"{ours}.resnets.{layer}"] = f"{theirs}.block.{layer}"
    for level, block in enumerate(vae.decoder.up_blocks):
        ours, theirs = f"decoder.up_blocks.{level}", f"decoder.up.{levels - 1 - level}"
        modules[f"{ours}.upsamplers.0.conv"] = f"{theirs}.upsample.conv"
        for layer in range(len(block.resnets)):
            modules[f"{ours}.resnets.{layer}"] = f"{theirs}.block.{layer}"
    return modules


# Text encoders.

_OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
_OPEN_CLIP_LAYER = {
    "layer_norm1": "ln_1",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_QUERY, *_KEY_AND_VALUE = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"


def _clip(part: str, names: Iterable[str], prefix: str) -> Iterator[Original]:
    """The tensors of CLIP's own encoder, which files hold as transformers 4 names them."""
    for name in names:
        yield Original(f"{prefix}{INNER}{name.removeprefix(INNER)}", (f"{part}.{name}",), "same")


def _open_clip(part: str, names: Iterable[str], prefix: str) -> Iterator[Original]:
    """The tensors of an encoder of OpenCLIP, which joins query, key and value."""
    for name in names:
        short = name.removeprefix(INNER)
        if short in _OPEN_CLIP:
            yield Original(prefix + _OPEN_CLIP[short], (f"{part}.{name}",), "same")
        elif short == "text_projection.weight":
            yield Original(f"{prefix}text_projection", (f"{part}.{name}",), "transposed")
        else:
            number, _, inner = short.removeprefix("encoder.layers.").partition(".")
            layer, _, kind = inner.rpartition(".")
            block = f"{prefix}transformer.resblocks.{number}."
            if layer == _QUERY:
                joined = (name, *(name.replace(_QUERY, other) for other in _KEY_AND_VALUE))
                yield Original(
                    f"{block}attn.in_proj_{kind}",
                    tuple(f"{part}.{one}" for one in joined),
                    "joined",
                )
            elif layer not in _KEY_AND_VALUE:
                yield Original(
                    f"{block}{_OPEN_CLIP_LAYER[layer]}.{kind}", (f"{part}.{name}",), "same"
                )
