"""The modules of a model, untrained: a U-Net of diffusers, and text encoders of transformers."""

from typing import Any

from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trainer.families import FamilyName
from trainer.model.shapes import Shape
from trainer.model.text_encoders import encoder_rules


def new_parts(family: FamilyName, shape: Shape) -> tuple[nn.Module, list[nn.Module]]:
    """The U-Net and the text encoders of `shape`, with random weights from torch's own state."""
    unet: Any = UNet2DConditionModel(**shape.unet)  # type: ignore[no-untyped-call]
    encoders: list[nn.Module] = [
        (CLIPTextModelWithProjection if rule.pooled else CLIPTextModel)(CLIPTextConfig(**arguments))
        for rule, arguments in zip(encoder_rules(family), shape.encoders, strict=True)
    ]
    return unet, encoders
