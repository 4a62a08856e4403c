"""U-Net and text encoders from a diffusers folder: read, and held against what the family needs.

Owns the checks and the reading of safetensors. Knows nothing of training. Nothing is looked up on a
network, no pickle is opened.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from capmerge.tokens.chunks import CHUNK_IDS
from trainer.errors import ModelError
from trainer.families import FAMILIES, LATENT_CHANNELS, FamilyName
from trainer.model.shapes import VOCABULARY, shape_of
from trainer.model.text_encoders import encoder_rules

Prediction = Literal["epsilon", "v"]
PREDICTION_TYPES: dict[Prediction, str] = {"epsilon": "epsilon", "v": "v_prediction"}
"""What diffusers calls the predictions of `[noise]`."""
INNER = "text_model."
"""What stands before the names of a text encoder's tensors in a file, but for its projection."""


def load_parts(
    folder: Path, family: FamilyName, prediction: Prediction, *, weights: bool = True
) -> tuple[nn.Module, list[nn.Module]]:
    """The U-Net and the text encoders in `folder`, float32 on the CPU; without `weights` they have shapes alone.

    Raises `ModelError` when files are missing or damaged, or are of another family or prediction
    type.
    """
    _check_is_folder(folder)
    names = ("text_encoder", "text_encoder_2")[: len(FAMILIES[family].encoders)]
    _check_family(folder, family)
    _check_prediction(folder, prediction)
    with init_empty_weights():
        unet = _build_unet(folder / "unet")
        encoders = [
            _build_encoder(folder / name, pooled=rule.pooled)
            for name, rule in zip(names, encoder_rules(family), strict=True)
        ]
    problems = [
        *_unet_problems(unet, encoders, family),
        *_encoder_problems(names, encoders, family),
    ]
    if problems:
        raise ModelError(
            f"{folder}: not a {family} model that can be trained here: {'; '.join(problems)}. Set another model.path."
        )
    if weights:
        _fill(unet, folder / "unet", "diffusion_pytorch_model")
        for name, encoder in zip(names, encoders, strict=True):
            _fill(encoder, folder / name, "model")
    return unet, encoders


def _check_is_folder(folder: Path) -> None:
    if folder.is_file():
        raise ModelError(
            f"{folder}: a single file, expected a diffusers folder. Write one with diffusers: "
            f'StableDiffusionPipeline.from_single_file("{folder}").save_pretrained(FOLDER); for SDXL StableDiffusionXLPipeline.'
        )
    if not folder.is_dir():
        raise ModelError(
            f'{folder}: no such folder. Expected a diffusers folder with unet and text_encoder, or "random". Set model.path; '
            "nothing is downloaded: get a model first, such as with `hf download NAME --local-dir FOLDER`."
        )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(
            f"{path}: no such file. Expected a complete diffusers folder; copy it anew, or set another model.path."
        ) from None
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{path}: cannot be read as JSON ({error}). Copy the file anew."
        ) from error
    if not isinstance(content, dict):
        raise ModelError(
            f"{path}: found a JSON {type(content).__name__}, expected an object. Copy the file anew."
        )
    return content


def _check_family(folder: Path, family: FamilyName) -> None:
    present = [
        name
        for name in ("text_encoder", "text_encoder_2")
        if name == "text_encoder" or (folder / name).is_dir()
    ]
    configs = [_read_json(folder / name / "config.json") for name in present]
    activations = [config.get("hidden_act", "quick_gelu") for config in configs]
    found = next(
        (
            name
            for name, each in FAMILIES.items()
            if activations == [rule.activation for rule in each.encoders]
        ),
        None,
    )
    if found is not None and found != family:
        raise ModelError(
            f"{folder}: a model of family {found} by its text encoders, expected {family}. Set model.family or model.path."
        )
    if found is None:
        shown = ", ".join(
            f"{name}: {config.get('model_type')} {config.get('hidden_act')}"
            for name, config in zip(present, configs, strict=True)
        )
        raise ModelError(
            f"{folder}: found the text encoders {shown}, expected those of {family}. Set another model.path."
        )


def _check_prediction(folder: Path, prediction: Prediction) -> None:
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return
    found = _read_json(path).get("prediction_type", "epsilon")
    expected = PREDICTION_TYPES[prediction]
    if found != expected:
        raise ModelError(
            f'{path}: prediction_type is "{found}", noise.prediction is "{prediction}". Set noise.prediction to what the model predicts; '
            f'to train it to predict the other, change the file to "{expected}".'
        )


def _build_unet(folder: Path) -> Any:
    config = _read_json(folder / "config.json")
    if config.get("_class_name") != UNet2DConditionModel.__name__:
        raise ModelError(
            f"{folder}: found a {config.get('_class_name')}, expected a UNet2DConditionModel. Set another model.path."
        )
    try:
        return UNet2DConditionModel.from_config(config)  # type: ignore[no-untyped-call]
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{folder / 'config.json'}: makes no U-Net: {error} Copy the file anew."
        ) from error


def _build_encoder(folder: Path, *, pooled: bool) -> Any:
    # transformers 4.48 stored "_attn_implementation_autoset", which turns its fast attention off
    # when it is read again
    config = {
        key: value
        for key, value in _read_json(folder / "config.json").items()
        if not key.startswith("_")
    }
    try:
        return (CLIPTextModelWithProjection if pooled else CLIPTextModel)(
            CLIPTextConfig.from_dict(config)
        )
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{folder / 'config.json'}: makes no text encoder: {error} Copy the file anew."
        ) from error


