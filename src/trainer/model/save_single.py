"""A trained model, saved as a single file with the names and marks that other programs know.

Owns what is written: which tensors, under which names and in which types, and what the metadata
say. Source: model-facts 2; modelspec 1.0 (Stability-AI/ModelSpec) for the metadata.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from trainer.config.model_file import MARKS, V_MARK, ZERO_TERMINAL_MARK
from trainer.config.settings import Config, ExportSettings
from trainer.families import FamilyName
from trainer.model.flow_sampling import sampling_note, sampling_shift
from trainer.model.model import Model
from trainer.model.original_layout import (
    ENCODER_PREFIXES,
    INNER,
    VAE,
    VAE_PREFIX,
    Original,
    list_originals,
)
from trainer.model.sd2_guess import guess_line, guessed_by
from trainer.model.source import check_same_source
from trainer.model.tensor_file import (
    DTYPES,
    HASH_KEY,
    NewTensor,
    ReadTensors,
    new_tensor,
    write_tensors,
)
from trainer.model.weights import TYPES, Weights

_TITLES: dict[FamilyName, str] = {"sd1": "SD 1.x", "sd2": "SD 2.x", "sdxl": "SDXL"}
_SECOND_LAYERS = 23
"""Layers of SD 2's encoder here; OpenCLIP has one more, which files hold and nobody reads."""
_LOGIT_SCALE = 4.6052
"""The logarithm of 100, at which OpenCLIP's training holds this number; nobody reads it."""


def save_single_file(
    model: Model,
    state: Mapping[str, Tensor],
    path: Path,
    config: Config,
    *,
    step: int,
    fingerprint: str | None = None,
) -> list[str]:
    """Save the model as the file `path`, whole or not at all, and return notes for the user.

    `state` holds the values of `model.state_dict()` by name; one is asked for at a time. A source
    that is a single file gives the names, and all that is not trained is copied from it. Raises
    `OutputError` when the file cannot be written, and `ModelError` when the source is gone or has
    another `fingerprint` than that one, or a value does not fit into `export.dtype`.
    """
    check_same_source(config, fingerprint)
    notes: list[str] = []
    with ReadTensors() as reader:
        weights = Weights(model, state, config, reader, vae=True)
        written = (
            _like_source(weights, config, notes)
            if weights.source.file
            else _new_names(model, weights, config.model.family, notes)
        )
        marks = wanted_marks(config)
        tensors = [one for one in written if one.name not in MARKS or one.name in marks]
        present = {one.name for one in tensors}
        tensors += [_empty(mark) for mark in marks if mark not in present]
        notes += _notes_on_prediction(model, weights, config)
        write_tensors(path, tensors, metadata_of(config, step), reader)
    return notes


def wanted_marks(config: Config) -> tuple[str, ...]:
    """The marks that a file of this training has."""
    if config.noise.prediction != "v":
        return ()
    return MARKS if config.noise.zero_terminal_snr else (V_MARK,)


def _empty(name: str) -> NewTensor:
    return NewTensor(name, "F32", (0,), 0, lambda: ())


# The names of a source.


def _like_source(weights: Weights, config: Config, notes: list[str]) -> Iterator[NewTensor]:
    """The tensors of the single file that is the source, in its order and with its names."""
    source = weights.source
    assert source.file is not None
    replaced = VAE_PREFIX if config.model.vae else None
    renamed = 0
    for name, stored in source.file.tensors.items():
        if replaced and name.startswith(replaced):
            continue
        new_name = _with_inner(name, config.model.family)
        if new_name in source.file.tensors:
            new_name = name
        renamed += new_name != name
        original = source.found.get(name)
        dtype = _dtype_of(config.export, stored.dtype)
        is_trained = original and not weights.trained.isdisjoint(original.parts)
        if original and (is_trained or dtype != stored.dtype):
            yield new_tensor(
                new_name, dtype, stored.shape, _value_of(weights, original, stored.shape)
            )
        else:
            size = stored.end - stored.start
            yield NewTensor(
                new_name, stored.dtype, stored.shape, size, partial(weights.parts_of_file, name)
            )
    if replaced and source.vae:
        yield from _named_here(weights, list_originals(config.model.family, {VAE: source.vae}))
    if renamed:
        notes.append(
            f"{renamed:,} tensors of the text encoder are named with {INNER} as other programs "
            "expect it; the source has their names without it"
        )
    if not replaced and not any(name.startswith(VAE_PREFIX) for name in source.file.tensors):
        notes.append(_NO_VAE)


def _dtype_of(export: ExportSettings, stored: str) -> str:
    return stored if export.dtype == "source" else TYPES[export.dtype]


