"""A model from settings: random weights, or those of a diffusers folder.

Knows nothing of data, noise or the run.
"""

import torch
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from trainer.model import Model
from trainer.settings import Config
from trainer.shapes import Shape, shape_of
from trainer.text import encoder_rules


def build_model(config: Config, seed: int) -> Model:
    """The model of a run in training mode on the CPU."""
    unet, encoders = _random_parts(config, shape_of(config.model.family, config.model.size), seed)
    return Model(unet, encoders, config.model.family, config.text).train()


def _random_parts(config: Config, shape: Shape, seed: int) -> tuple[nn.Module, list[nn.Module]]:
    """Untrained parts: a function of `seed` alone, which leaves torch's own random state as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        unet = UNet2DConditionModel(**shape.unet)
        encoders = [
            (CLIPTextModelWithProjection if rule.pooled else CLIPTextModel)(CLIPTextConfig(**arguments))
            for rule, arguments in zip(encoder_rules(config.model.family), shape.encoders, strict=True)
        ]
    return unet, encoders
