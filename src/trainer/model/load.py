"""U-Net and text encoders read from a diffusers folder, and checked to be of the family.

Owns the checks. Nothing is looked up on a network, and no pickle is opened.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import init_empty_weights
from diffusers import UNet2DConditionModel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from capmerge.tokens.chunks import CHUNK_IDS
from trainer.config.settings import Config, NoiseSettings, family_of
from trainer.errors import ModelError
from trainer.families import FAMILIES, Family, FamilyName
from trainer.model.folder_files import (
    ENCODER_STEM,
    UNET_STEM,
    StoredName,
    check_variant,
    match_tensors,
    read_json,
)
from trainer.model.shapes import VOCABULARY, shape_of
from trainer.model.tensor_file import ReadTensors
from trainer.model.text_encoders import encoder_rules

Prediction = Literal["epsilon", "v", "flow"]
PREDICTION_TYPES: dict[Prediction, str] = {
    "epsilon": "epsilon",
    "v": "v_prediction",
    "flow": "flow_prediction",
}
"""The names that diffusers gives to the predictions of `[noise]`."""


def load_parts(
    config: Config, dtype: torch.dtype, *, weights: bool = True
) -> tuple[nn.Module, list[nn.Module]]:
    """The U-Net and the text encoders in the folder `model.path`, in `dtype` on the CPU.

    Without `weights` they have shapes alone. Raises `ModelError` when files are missing or damaged,
    or belong to another family, prediction type or noise schedule.
    """
    # Check the folder by its small files, and build the parts without memory for their weights.
    folder, family = Path(config.model.path), config.model.family
    check_is_folder(folder)
    names = ("text_encoder", "text_encoder_2")[: len(FAMILIES[family].encoders)]
    _check_family(folder, family)
    _check_scheduler(folder, config.noise)
    with init_empty_weights():
        unet = _build_unet(folder / "unet")
        encoders = [
            _build_encoder(folder / name, pooled=rule.pooled)
            for name, rule in zip(names, encoder_rules(family), strict=True)
        ]
    problems = [
        *_unet_problems(unet, encoders, family_of(config.model)),
        *_encoder_problems(names, encoders, family),
    ]
    if problems:
        raise ModelError(
            f"{folder}: not a {family} model that can be trained here: {'; '.join(problems)}. "
            "Set another model.path."
        )

    # Read the weights.
    if weights:
        variant = config.model.variant
        check_variant(folder, variant)
        for name, part in [("unet", unet), *zip(names, encoders, strict=True)]:
            stem = UNET_STEM if name == "unet" else ENCODER_STEM
            _fill(part, match_tensors(part, folder / name, stem, variant), dtype)
    return unet, encoders


def check_is_folder(folder: Path) -> None:
    """Raise `ModelError` with the next step if there is no folder of that name."""
    if not folder.is_dir():
        raise ModelError(
            f"{folder}: no such folder. Expected a diffusers folder with unet and text_encoder, a "
            'single-file .safetensors, or "random". Set model.path. Nothing is downloaded: get a '
            "model first, for instance with `hf download NAME --local-dir FOLDER`."
        )


def _check_family(folder: Path, family: FamilyName) -> None:
    """Raise `ModelError` if the text encoders in the folder are those of another family."""
    present = [
        name
        for name in ("text_encoder", "text_encoder_2")
        if name == "text_encoder" or (folder / name).is_dir()
    ]
    configs = [read_json(folder / name / "config.json") for name in present]
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
            f"{folder}: a model of family {found} by its text encoders, expected {family}. "
            "Set model.family or model.path."
        )
    if found is None:
        shown = ", ".join(
            f"{name}: {config.get('model_type')} {config.get('hidden_act')}"
            for name, config in zip(present, configs, strict=True)
        )
        raise ModelError(
            f"{folder}: found the text encoders {shown}, expected those of {family}. "
            "Set another model.path."
        )


def _check_scheduler(folder: Path, noise: NoiseSettings) -> None:
    """Raise `ModelError` if the folder's scheduler samples another model than `noise` trains.

    A scheduler without zero-terminal SNR does not forbid to train with it, nor one of epsilon to
    train a flow: that is how a model gets it.
    """
    path = folder / "scheduler" / "scheduler_config.json"
    if not path.exists():
        return
    scheduler = read_json(path)
    found = scheduler.get("prediction_type", "epsilon")
    if str(scheduler.get("_class_name", "")).startswith("FlowMatch"):
        found = PREDICTION_TYPES["flow"]
    expected = PREDICTION_TYPES[noise.prediction]
    if found != expected and (found, noise.prediction) != ("epsilon", "flow"):
        raise ModelError(
            f'{path}: prediction_type is "{found}", but noise.prediction is "{noise.prediction}". '
            "Set noise.prediction to the one that the model predicts. To train it to predict the "
            f'other, change the file to "{expected}".'
        )
    if (
        scheduler.get("rescale_betas_zero_snr")
        and not noise.zero_terminal_snr
        and noise.prediction != "flow"
    ):
        raise ModelError(
            f"{path}: rescale_betas_zero_snr is true, but noise.zero_terminal_snr is false. "
            "Set noise.zero_terminal_snr = true, as the model was trained. To train it without, "
            "change the file to false."
        )


def _build_unet(folder: Path) -> Any:
    config = read_json(folder / "config.json")
    if config.get("_class_name") != UNet2DConditionModel.__name__:
        raise ModelError(
            f"{folder}: found a {config.get('_class_name')}, expected a UNet2DConditionModel. "
            "Set another model.path."
        )
    try:
        return UNet2DConditionModel.from_config(config)  # type: ignore[no-untyped-call]
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{folder / 'config.json'}: no U-Net can be built from it: {error} Copy the file again."
        ) from error


def _build_encoder(folder: Path, *, pooled: bool) -> Any:
    # transformers 4.48 stored "_attn_implementation_autoset", which turns its fast attention off
    # when it is read back.
    config = {
        key: value
        for key, value in read_json(folder / "config.json").items()
        if not key.startswith("_")
    }
    try:
        return (CLIPTextModelWithProjection if pooled else CLIPTextModel)(
            CLIPTextConfig.from_dict(config)
        )
    except (ValueError, TypeError) as error:
        raise ModelError(
            f"{folder / 'config.json'}: no text encoder can be built from it: {error} "
            "Copy the file again."
        ) from error


def _unet_problems(unet: Any, encoders: list[Any], family: Family) -> Iterator[str]:
    """The values in the U-Net's config that do not fit, each as a part of a message."""
    found = unet.config
    n_channels = family.latent_channels
    if (found.in_channels, found.out_channels) != (n_channels, n_channels):
        is_base = found.in_channels == found.out_channels
        hint = "set model.latent_channels to it" if is_base else "is it for inpainting?"
        yield (
            f"unet takes {found.in_channels} channels and gives {found.out_channels}, "
            f"expected {n_channels} and {n_channels} ({hint})"
        )
    width = sum(encoder.config.hidden_size for encoder in encoders)
    if found.cross_attention_dim != width:
        yield (
            f"unet has cross_attention_dim {found.cross_attention_dim}, "
            f"expected {width}, the width of the text encoders"
        )
    sized = family.size_conditioning
    if (found.addition_embed_type == "text_time") != sized:
        yield (
            f"unet has addition_embed_type {found.addition_embed_type}, "
            f"expected {'text_time' if sized else None}"
        )
    elif sized:
        pooled, time = encoders[-1].config.projection_dim, found.addition_time_embed_dim
        input_dim = found.projection_class_embeddings_input_dim
        if input_dim != pooled + 6 * time:
            yield (
                f"unet has projection_class_embeddings_input_dim {input_dim}, expected "
                f"{pooled + 6 * time}: projection_dim {pooled} of text_encoder_2 plus 6 times "
                f"addition_time_embed_dim {time}"
            )


