"""Where the source of a model holds each of its tensors, and those of its VAE.

The source is a single file, a diffusers folder, or nothing for random weights. Writing a model
needs it for what was not trained: those tensors are copied, not rounded twice.
"""

from pathlib import Path
from typing import Any, NamedTuple

from accelerate import init_empty_weights
from diffusers import AutoencoderKL
from torch import Tensor, nn

from capmerge.errors import printable
from trainer.config.model_file import ModelFile, is_model_file, read_header
from trainer.config.model_source import VAE_FOLDER
from trainer.config.settings import RANDOM, Config, family_of
from trainer.errors import ModelError
from trainer.families import FamilyName
from trainer.model.build import model_fingerprint
from trainer.model.folder_files import ENCODER_STEM, UNET_STEM, match_tensors, read_json
from trainer.model.model import Model
from trainer.model.original_layout import VAE, VAE_PREFIX, Original, list_originals
from trainer.model.shapes import VAE_SHAPES
from trainer.model.single_file import match_names
from trainer.model.tensor_file import ReadTensors, without_ones


class Held(NamedTuple):
    """One tensor of a model, and where a file holds it."""

    file: ModelFile
    original: Original
    """The tensor of the file; its `name` is the one there."""
    number: int
    """The place of our tensor among the parts of the original."""

    @property
    def dtype(self) -> str:
        """The type in the file, as safetensors names it."""
        return self.file.tensors[self.original.name].dtype

    def read(self, tensors: ReadTensors) -> Tensor:
        """The value as the file holds it, possibly with other sides of 1."""
        return self.original.from_file(tensors.read(self.file, self.original.name))[self.number]


class Source(NamedTuple):
    """The source of a model."""

    held: dict[str, Held]
    """By names such as `unet.conv_in.weight` and `vae.quant_conv.bias`; what is not there has no
    source."""
    file: ModelFile | None
    """The single file, if the source is one."""
    found: dict[str, Original]
    """The tensors of that file that `held` comes from, by their names there, without the VAE's."""
    vae: nn.Module | None
    """The VAE without weights; None when there is none, or none that diffusers could name."""
    vae_folder: Path | None
    """The folder of the VAE, if it comes from one."""


def is_gone(config: Config) -> bool:
    """True if the file or folder of a model is not there any more."""
    return config.model.path != RANDOM and not Path(config.model.path).exists()


def check_same_source(config: Config, fingerprint: str | None) -> None:
    """Raise `ModelError` when the source is gone, or has another `fingerprint` than this one.

    None for `fingerprint` compares nothing.
    """
    shown = printable(config.model.path)
    wanted = (
        "expected the model that the training began with. Put it back, or name its place: python "
        "-m trainer.export STATE -o FILE --source PATH."
    )
    if is_gone(config):
        raise ModelError(f"{shown}: no such file or folder, {wanted}")
    if fingerprint is None:
        return
    found = model_fingerprint(config)
    if found != fingerprint:
        raise ModelError(
            f"{shown}: the model has changed (its hash is {found}, and was {fingerprint}), {wanted}"
        )


def source_folder(config: Config) -> Path | None:
    """The diffusers folder that a model comes from; None for a single file or random weights."""
    path = config.model.path
    return None if path == RANDOM or is_model_file(path) else Path(path)


def check_source(model: Model, config: Config) -> Source:
    """The source as the end of a run will need it, so that a fault is told at the start."""
    is_linked = source_folder(config) and not config.model.vae
    return find_source(model, config, vae=not is_linked or "single" in config.export.formats)


def find_source(model: Model, config: Config, *, vae: bool) -> Source:
    """Where the source of a model holds its tensors, also those of its VAE with `vae`.

    No values are read. A source that is gone holds none. Raises `ModelError` when the source is
    another model by now, or `model.vae` is no VAE.
    """
    parts, settings = model.parts(), config.model
    file, found, held = None, dict[str, Original](), dict[str, Held]()
    if is_gone(config):
        pass
    elif is_model_file(settings.path):
        file = read_header(Path(settings.path))
        found = match_names(file, settings.family, parts)
        held = _held(file, found)
    elif settings.path != RANDOM:
        for name, part in parts.items():
            stem = UNET_STEM if name == "unet" else ENCODER_STEM
            held |= _held_in_folder(name, part, Path(settings.path) / name, stem, settings.variant)
    vae_part, of_vae, vae_folder = find_vae(config, file) if vae else (None, {}, None)
    return Source(held | of_vae, file, found, vae_part, vae_folder)