def _unet_problems(unet: Any, encoders: list[Any], family: FamilyName) -> Iterator[str]:
    found = unet.config
    n_channels = LATENT_CHANNELS
    if (found.in_channels, found.out_channels) != (n_channels, n_channels):
        yield (
            f"unet takes {found.in_channels} channels and gives {found.out_channels}, "
            f"expected {n_channels} and {n_channels} (is it for inpainting?)"
        )
    width = sum(encoder.config.hidden_size for encoder in encoders)
    if found.cross_attention_dim != width:
        yield f"unet has cross_attention_dim {found.cross_attention_dim}, expected the text encoders' {width}"
    sized = FAMILIES[family].size_conditioning
    if (found.addition_embed_type == "text_time") != sized:
        yield f"unet has addition_embed_type {found.addition_embed_type}, expected {'text_time' if sized else None}"
    elif sized:
        pooled, one = encoders[-1].config.projection_dim, found.addition_time_embed_dim
        if found.projection_class_embeddings_input_dim != pooled + 6 * one:
            yield (
                f"unet has projection_class_embeddings_input_dim {found.projection_class_embeddings_input_dim}, expected "
                f"{pooled + 6 * one}: projection_dim {pooled} of text_encoder_2, and 6 times addition_time_embed_dim {one}"
            )


def _encoder_problems(
    names: tuple[str, ...], encoders: list[Any], family: FamilyName
) -> Iterator[str]:
    for name, encoder, real in zip(names, encoders, shape_of(family, "full").encoders, strict=True):
        found = encoder.config
        if (found.vocab_size, found.max_position_embeddings) != (VOCABULARY, CHUNK_IDS):
            yield f"{name} has {found.vocab_size} tokens and {found.max_position_embeddings} places, expected {VOCABULARY} and {CHUNK_IDS}"
        layers = real["num_hidden_layers"]
        if found.hidden_size == real["hidden_size"] and found.num_hidden_layers != layers:
            yield f"{name} has {found.num_hidden_layers} layers, expected {layers}" + (
                ' (the U-Net was trained on the 23rd: set "num_hidden_layers": 23 in its config.json, the 24th is then left out)'
                if family == "sd2" and found.num_hidden_layers == 24
                else ""
            )


def _fill(part: nn.Module, folder: Path, stem: str) -> None:
    """Put the weights of a folder into a part that was built without any."""
    file, tensors = _read_tensors(folder, stem)
    wanted = {
        name.removeprefix(INNER): (name, parameter.shape)
        for name, parameter in part.named_parameters()
    }
    found = {name.removeprefix(INNER): tensor for name, tensor in tensors.items()}
    problems = [f"{name}: missing" for name in wanted if name not in found]
    problems += [
        f"{name}: shape {tuple(found[name].shape)}, expected {tuple(shape)}"
        for name, (_, shape) in wanted.items()
        if name in found and found[name].shape != shape
    ]
    problems += [
        f"{name}: unknown" for name in found if name not in wanted and not _may_be_left(name, part)
    ]
    if problems:
        more = f" and {len(problems) - 3:,} more" if len(problems) > 3 else ""
        raise ModelError(
            f"{file}: does not fit the config.json beside it: {'; '.join(problems[:3])}{more}. Copy the folder anew."
        )
    # copied, or the parameters would stay mapped to a file that somebody may overwrite during the
    # run
    state = {name: found[short].to(torch.float32, copy=True) for short, (name, _) in wanted.items()}
    part.load_state_dict(state, assign=True)


def _may_be_left(name: str, part: nn.Module) -> bool:
    """Old files hold the numbers 0..76 as `position_ids`; a text encoder that was cut by its config has layers past the last."""
    if not isinstance(part, (CLIPTextModel, CLIPTextModelWithProjection)):
        return False
    layer = name.removeprefix("encoder.layers.").split(".")[0]
    return name == "embeddings.position_ids" or (
        layer.isdecimal() and int(layer) >= part.config.num_hidden_layers
    )


def _read_tensors(folder: Path, stem: str) -> tuple[Path, Mapping[str, Tensor]]:
    """The tensors of a part, and the file that names them: in one file, in several with an index, or in one of half precision."""
    whole, half, index = (
        folder / f"{stem}{end}"
        for end in (".safetensors", ".fp16.safetensors", ".safetensors.index.json")
    )
    if whole.exists():
        return whole, _load(whole)
    if index.exists():
        try:
            files = sorted(set(_read_json(index)["weight_map"].values()))
        except (KeyError, AttributeError, TypeError) as error:
            raise ModelError(
                f"{index}: found no weight_map of names to files. Copy the file anew."
            ) from error
        if any(Path(name).name != name for name in files):
            raise ModelError(
                f"{index}: names files outside its folder. Copy the folder from a source that you trust."
            )
        return index, {
            key: tensor for name in files for key, tensor in _load(folder / name).items()
        }
    if half.exists():
        return half, _load(half)
    pickles = sorted(path.name for path in folder.glob(f"{stem}*.bin"))
    found = f"found {pickles[0]}, which may run programs" if pickles else "no weights"
    raise ModelError(
        f"{folder}: {found}, expected {whole.name}. "
        + (
            "Save it anew with diffusers: pipeline.save_pretrained(FOLDER, safe_serialization=True)."
            if pickles
            else "Copy it anew."
        )
    )


def _load(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{path}: cannot be read ({error}). Copy the file anew.") from error
