"""The files of a diffusers folder: its JSON, and which of them holds each tensor of a part."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from diffusers import AutoencoderKL
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from trainer.config.model_file import ModelFile, read_header
from trainer.errors import ModelError
from trainer.model.original_layout import INNER
from trainer.model.tensor_file import without_ones

UNET_STEM, ENCODER_STEM = "diffusion_pytorch_model", "model"
"""The names of weight files in a folder, without their endings; a VAE's are named as a U-Net's."""
_OF_VARIANT = re.compile(
    r"[^.]+\.(?:([^.]+?)(?:-\d+-of-\d+)?\.safetensors|safetensors\.index\.([^.]+)\.json)"
)


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a folder; raises `ModelError` when there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path}: no such file. Expected a complete diffusers folder. "
            "Copy it again, or set another model.path."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: cannot be read as JSON ({error}). Copy the file again."
        ) from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{path}: found a JSON {type(content).__name__}, expected an object. "
            "Copy the file again."
        )
    return content


class StoredName(NamedTuple):
    """A tensor of a folder: the file that holds it, and its name there."""

    file: ModelFile
    name: str


def match_tensors(part: nn.Module, folder: Path, stem: str, variant: str) -> dict[str, StoredName]:
    """The tensors of a part in its folder, by the names of its parameters.

    Raises `ModelError` when one is missing, unknown or of another shape.
    """
    told, files = _tensor_files(folder, stem, variant)
    wanted = {
        name.removeprefix(INNER): (name, parameter.shape)
        for name, parameter in part.named_parameters()
    }
    found = {_short(name, part): StoredName(file, name) for file in files for name in file.tensors}
    problems = [f"{name}: missing" for name in wanted if name not in found]
    shapes = {name: file.tensors[stored].shape for name, (file, stored) in found.items()}
    problems += [
        f"{name}: shape {shapes[name]}, expected {tuple(shape)}"
        for name, (_, shape) in wanted.items()
        if name in found and without_ones(shapes[name]) != without_ones(tuple(shape))
    ]
    problems += [
        f"{name}: unknown" for name in found if name not in wanted and not _may_be_left(name, part)
    ]
    if problems:
        more = f" and {len(problems) - 3:,} more" if len(problems) > 3 else ""
        raise ModelError(
            f"{told}: does not fit the config.json beside it: {'; '.join(problems[:3])}{more}. "
            "Copy the folder again."
        )
    return {name: found[short] for short, (name, _) in wanted.items()}


def _short(name: str, part: nn.Module) -> str:
    """The name of a tensor in a folder, as all versions of the libraries would have it."""
    if isinstance(part, AutoencoderKL):
        return re.sub(r"\.(query|key|value|proj_attn)\.", lambda old: _OLD_VAE[old[1]], name)
    return name.removeprefix(INNER)


_OLD_VAE = {
    "query": ".to_q.",
    "key": ".to_k.",
    "value": ".to_v.",
    "proj_attn": ".to_out.0.",
}
"""Modules of a VAE's attention as diffusers before 0.15 named them."""


def _may_be_left(name: str, part: nn.Module) -> bool:
    """True for a tensor that a text encoder does not need.

    Old files hold the numbers 0 to 76 as `position_ids`, and an encoder whose config leaves its
    last layers out still has their tensors.
    """
    if not isinstance(part, (CLIPTextModel, CLIPTextModelWithProjection)):
        return False
    layer = name.removeprefix("encoder.layers.").split(".")[0]
    return name == "embeddings.position_ids" or (
        layer.isdecimal() and int(layer) >= part.config.num_hidden_layers
    )


def _tensor_files(folder: Path, stem: str, variant: str = "") -> tuple[Path, list[ModelFile]]:
    """The file that names the tensors of a part, and the files that hold them.

    They lie in one file or in several with an index: in those of `variant`, else in the usual ones;
    without a variant in the usual ones, else in those of fp16. Raises `ModelError` when there are
    none.
    """
    for kind in (variant, "") if variant else ("", "fp16"):
        end = f".{kind}" if kind else ""
        whole = folder / f"{stem}{end}.safetensors"
        index = folder / f"{stem}.safetensors.index{end}.json"
        if whole.exists():
            return whole, [read_header(whole)]
        if not index.exists():
            continue
        try:
            files = sorted(set(read_json(index)["weight_map"].values()))
        except (KeyError, AttributeError, TypeError) as error:
            raise ModelError(
                f"{index}: found no weight_map from names to files. Copy the file again."
            ) from error
        if any(Path(name).name != name for name in files):
            raise ModelError(
                f"{index}: names files outside its folder. "
                "Copy the folder from a source that you trust."
            )
        return index, [read_header(folder / name) for name in files]
    pickles = sorted(path.name for path in folder.glob(f"{stem}*.bin"))
    found, next_step = "found no weights", "Copy the folder again."
    if pickles:
        found = f"found {pickles[0]}, which may run programs"
        next_step = (
            "Save the model again with diffusers: "
            "pipeline.save_pretrained(FOLDER, safe_serialization=True)."
        )
    raise ModelError(f"{folder}: {found}, expected {stem}.safetensors. {next_step}")


def check_variant(folder: Path, variant: str) -> None:
    """Raise `ModelError` if no part in the folder has files of the variant."""
    matches = (_OF_VARIANT.fullmatch(path.name) for path in sorted(folder.glob("*/*")))
    found = dict.fromkeys(match[1] or match[2] for match in matches if match)
    if variant and variant not in found:
        raise ModelError(
            f"{folder}: found the variants {', '.join(found) or 'none'}, expected files of the "
            f"variant {variant}. Set another model.variant, or leave it out."
        )
