"""The model of a run, with random weights or those of a single file or a diffusers folder.

Parts are frozen, cast to bf16 and set to gradient checkpointing as the settings say.
"""

import hashlib
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights

from capmerge.files.source import FileSource, fingerprint_text
from trainer.config.model_file import is_model_file
from trainer.config.settings import RANDOM, Config, family_of
from trainer.model.load import check_is_folder, load_parts
from trainer.model.model import Model
from trainer.model.parts import new_parts
from trainer.model.shapes import shape_of
from trainer.model.single_file import load_single_file
from trainer.model.tensor_file import open_model_file
from trainer.model.trainable import freeze_parts


def build_model(config: Config, *, weights: bool = True) -> Model:
    """The model of a run, on the CPU and in training mode.

    Without `weights` it has shapes alone, for counting. Random weights depend on `train.seed` alone
    and leave torch's own random state as it was.

    Raises `ModelError` for a source that does not fit, and `ConfigError` for settings that leave
    nothing to train.
    """
    settings = config.model
    dtype = torch.bfloat16 if config.train.precision == "full_bf16" else torch.float32
    if settings.path == RANDOM:
        assert config.train.seed is not None, "the seed is drawn before a model is built"
        with torch.random.fork_rng(devices=[]), nullcontext() if weights else init_empty_weights():
            torch.default_generator.manual_seed(config.train.seed)
            channels = family_of(settings).latent_channels
            shape = shape_of(settings.family, settings.size, channels)
            unet, encoders = new_parts(settings.family, shape)
    elif is_model_file(settings.path):
        unet, encoders = load_single_file(
            Path(settings.path), settings.family, dtype, weights=weights
        )
    else:
        unet, encoders = load_parts(config, dtype, weights=weights)
    model = Model(unet, encoders, settings.family, config.text).to(dtype)
    freeze_parts(model, config)
    if settings.gradient_checkpointing:
        _recompute_activations(model)
    return model


def model_fingerprint(config: Config) -> str:
    """A fingerprint of the model that a run begins with, the same wherever its folder is.

    That of a single file is a hash of all its bytes, which takes about a second per GB. That of a
    folder holds, for each file of the U-Net and the text encoders, the name, the size, and the hash
    of 64 evenly spaced blocks. Raises `ModelError` when there is none.
    """
    if config.model.path == RANDOM:
        return RANDOM
    folder = Path(config.model.path)
    if is_model_file(config.model.path):
        with open_model_file(folder) as raw:
            return hashlib.file_digest(raw, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    check_is_folder(folder)
    files = sorted([*folder.glob("unet/*"), *folder.glob("text_encoder*/*")])
    hashed = hashlib.blake2b(digest_size=16)
    for path in files:
        if path.is_file():
            source = FileSource(path)
            name = path.relative_to(folder).as_posix()
            hashed.update(f"{name} {fingerprint_text(source)}\n".encode())
            source.close()
    return hashed.hexdigest()


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
