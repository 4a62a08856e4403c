"""A trained model, saved as a diffusers folder that a pipeline of diffusers loads.

Owns the layout of the folder. It is called on one rank, with a state that was gathered before.
"""

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import __version__ as diffusers_version
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from capmerge.errors import OutputError, in_words
from capmerge.files.folders import publish_folder
from trainer.config.settings import Config, NoiseSettings
from trainer.families import FAMILIES, TIMESTEPS, FamilyName, resolution_shift
from trainer.model.load import INNER, PREDICTION_TYPES
from trainer.model.model import Model
from trainer.model.noise_schedule import FIRST_BETA, LAST_BETA
from trainer.model.shapes import RANDOM
from trainer.model.tokenizer_files import write_tokenizer

_LINKED_BYTES = 1 << 20
"""Smallest size of a file to link; smaller ones are copied, as somebody may edit them in place."""
_INDEX = "model_index.json"
_NONE = [None, None]


def without_wrappers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state under the names of the bare model.

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

    The folder is written whole or not at all, and replaces an older one. `state` is
    `model.state_dict()`, gathered from all ranks if they share it. Parts that are not trained are
    taken from `model.path`, large files as hard links where possible. A model with random weights
    has no VAE. Raises `OutputError` when the folder cannot be written.
    """
    unfinished = folder.with_name(f".{folder.name}.unfinished")
    try:
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        missing = _write(model, state, unfinished, config)
        publish_folder(unfinished, folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise OutputError(
            f"{folder}: the model cannot be written ({in_words(error)}). Nothing of it was kept. "
            "Free some disk space, then --resume latest writes it."
        ) from error
    return missing


def _write(
    model: Model, state: Mapping[str, Tensor], folder: Path, config: Config
) -> tuple[str, ...]:
    """Write all files of the folder, and return the missing parts of the pipeline."""
    source = None if config.model.path == RANDOM else Path(config.model.path)

    # The trained parts, the scheduler, and the index of the pipeline with both.
    for name, part in model.parts().items():
        _write_part(part, _tensors_of(name, part, state), folder / name)
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


def _tensors_of(name: str, part: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: state[f"{name}.{key}"].detach().contiguous() for key in part.state_dict()}


def _write_part(part: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Write a U-Net as diffusers stores it, or a text encoder as transformers does.

    Every version of transformers reads the names that it gets here.
    """
    if hasattr(part, "save_config"):
        part.save_config(folder)
        save_file(tensors, folder / "diffusion_pytorch_model.safetensors", {"format": "pt"})
        return
    folder.mkdir()
    named = {
        key if key.startswith((INNER, "text_projection.")) else INNER + key: tensor
        for key, tensor in tensors.items()
    }
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    content = {
        key: value for key, value in part.config.to_dict().items() if not key.startswith("_")
    }
    content |= {"architectures": [type(part).__name__], "torch_dtype": dtype}
    # From the source, whose precision may be another; transformers 4 knows torch_dtype alone.
    content.pop("dtype", None)
    _write_json(folder / "config.json", content)
    save_file(named, folder / "model.safetensors", {"format": "pt"})


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


def sampling_shift(noise: NoiseSettings, family: FamilyName) -> float:
    """The shift with which a flow is sampled as it was trained.

    A shift by resolution is that of the family's usual size.
    """
    side_px = FAMILIES[family].side_px
    return resolution_shift(side_px**2) if noise.shift == "resolution" else noise.shift


def sampling_note(noise: NoiseSettings, family: FamilyName) -> str | None:
    """How a flow is sampled in ComfyUI, which cannot tell it by its weights; None for no flow."""
    if noise.prediction != "flow":
        return None
    return (
        "the model is a flow: sample it in ComfyUI with the node ModelSamplingSD3 at shift "
        f"{sampling_shift(noise, family):.4g}. Without the node it makes noise."
    )


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
