"""U-Net and text encoders read from a single-file model, tensor by tensor.

Owns what differs between files of one family: names without `text_model.`, matrices stored as
convolutions, and tensors that nothing here needs, which are left alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn

from capmerge.errors import printable
from trainer.config.model_file import UNET_START, ModelFile, describe, read_header
from trainer.errors import ModelError
from trainer.families import FamilyName
from trainer.model.original_layout import INNER, UNET_PREFIX, Original, list_originals
from trainer.model.parts import new_parts
from trainer.model.shapes import Shape, Size, first_width, shape_of
from trainer.model.tensor_file import ReadTensors, without_ones


def load_single_file(
    path: Path, family: FamilyName, dtype: torch.dtype, *, weights: bool = True
) -> tuple[nn.Module, list[nn.Module]]:
    """The U-Net and the text encoders in `path`, in `dtype` on the CPU.

    Without `weights` they have shapes alone. Raises `ModelError` for a file that is not a whole
    base model of `family`. Memory is that of the weights and of one tensor more.
    """
    file = read_header(path)
    described = describe(file)
    shown = printable(str(path))
    if described.family != family:
        raise ModelError(
            f"{shown}: a model of family {described.family} by its tensor {described.family_key}, "
            f"expected {family}. Set model.family or model.path."
        )
    with init_empty_weights():
        unet, encoders = new_parts(family, _shape_of(file, family, described.latent_channels))
    names = ("text_encoder", "text_encoder_2")[: len(encoders)]
    parts: dict[str, Any] = {"unet": unet, **dict(zip(names, encoders, strict=True))}
    found = match_names(file, family, parts)
    if weights:
        _fill(file, parts, found, dtype)
    return unet, encoders


def match_names(
    file: ModelFile, family: FamilyName, parts: Mapping[str, Any]
) -> dict[str, Original]:
    """The tensors of `file` that hold the values of `parts`, by their names in the file.

    Raises `ModelError` when one is missing, has another shape, or when the U-Net has more of them.
    """
    shapes = {
        f"{part}.{name}": value
        for part, module in parts.items()
        for name, value in module.named_parameters()
    }
    found: dict[str, Original] = {}
    problems = []
    for wanted in list_originals(family, parts):
        original = _as_stored(file, wanted)
        if original is None:
            problems.append(f"{wanted.name} is missing")
            continue
        shape = tuple(original.to_file([shapes[part] for part in original.parts]).shape)
        stored = file.tensors[original.name].shape
        if without_ones(stored) != without_ones(shape):
            problems.append(f"{original.name} has the shape {stored}, expected {shape}")
        found[original.name] = original
    problems += [
        f"{printable(name)} is unknown"
        for name in file.tensors
        if name.startswith(UNET_PREFIX) and name not in found
    ]
    if problems:
        more = f" and {len(problems) - 3:,} more" if len(problems) > 3 else ""
        raise ModelError(
            f"{printable(str(file.path))}: not a {family} model that can be trained here: "
            f"{'; '.join(problems[:3])}{more}. Set another model.path."
        )
    return found


def _as_stored(file: ModelFile, wanted: Original) -> Original | None:
    """A tensor as this file names and stores it; None if it is missing."""
    if wanted.name in file.tensors:
        return wanted
    # Some files have CLIP's names without `text_model.`, and some an untransposed projection.
    others = (
        wanted._replace(name=wanted.name.replace(INNER, "", 1)),
        wanted._replace(name=f"{wanted.name}.weight", form="same"),
    )
    return next((one for one in others if one.name in file.tensors), None)


def _shape_of(file: ModelFile, family: FamilyName, latent_channels: int) -> Shape:
    """The shape of the family whose first layer has as many channels as that of the file."""
    found = file.tensors[UNET_START].shape[0]
    sizes: tuple[Size, ...] = ("full", "tiny")
    shapes = {
        first_width(shape): shape
        for shape in (shape_of(family, size, latent_channels) for size in sizes)
    }
    if found not in shapes:
        raise ModelError(
            f"{printable(str(file.path))}: {UNET_START} gives {found} channels, expected "
            f"{next(iter(shapes))} for {family}. Set another model.path."
        )
    return shapes[found]


def _fill(
    file: ModelFile, parts: Mapping[str, Any], found: Mapping[str, Original], dtype: torch.dtype
) -> None:
    """Give the parts, built without memory for their weights, those of the file."""
    with ReadTensors() as tensors:
        for name, original in found.items():
            values = original.from_file(tensors.read_again(file, name))
            for place, value in zip(original.parts, values, strict=True):
                part, _, inner = place.partition(".")
                module, _, kind = inner.rpartition(".")
                holder = parts[part].get_submodule(module)
                shape = getattr(holder, kind).shape
                # Copied also where the type is the same: the memory is used again.
                value = value.reshape(shape).to(dtype, copy=True)  # noqa: PLW2901
                setattr(holder, kind, nn.Parameter(value.contiguous()))
