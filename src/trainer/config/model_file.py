"""What a single-file model says about itself: its tensors, its family, and the marks in it.

It reads the header alone, which takes milliseconds for a file of any size, and needs no torch.
Source of the names and marks: model-facts 2, ComfyUI's `model_detection` and `supported_models`.
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from capmerge.errors import printable
from trainer.errors import ModelError
from trainer.families import FamilyName


class StoredTensor(NamedTuple):
    """Where a tensor stands in a file, and how."""

    dtype: str
    """As safetensors names it, such as `F16`."""
    shape: tuple[int, ...]
    start: int
    """First byte in the file."""
    end: int
    """The byte after its last one."""


class ModelFile(NamedTuple):
    """The header of a `.safetensors` file."""

    path: Path
    tensors: dict[str, StoredTensor]
    metadata: dict[str, str]


class Described(NamedTuple):
    """What a base model says about itself."""

    family: FamilyName
    family_key: str
    """The tensor that tells the family."""
    is_v: bool
    """True with the mark `v_pred`: the model predicts the velocity."""
    is_zero_terminal: bool
    """True with the mark `ztsnr`, which counts beside `v_pred` alone."""
    latent_channels: int


V_MARK = "v_pred"
ZERO_TERMINAL_MARK = "ztsnr"
MARKS = (V_MARK, ZERO_TERMINAL_MARK)
"""Names of empty tensors by which other programs choose how to sample a file."""
UNET_START = "model.diffusion_model.input_blocks.0.0.weight"
"""The first layer of the U-Net in a file of any family."""
UNET_END = "model.diffusion_model.out.2.weight"
"""Its last layer."""

_FAMILY_KEYS: dict[FamilyName, tuple[str, ...]] = {
    "sdxl": ("conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight",),
    "sd2": ("cond_stage_model.model.transformer.resblocks.0.attn.in_proj_weight",),
    "sd1": (
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight",
        "cond_stage_model.transformer.encoder.layers.0.self_attn.q_proj.weight",
    ),
}

_EDM_MARKS = ("edm_vpred.sigma_max", "edm_mean")
# Parts of tensor names -> what the file is.
_OTHERS = (
    (("lora_unet_", "lora_te", ".lora_down.", ".lora_up.", ".lora_A.", ".lora_B."), "a LoRA"),
    ((".hada_w1_a", ".lokr_w1", ".oft_blocks"), "a LyCORIS adapter"),
    (("control_model.", "input_hint_block.", "controlnet_"), "a ControlNet"),
    (("conditioner.embedders.0.model.",), "an SDXL refiner"),
    (("emb_params", "string_to_param"), "a textual inversion embedding"),
    (("joint_blocks.", "double_blocks.", "single_transformer_blocks."), "a diffusion transformer"),
    (("down_blocks.",), "a part of a diffusers folder"),
)
_CHANNELS = {
    9: "an inpainting model",
    8: "an instruct-pix2pix model",
    7: "an upscaling model",
    5: "a depth model",
}
_PICKLES = (".ckpt", ".pt", ".pth", ".bin")
_ENDINGS = (".safetensors", *_PICKLES)
# First bytes of files that are no safetensors -> what they are.
_FIRST_BYTES = (
    (b"PK", "a zip file such as torch.save writes, which may run programs"),
    (b"\x80\x02", "a pickle, which may run programs"),
    (b"version https://git-lfs", "the pointer of a file that Git LFS did not download"),
    (b"<", "a page of a website"),
    (b"GGUF", "a GGUF file"),
)


def read_header(path: Path) -> ModelFile:
    """The header of a `.safetensors` file. Raises `ModelError` for any other or a damaged one."""
    shown = printable(str(path))
    if path.suffix.lower() in _PICKLES:
        raise ModelError(
            f"{shown}: a pickle, which may run programs, expected a .safetensors file. Save it as "
            "one with a program that you trust, for instance WebUI's Checkpoint Merger with the "
            "format safetensors."
        )
    try:
        with path.open("rb") as raw:
            start = raw.read(32)
        if kind := next((kind for first, kind in _FIRST_BYTES if start.startswith(first)), None):
            raise ModelError(
                f"{shown}: {kind}, expected a .safetensors file. Download or convert the file "
                "again."
            )
        # safetensors checks that the header is sound and that the file is as long as it says.
        with safe_open(path, framework="np") as file:
            metadata = dict(file.metadata() or {})
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
    except (OSError, SafetensorError, ValueError) as error:
        problem = getattr(error, "strerror", None) or str(error)
        raise ModelError(
            f"{shown}: not a complete .safetensors file ({problem}). Copy the file again."
        ) from error
    header.pop("__metadata__", None)
    tensors = {
        name: StoredTensor(
            told["dtype"], tuple(told["shape"]), *(8 + length + at for at in told["data_offsets"])
        )
        for name, told in header.items()
    }
    return ModelFile(path, tensors, metadata)


def is_model_file(path: str) -> bool:
    """True if a `model.path` means a single file: it is one, or would be by its ending."""
    file = Path(path)
    return file.is_file() or (file.suffix.lower() in _ENDINGS and not file.is_dir())


def describe(file: ModelFile) -> Described:
    """The family and the marks of a base model that can be trained here.

    Raises `ModelError` with the name of what the file is instead.
    """
    names, shown = file.tensors.keys(), printable(str(file.path))
    found = next(
        (
            (family, key)
            for family, keys in _FAMILY_KEYS.items()
            for key in keys
            if key in names and UNET_START in names
        ),
        None,
    )
    expected = "expected a base model of SD 1.x, SD 2.x or SDXL with U-Net and text encoders"
    if found is None:
        raise ModelError(
            f"{shown}: {_named(names, file.metadata)}, {expected}. Set another model.path."
        )
    channels = file.tensors[UNET_START].shape[1:2]
    given = file.tensors[UNET_END].shape[:1] if UNET_END in names else ()
    if channels != given or not channels:
        takes = channels[0] if channels else 0
        raise ModelError(
            f"{shown}: {_CHANNELS.get(takes, 'no base model')} by the {takes} channels that "
            f"{UNET_START} takes where {UNET_END} gives {given[0] if given else 0}, {expected}. "
            "Set another model.path."
        )
    for mark in _EDM_MARKS:
        if mark in names:
            raise ModelError(
                f"{shown}: a model of EDM's noise levels by its tensor {mark}, expected one of the "
                "usual 1,000 timesteps. It cannot be trained here. Set another model.path."
            )
    is_v = V_MARK in names
    return Described(*found, is_v, is_v and ZERO_TERMINAL_MARK in names, channels[0])


def _named(names: Iterable[str], metadata: dict[str, str]) -> str:
    """What a file is that is no base model, as a part of a message."""
    for marks, kind in _OTHERS:
        for name in names:
            if any(mark in name for mark in marks):
                return f"{kind} by its tensor {printable(name)}"
    architecture = metadata.get("modelspec.architecture", "")
    told = f" (its metadata says {printable(architecture)})" if architecture else ""
    if UNET_START in names:
        return f"a U-Net without the text encoders of its family{told}"
    if any(name.startswith("first_stage_model.") or ".mid.attn_1." in name for name in names):
        return f"a VAE alone{told}"
    first = next(iter(names), None)
    return f"found the tensor {printable(first)}{told}" if first else "found no tensors"