def _with_inner(name: str, family: FamilyName) -> str:
    """The name of a tensor with `text_model.`, which CLIP's own encoder has in every file."""
    prefix = ENCODER_PREFIXES[family][0]
    rest = name.removeprefix(prefix)
    if rest == name or not prefix.endswith("transformer.") or rest.startswith(INNER):
        return name
    return f"{prefix}{INNER}{rest}"


def _value_of(weights: Weights, original: Original, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    return lambda: original.to_file([weights.value(part) for part in original.parts]).reshape(shape)


# The names of sd-scripts.

_NO_VAE = (
    "it has no VAE: ComfyUI needs one from a Load VAE node, WebUI and Forge one that is chosen in "
    "their settings, and diffusers' from_single_file refuses it; model.vae adds one"
)


def _new_names(
    model: Model, weights: Weights, family: FamilyName, notes: list[str]
) -> Iterator[NewTensor]:
    """The tensors of a file with the names that sd-scripts gives them."""
    parts = model.parts()
    if weights.source.vae:
        parts[VAE] = weights.source.vae
    else:
        notes.append(_NO_VAE)
    originals = list_originals(family, parts)
    yield from _named_here(weights, originals)
    yield from _unread(weights, originals, family)


def _named_here(weights: Weights, originals: list[Original]) -> Iterator[NewTensor]:
    """The tensors of originals, each in the type of its first part."""
    for original in originals:
        empty = [torch.empty(weights.shapes[part], device="meta") for part in original.parts]
        shape = tuple(original.to_file(empty).shape)
        yield new_tensor(
            original.name,
            weights.dtype(original.parts[0]),
            shape,
            _value_of(weights, original, shape),
        )


def _unread(weights: Weights, originals: list[Original], family: FamilyName) -> Iterator[NewTensor]:
    """Tensors of OpenCLIP that nobody reads, without which some programs do not load a file.

    sd-scripts makes them up too: SD 2's last layer as a copy of the one before it.
    """
    if family == "sd1":
        return
    prefix = ENCODER_PREFIXES[family][-1]
    named = {original.name: original for original in originals}
    end = named[f"{prefix}ln_final.weight"].parts[0]
    dtype, (width,) = weights.dtype(end), weights.shapes[end]
    yield new_tensor(f"{prefix}logit_scale", dtype, (), lambda: torch.tensor(_LOGIT_SCALE))
    if family == "sdxl":
        return
    yield new_tensor(f"{prefix}text_projection", dtype, (width, width), lambda: torch.eye(width))
    last = f"{prefix}transformer.resblocks.{_SECOND_LAYERS - 1}."
    copied = [original for name, original in named.items() if name.startswith(last)]
    for one in _named_here(weights, copied):
        number = f"resblocks.{_SECOND_LAYERS}."
        yield one._replace(name=one.name.replace(f"resblocks.{_SECOND_LAYERS - 1}.", number))


# What the file says about itself.


def metadata_of(config: Config, step: int) -> dict[str, str]:
    """The metadata of a single file; nothing in it comes from the data or from a path."""
    family, noise = config.model.family, config.noise
    is_v, is_flow = noise.prediction == "v", noise.prediction == "flow"
    title = config.export.title or f"{_TITLES[family]}, trained for {step:,} steps"
    architecture, side = {
        "sd1": ("stable-diffusion-v1", 512),
        "sd2": ("stable-diffusion-v2-768-v", 768) if is_v else ("stable-diffusion-v2-512", 512),
        "sdxl": ("stable-diffusion-xl-v1-base", 1024),
    }[family]
    of_flow = {
        "modelspec.noise_process": "flow",
        "modelspec.sampling_shift": f"{sampling_shift(noise, family):.4g}",
    }
    return {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": title,
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime()),
        "modelspec.resolution": f"{side}x{side}",
        "modelspec.prediction_type": "velocity" if is_flow else noise.prediction,
        **(of_flow if is_flow else {}),
        HASH_KEY: "",
    }


def _notes_on_prediction(model: Model, weights: Weights, config: Config) -> Iterator[str]:
    """What other programs take the file for, by its marks or by a guess."""
    if note := sampling_note(config.noise, config.model.family):
        yield note
    marks = wanted_marks(config)
    if marks:
        schedule = " with a zero-terminal schedule" if ZERO_TERMINAL_MARK in marks else ""
        yield f"other programs take it for v-prediction{schedule} by its {' and '.join(marks)}"
    if name := guessed_by(model):
        dtype = DTYPES[weights.dtype(name)]
        yield guess_line(weights.value(name).to(dtype), config, "the file")
