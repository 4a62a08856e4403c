"""What the files of a model tell a config that does not name it itself: family, marks, latents.

Reads headers and small JSON files alone, so that a config is checked in milliseconds.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeGuard

from capmerge.errors import printable
from capmerge.toml import to_toml
from trainer.config.model_file import (
    V_MARK,
    ZERO_TERMINAL_MARK,
    Described,
    ModelFile,
    describe,
    is_model_file,
    read_header,
)
from trainer.config.settings import RANDOM, checked_path
from trainer.errors import ModelError
from trainer.families import FAMILIES, LATENT_CHANNELS

VAE_FOLDER = "vae"
_CONFIG = "config.json"
_LATENT_KEYS = {
    "latent_channels": "latent_channels",
    "latent_scale": "scaling_factor",
    "latent_shift": "shift_factor",
}
"""The settings of `[model]` that a VAE's config tells, and their names there."""
_VAE_INPUTS = ("first_stage_model.decoder.conv_in.weight", "decoder.conv_in.weight")
"""The layer of a VAE that takes the latents, in a whole model and in a file of its own."""


def ask_model(document: dict[str, Any]) -> list[str]:
    """Fill in what the model tells and `document` does not name; the contradictions as messages.

    Raises `ModelError` for a file that is not a base model to train.
    """
    model = document.get("model")
    path = model.get("path") if isinstance(model, dict) else None
    if not _is_path(path):
        return []
    assert isinstance(model, dict)
    told = None
    problems: list[str] = []
    if path != RANDOM and is_model_file(path):
        file = Path(path)
        if not file.exists() and "family" in model:
            return []  # the model itself is built later, and then missed
        told = describe(read_header(file))
        problems += _contradictions(document, model, told, printable(path))
    problems += _ask_latents(model, path, told)
    return problems


def _contradictions(
    document: dict[str, Any], model: dict[str, Any], told: Described, shown: str
) -> Iterator[str]:
    """Fill in family and prediction; where the document names others, a message for each."""
    family = model.setdefault("family", told.family)
    if family != told.family and family in list(FAMILIES):
        yield (
            f"model.family: found {family}, but {shown} is a model of {told.family} by its tensor "
            f"{told.family_key}. Leave model.family out, or set another model.path."
        )
    if model.get("variant"):
        yield (
            f"model.variant: {shown} is a single file, expected a folder, whose files may have "
            "variants. Leave model.variant out."
        )
    noise = document.setdefault("noise", {})
    if not isinstance(noise, dict):
        return
    marked: list[tuple[str, Any, str]] = [("prediction", "v", V_MARK)] if told.is_v else []
    if told.is_zero_terminal:
        marked.append(("zero_terminal_snr", True, ZERO_TERMINAL_MARK))
    for key, value, mark in marked:
        found = noise.setdefault(key, value)
        if found != value:
            yield (
                f"noise.{key}: found {to_toml(found)}, but {shown} has the mark {mark}, which "
                f"means {to_toml(value)}. Leave noise.{key} out. To train the model to something "
                "else, remove the mark from a copy of the file first."
            )


def _ask_latents(model: dict[str, Any], path: str, told: Described | None) -> Iterator[str]:
    """Fill in channels, scale and shift of the latents; a message where they do not fit."""
    vae, named = model.get("vae"), "model.vae"
    config, file = None, None
    if _is_path(vae):
        if is_model_file(vae):
            file = read_header(Path(vae))
        else:
            config = _vae_config(Path(vae) / _CONFIG, is_needed=True)
    elif told is None and path != RANDOM:
        config, named = _vae_config(Path(path) / VAE_FOLDER / _CONFIG), f"the VAE of {path}"
    found: dict[str, Any] = {
        key: config[name]
        for key, name in _LATENT_KEYS.items()
        if config and config.get(name) is not None
    }
    if file:
        found["latent_channels"] = _channels(file)
    if told:
        channels = model.get("latent_channels", told.latent_channels)
        if channels != told.latent_channels and isinstance(channels, int):
            yield (
                f"model.latent_channels: found {channels}, but the U-Net of {printable(path)} "
                f"takes {told.latent_channels}. Leave model.latent_channels out."
            )
        inside = found.setdefault("latent_channels", told.latent_channels)
        if inside != told.latent_channels:
            yield (
                f"model.vae: {printable(str(vae))} has latents of {inside} channels, but the U-Net "
                f"of {printable(path)} takes {told.latent_channels}. Set another model.vae."
            )
    for key, value in found.items():
        if not _is_number(value):
            yield (
                f"{printable(named)}: {_LATENT_KEYS[key]} is {printable(json.dumps(value))}, "
                f"expected a number. Set model.{key}."
            )
        else:
            model.setdefault(key, value)
    channels = model.get("latent_channels", LATENT_CHANNELS)
    if channels != LATENT_CHANNELS and "latent_scale" not in model:
        yield (
            f"model.latent_scale: not set, and no config of a VAE tells it for latents of "
            f"{channels} channels. Set model.latent_scale, and model.latent_shift if there is one."
        )
    family = model.get("family")
    if path != RANDOM and family in list(FAMILIES):
        # So the config that is shown and stored has the numbers that are used.
        model.setdefault("latent_scale", FAMILIES[family].latent_scale)
        model.setdefault("latent_shift", FAMILIES[family].latent_shift)


def _is_path(value: Any) -> TypeGuard[str]:
    """True for a text that a system call takes; `settings` says what is wrong with another one."""
    try:
        return isinstance(value, str) and bool(checked_path(value))
    except ValueError:
        return False


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _vae_config(path: Path, *, is_needed: bool = False) -> dict[str, Any] | None:
    """A VAE's `config.json`; None if there is none and none is needed."""
    shown = printable(str(path))
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        if not is_needed:
            return None
        raise ModelError(
            f"{shown}: no such file. Expected the folder of a VAE, or a VAE as a .safetensors "
            "file. Set model.vae."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{shown}: cannot be read as JSON ({error}). Copy the file again."
        ) from error
    if not isinstance(config, dict):
        raise ModelError(
            f"{shown}: found a JSON {type(config).__name__}, expected an object. "
            "Copy the file again."
        )
    if config.get("latents_mean") is not None:
        raise ModelError(
            f"{shown}: found latents_mean, a shift for each channel, expected one shift_factor for "
            "all of them. Models with this VAE cannot be trained here."
        )
    return config


def _channels(file: ModelFile) -> int:
    """The channels of the latents of a VAE in a file of its own, or of that in a whole model."""
    for name in _VAE_INPUTS:
        if name in file.tensors and len(file.tensors[name].shape) == 4:
            return file.tensors[name].shape[1]
    raise ModelError(
        f"{printable(str(file.path))}: found no {_VAE_INPUTS[1]}, expected a VAE. Set model.vae."
    )