def _held(file: ModelFile, found: dict[str, Original]) -> dict[str, Held]:
    return {
        part: Held(file, original, number)
        for original in found.values()
        for number, part in enumerate(original.parts)
    }


def _held_in_folder(
    name: str, part: nn.Module, folder: Path, stem: str, variant: str
) -> dict[str, Held]:
    return {
        f"{name}.{ours}": Held(file, Original(stored, (f"{name}.{ours}",), "same"), 0)
        for ours, (file, stored) in match_tensors(part, folder, stem, variant).items()
    }


def find_vae(
    config: Config, file: ModelFile | None
) -> tuple[nn.Module | None, dict[str, Held], Path | None]:
    """The VAE to write with the model, where its tensors are, and its folder if it has one.

    It has no memory for its weights. `file` is the single file that the model comes from, if any.
    """
    settings = config.model
    if not settings.vae and file:
        if not any(name.startswith(VAE_PREFIX) for name in file.tensors):
            return None, {}, None
        vae = _vae_of(file, config, VAE_PREFIX)
        try:
            return vae, _held_in_file(file, vae, settings.family), None
        except ModelError:  # it is copied with the file, but no part of a diffusers folder
            return None, {}, None
    if settings.vae and is_model_file(settings.vae):
        alone = read_header(Path(settings.vae))
        prefix = VAE_PREFIX if any(one.startswith(VAE_PREFIX) for one in alone.tensors) else ""
        vae = _vae_of(alone, config, prefix)
        return vae, _held_in_file(alone, vae, settings.family), None
    source = source_folder(config)
    folder = Path(settings.vae) if settings.vae else source and source / VAE_FOLDER
    if folder is None or not (settings.vae or (folder / "config.json").exists()):
        return None, {}, None
    with init_empty_weights():
        built: Any = AutoencoderKL.from_config(  # type: ignore[no-untyped-call]
            read_json(folder / "config.json")
        )
    return built, _held_in_folder(VAE, built, folder, UNET_STEM, settings.variant), folder


def _vae_of(file: ModelFile, config: Config, prefix: str) -> nn.Module:
    """The VAE that a file holds, without weights; its shape is known by its first layer."""
    first = file.tensors.get(f"{prefix}encoder.conv_in.weight")
    family = family_of(config.model)
    shapes = {shape["block_out_channels"][0]: shape for shape in VAE_SHAPES.values()}
    width = first.shape[0] if first else 0
    if width not in shapes:
        width = max(shapes)
    with init_empty_weights():
        vae: Any = AutoencoderKL(  # type: ignore[no-untyped-call]
            **shapes[width]
            | {
                "latent_channels": family.latent_channels,
                "scaling_factor": family.latent_scale,
                "shift_factor": family.latent_shift or None,
            }
        )
    assert isinstance(vae, nn.Module)
    return vae


def _held_in_file(file: ModelFile, vae: nn.Module, family: FamilyName) -> dict[str, Held]:
    """Where a file holds the tensors of a VAE, by the names of either layout.

    Raises `ModelError` when one is missing or has another shape.
    """
    shapes = {f"{VAE}.{name}": tuple(one.shape) for name, one in vae.named_parameters()}
    found, problems = dict[str, Original](), []
    for wanted in list_originals(family, {VAE: vae}):
        short = wanted.name.removeprefix(VAE_PREFIX)
        ours = wanted.parts[0].removeprefix(f"{VAE}.")
        others = (
            wanted,
            wanted._replace(name=short),
            wanted._replace(name=ours, form="same"),
        )
        original = next((one for one in others if one.name in file.tensors), None)
        if original is None:
            problems.append(f"{short} is missing")
            continue
        found[original.name] = original
        stored, expected = file.tensors[original.name].shape, shapes[wanted.parts[0]]
        if without_ones(stored) != without_ones(expected):
            problems.append(f"{original.name} has the shape {stored}, expected {expected}")
    if problems:
        raise ModelError(
            f"{printable(str(file.path))}: no VAE that is known here: {'; '.join(problems[:3])}. "
            "Set model.vae to a folder, whose config.json tells its shape."
        )
    return _held(file, found)
