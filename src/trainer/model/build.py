"""The model of a run, built from its settings with random weights or those of a diffusers folder.

Parts are frozen, cast to bf16 and set to gradient checkpointing as the settings say.
"""

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from capmerge.files.source import FileSource, fingerprint_text
from trainer.config.settings import Config
from trainer.model.load import check_is_folder, load_parts
from trainer.model.model import Model
from trainer.model.shapes import RANDOM, Shape, shape_of
from trainer.model.text_encoders import encoder_rules
from trainer.model.trainable import freeze_parts


def build_model(config: Config, *, weights: bool = True) -> Model:
    """The model of a run, on the CPU and in training mode.

    Without `weights` it has shapes alone, for counting. Random weights depend on `train.seed` alone
    and leave torch's own random state as it was.

    Raises `ModelError` for a folder that does not fit, `ConfigError` for settings that leave
    nothing to train.
    """
    settings = config.model
    if settings.path == RANDOM:
        assert config.train.seed is not None, "the seed is drawn before a model is built"
        with torch.random.fork_rng(devices=[]), nullcontext() if weights else init_empty_weights():
            torch.default_generator.manual_seed(config.train.seed)
            unet, encoders = _random_parts(config, shape_of(settings.family, settings.size))
    else:
        unet, encoders = load_parts(
            Path(settings.path), settings.family, config.noise, weights=weights
        )
    model = Model(unet, encoders, settings.family, config.text)
    if config.train.precision == "full_bf16":
        model.to(torch.bfloat16)
    freeze_parts(model, config)
    if settings.gradient_checkpointing:
        _recompute_activations(model)
    return model


def model_fingerprint(config: Config) -> str:
    """A fingerprint of the model that a run begins with, the same wherever its folder is.

    Of each file of the U-Net and the text encoders it holds the name, the size, and the hash of 64
    evenly spaced blocks. Raises `ModelError` when there is no folder.
    """
    if config.model.path == RANDOM:
        return RANDOM
    folder = Path(config.model.path)
    check_is_folder(folder)
    hashed = hashlib.blake2b(digest_size=16)
    for path in sorted([*folder.glob("unet/*"), *folder.glob("text_encoder*/*")]):
        if path.is_file():
            source = FileSource(path)
            name = path.relative_to(folder).as_posix()
            hashed.update(f"{name} {fingerprint_text(source)}\n".encode())
            source.close()
    return hashed.hexdigest()


def _random_parts(config: Config, shape: Shape) -> tuple[nn.Module, list[nn.Module]]:
    unet: Any = UNet2DConditionModel(**shape.unet)  # type: ignore[no-untyped-call]
    encoders: list[nn.Module] = [
        (CLIPTextModelWithProjection if rule.pooled else CLIPTextModel)(CLIPTextConfig(**arguments))
        for rule, arguments in zip(encoder_rules(config.model.family), shape.encoders, strict=True)
    ]
    return unet, encoders


def _recompute_activations(model: Model) -> None:
    """Turn on gradient checkpointing for the U-Net and for the encoders that are trained.

    Gradients pass through the U-Net even when it is frozen.
    """
    unet: Any = model.unet
    unet.enable_gradient_checkpointing()
    for _, encoder in model.text_encoders():
        if encoder.training:
            part: Any = encoder
            # transformers 5 renamed the method.
            enable = getattr(part, "activation_checkpointing_enable", None)
            (enable or part.gradient_checkpointing_enable)({"use_reentrant": False})