def _encoder_problems(
    names: tuple[str, ...], encoders: list[Any], family: FamilyName
) -> Iterator[str]:
    """The values in the encoders' configs that do not fit, each as a part of a message."""
    for name, encoder, real in zip(names, encoders, shape_of(family, "full").encoders, strict=True):
        found = encoder.config
        if (found.vocab_size, found.max_position_embeddings) != (VOCABULARY, CHUNK_IDS):
            yield (
                f"{name} has {found.vocab_size} tokens and {found.max_position_embeddings} "
                f"positions, expected {VOCABULARY} and {CHUNK_IDS}"
            )
        layers = real["num_hidden_layers"]
        if found.hidden_size == real["hidden_size"] and found.num_hidden_layers != layers:
            hint = ""
            if family == "sd2" and found.num_hidden_layers == 24:
                hint = (
                    ' (the U-Net was trained on the 23rd: set "num_hidden_layers": 23 in its '
                    "config.json, then the 24th is left out)"
                )
            yield f"{name} has {found.num_hidden_layers} layers, expected {layers}{hint}"


def _fill(part: nn.Module, stored: Mapping[str, StoredName], dtype: torch.dtype) -> None:
    """Load the weights of `match_tensors` into a part that was built without any."""
    state = {}
    with ReadTensors() as tensors:
        for name, parameter in part.named_parameters():
            value = tensors.read_again(*stored[name])
            state[name] = value.reshape(parameter.shape).to(dtype, copy=True)
    part.load_state_dict(state, assign=True)
