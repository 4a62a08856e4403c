"""A trained model, saved as a diffusers folder that a pipeline of diffusers loads.

Owns the layout of the folder. It is called on one rank, with a state that was gathered before.
"""

import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from diffusers import __version__ as diffusers_version
from torch import Tensor

from capmerge.errors import OutputError, in_words
from capmerge.files.folders import publish_folder
from trainer.config.settings import Config, NoiseSettings
from trainer.errors import ModelError
from trainer.families import FAMILIES, TIMESTEPS, FamilyName
from trainer.model.flow_sampling import sampling_shift
from trainer.model.folder_files import ENCODER_STEM, UNET_STEM
from trainer.model.load import PREDICTION_TYPES
from trainer.model.model import Model
from trainer.model.noise_schedule import FIRST_BETA, LAST_BETA
from trainer.model.original_layout import INNER, VAE
from trainer.model.source import source_folder
from trainer.model.tensor_file import DTYPES, ReadTensors, new_tensor, write_tensors
from trainer.model.tokenizer_files import write_tokenizer
from trainer.model.weights import Weights

Value = TypeVar("Value")

_LINKED_BYTES = 1 << 20
"""Smallest size of a file to link; smaller ones are copied, as somebody may edit them in place."""
_INDEX = "model_index.json"
_NONE = [None, None]


def without_wrappers(state: Mapping[str, Value]) -> dict[str, Value]:
    """A state, or anything else by its names, under the names of the bare model.

    DDP puts `module.` before each name, and torch.compile `_orig_mod.`, before whole models and,
    when a model is compiled block by block, also inside of names.
    """
    return {
        ".".join(part for part in name.split(".") if part != "_orig_mod").removeprefix(
            "module."
        ): tensor
        for name, tensor in state.items()
    }


def save_model(
    model: Model, state: Mapping[str, Tensor], folder: Path, config: Config
) -> tuple[str, ...]:
    """Save the model as `folder`, and return the parts of the pipeline that are missing: `vae`.

    The folder is written whole or not at all, and replaces an older one, with one tensor at a time
    in memory. `state` is `model.state_dict()`, gathered from all ranks if they share it. Parts and
    tensors that are not trained are taken from `model.path`, large files as hard links where
    possible. Raises `OutputError` when the folder cannot be written, and `ModelError` when the
    source is gone or a value does not fit into `export.dtype`.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        with ReadTensors() as reader:
            needs_vae = bool(config.model.vae) or source_folder(config) is None
            weights = Weights(model, state, config, reader, vae=needs_vae)
            missing = _write(model, weights, unfinished, config)
        publish_folder(unfinished, folder)
    except ModelError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    except (OSError, OutputError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OutputError(
            f"{folder}: the model cannot be written ({in_words(error)}). Nothing of it was kept. "
            "Free some disk space, then --resume latest writes it."
        ) from error
    return missing


def _write(model: Model, weights: Weights, folder: Path, config: Config) -> tuple[str, ...]:
    """Write all files of the folder, and return the missing parts of the pipeline."""
    source = source_folder(config)

    # The trained parts, a VAE from elsewhere, the scheduler, and the index of the pipeline.
    for name, part in model.parts().items():
        _write_part(name, part, weights, folder / name)
    if config.model.vae or source is None:
        _write_vae(weights, folder / VAE)
    scheduler = _scheduler(source, config.noise, config.model.family)
    (folder / "scheduler").mkdir()
    _write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
    index = _index(source, config.model.family)
    ours = {
        name: ["diffusers" if name == "unet" else "transformers", type(part).__name__]
        for name, part in model.parts().items()
    }
    index |= ours | {"scheduler": ["diffusers", scheduler["_class_name"]]}

    # The other parts of the source's pipeline, and the tokenizers unless they came with those.
    for name, value in index.items():
        if (
            source
            and isinstance(value, list)
            and value != _NONE
            and not (folder / name).exists()
            and (source / name).is_dir()
        ):
            _copy(source / name, folder / name)
    for number, tokenizer in enumerate(FAMILIES[config.model.family].tokenizers):
        name = f"tokenizer_{number + 1}" if number else "tokenizer"
        if not (folder / name).exists():
            write_tokenizer(folder / name, tokenizer)
            index[name] = ["transformers", "CLIPTokenizer"]

    # The index, which names missing parts as none.
    named = [name for name, value in index.items() if isinstance(value, list) and len(value) == 2]
    absent = [name for name in named if not (folder / name).exists()]
    _write_json(
        folder / _INDEX,
        index | dict.fromkeys(absent, _NONE) | {"_diffusers_version": diffusers_version},
    )
    return tuple(name for name in absent if index[name] != _NONE or name == "vae")


def _write_part(name: str, part: Any, weights: Weights, folder: Path) -> None:
    """Write a U-Net or VAE as diffusers stores it, or a text encoder as transformers does.

    Every version of transformers reads the names that it gets here.
    """
    is_encoder = not hasattr(part, "save_config")
    keys = [key for key, _ in part.named_parameters()]
    tensors = [
        new_tensor(
            key if not is_encoder or key.startswith((INNER, "text_projection.")) else INNER + key,
            weights.dtype(f"{name}.{key}"),
            weights.shapes[f"{name}.{key}"],
            partial(weights.value, f"{name}.{key}"),
        )
        for key in keys
    ]
    folder.mkdir()
    stem = ENCODER_STEM if is_encoder else UNET_STEM
    write_tensors(folder / f"{stem}.safetensors", tensors, {"format": "pt"}, weights.reader)
    if not is_encoder:
        part.save_config(folder)
        return
    dtype = str(DTYPES[tensors[0].dtype]).removeprefix("torch.")
    content = {
        key: value for key, value in part.config.to_dict().items() if not key.startswith("_")
    }
    content |= {"architectures": [type(part).__name__], "torch_dtype": dtype}
    # From the source, whose precision may be another; transformers 4 knows torch_dtype alone.
    content.pop("dtype", None)
    _write_json(folder / "config.json", content)


def _write_vae(weights: Weights, folder: Path) -> None:
    """Write the VAE of a single file or of `model.vae`, if there is one."""
    if weights.source.vae_folder:
        _copy(weights.source.vae_folder, folder)
    elif weights.source.vae:
        _write_part(VAE, weights.source.vae, weights, folder)


def _index(source: Path | None, family: FamilyName) -> dict[str, Any]:
    """The model_index.json of the source, or that of a new pipeline of the family."""
    if source and (source / _INDEX).exists():
        content = json.loads((source / _INDEX).read_text(encoding="utf-8"))
        assert isinstance(content, dict)
        return content
    if family == "sdxl":
        # For an empty caption, the U-Net was trained on the encoders' output, not on zeros.
        return {
            "_class_name": "StableDiffusionXLPipeline",
            "feature_extractor": _NONE,
            "image_encoder": _NONE,
            "force_zeros_for_empty_prompt": False,
            "vae": ["diffusers", "AutoencoderKL"],
        }
    return {
        "_class_name": "StableDiffusionPipeline",
        "feature_extractor": _NONE,
        "image_encoder": _NONE,
        "safety_checker": _NONE,
        "requires_safety_checker": False,
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _scheduler(source: Path | None, noise: NoiseSettings, family: FamilyName) -> dict[str, Any]:
    """The config of the source's scheduler, with the settings of the training in it.

    Another takes its place if the source's cannot do what was trained: a DDIMScheduler for
    zero-terminal SNR, and for a flow a UniPCMultistepScheduler, because the pipelines of these
    families cannot use diffusers' own FlowMatch schedulers.
    """
    path = source / "scheduler" / "scheduler_config.json" if source else None
    found = json.loads(path.read_text(encoding="utf-8")) if path and path.exists() else {}
    if noise.prediction == "flow":
        if not found.get("use_flow_sigmas"):
            found = {
                "_class_name": "UniPCMultistepScheduler",
                "num_train_timesteps": TIMESTEPS,
                "steps_offset": 1,  # without effect here, but the pipelines warn about 0
            }
        flow = {
            "prediction_type": PREDICTION_TYPES["flow"],
            "use_flow_sigmas": True,
            "flow_shift": sampling_shift(noise, family),
        }
        return found | flow | {"_diffusers_version": diffusers_version}
    content: dict[str, Any] = {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": TIMESTEPS,
        "beta_start": FIRST_BETA,
        "beta_end": LAST_BETA,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "rescale_betas_zero_snr": False,
    }
    if found and (not noise.zero_terminal_snr or "rescale_betas_zero_snr" in found):
        content = found
    content["prediction_type"] = PREDICTION_TYPES[noise.prediction]
    if "rescale_betas_zero_snr" in content:
        content["rescale_betas_zero_snr"] = noise.zero_terminal_snr
    if noise.zero_terminal_snr:
        # Sampling has to begin at the last timestep. Source: arXiv 2305.08891.
        content["timestep_spacing"] = "trailing"
    return content | {"_diffusers_version": diffusers_version}


def _copy(source: Path, target: Path) -> None:
    target.mkdir()
    for path in source.iterdir():
        if path.is_dir():
            _copy(path, target / path.name)
        else:
            _link_or_copy(path.resolve(), target / path.name)


def _link_or_copy(path: Path, target: Path) -> None:
    if path.stat().st_size >= _LINKED_BYTES:
        try:
            os.link(path, target)
        except OSError:  # the folders are on two disks, or the disk has no links
            shutil.copyfile(path, target)
    else:
        shutil.copyfile(path, target)


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
