"""Cached latents: the contents of an `.npz` file of sd-scripts, checked and scaled.

Names, shapes and meanings of the arrays: sd-scripts-facts A5, C4, D1, D3; types and their tags:
model-facts 3.

Shape suffixes: C latent channels, H W latent height and width (pixels / 8).
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from capmerge.files.npz import READ_ERRORS, Npz
from capmerge.files.shards import DamagedShardError, Member
from capmerge.index.latent_names import PIXELS_PER_LATENT, parse_array
from capmerge.index.latent_values import LatentTypeError, read_values
from trainer.errors import LatentsError
from trainer.families import Family

FILES_CHECKED = 64
"""The largest number of files that `check_latent_scale` reads."""
LEAST_DEVIATION, LARGEST_DEVIATION = 0.85, 1.18
"""The accepted range for the standard deviation of scaled latents, which is near 1.

The factors of the families differ by 1.40, so latents of another family are at 0.71 or 1.40.
"""

LatentsFile = Path | Member
"""A file of latents: one of its own, or a member of a shard."""

SizeConditioning = tuple[float, float, float, float, float, float]


class Latents(NamedTuple):
    """The cached latents of one picture, ready to train."""

    latents_CHW: Tensor
    """float32, shifted and scaled as the model's latents are."""
    size_conditioning: SizeConditioning | None
    """Original height and width, crop top and left, target height and width in pixels.

    None for families without size conditioning.
    """
    mask_HW: Tensor | None
    """float32 in [0, 1]; None when it was not requested."""


def load_latents(
    path: LatentsFile, *, family: Family, width: int, height: int, flipped: bool, alpha_mask: bool
) -> Latents:
    """The latents in the file `path` for a bucket of `width` x `height` pixels.

    Arrays with the bucket's suffix `_{h}x{w}` in latent units take precedence over plain ones.
    They may be floats of any size, or bfloat16 stored as uint16; `latents_dtype` may tell which.
    `flipped` takes `latents_flipped` and mirrors the crop (crop_left = target width - crop_right)
    and the mask. `alpha_mask` is resized by area to latent size. Raises `LatentsError` for
    anything that is missing, damaged, of another shape or not finite.
    """
    try:
        with Npz(path) as npz:
            return _latents(
                path, npz, family, width, height, flipped=flipped, alpha_mask=alpha_mask
            )
    except READ_ERRORS as error:
        raise unreadable(path, error) from error
    except LatentsError as error:
        if isinstance(path, Member):
            raise LatentsError(f"{error} {_PACK_AGAIN}") from error
        raise


def unreadable(path: LatentsFile, error: Exception) -> LatentsError:
    """The error for a file that cannot be opened, or whose bytes are not an npz."""
    if isinstance(path, Member):
        found = error if isinstance(error, DamagedShardError) else _one_line(error)
        return LatentsError(
            f"{path}: {found}, expected the .npz that was packed. Copy the shard again from where "
            "it is whole, or run capmerge pack-latents again."
        )
    if isinstance(error, FileNotFoundError):
        return LatentsError(
            f"{path}: no such file, expected cached latents. Cache them again, "
            "or list the folder again: capmerge index FILE --latents DIR --relist."
        )
    if isinstance(error, OSError):
        return LatentsError(
            f"{path}: {error.strerror or error}, expected a readable .npz file. "
            "Check the disk and the permissions of the file."
        )
    return LatentsError(
        f"{path}: {_one_line(error)}, expected an .npz of plain arrays. {_CACHE_AGAIN}"
    )


def with_way_out(error: LatentsError) -> LatentsError:
    """The error of a run that stops at one file, with what else can be done about such files."""
    return LatentsError(
        f'{error} Or set data.on_missing = "skip", which trains another picture in its place. '
        "capmerge index FILE --latents DIR --check names all broken files at once."
    )


_CACHE_AGAIN = "Cache the latents of this picture again."
_PACK_AGAIN = "Then pack them again: capmerge pack-latents."
_WRONG_SIZE = (
    "Cache the latents of this picture again, or rewrite the metadata that they were cached with. "
    "If they were cached anew since the folder was listed, list it again: "
    "capmerge index FILE --latents DIR --relist."
)


def _one_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _latents(
    path: LatentsFile,
    npz: Npz,
    family: Family,
    width: int,
    height: int,
    *,
    flipped: bool,
    alpha_mask: bool,
) -> Latents:
    # Choose between the arrays of this bucket and plain ones.
    shape = (family.latent_channels, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT)
    suffix = f"_{shape[1]}x{shape[2]}"
    if f"latents{suffix}" not in npz.names:
        if "latents" not in npz.names:
            raise LatentsError(
                f'{path}: found {_names(npz)}, expected "latents" or "latents{suffix}" '
                f"for the bucket {width}x{height}. {_WRONG_SIZE}"
            )
        suffix = ""
    for name in ("original_size", "crop_ltrb"):
        if name + suffix not in npz.names:
            raise LatentsError(
                f'{path}: found {_names(npz)}, expected "{name}{suffix}" too: '
                f"a very old version wrote the file. {_CACHE_AGAIN}"
            )
    # Read and check what was requested.
    name = ("latents_flipped" if flipped else "latents") + suffix
    if name not in npz.names:
        raise LatentsError(
            f'{path}: found {_names(npz)}, expected "{name}", which data.flip needs. '
            "Cache the latents again with flip augmentation, or set data.flip = false."
        )
    latents = _scaled(path, npz, name, family)
    if latents.shape != shape:
        step = _WRONG_SIZE
        if latents.ndim == 3 and latents.shape[0] != shape[0]:
            step = (
                "Cache the latents with the VAE of the model, or set model.latent_channels to what "
                "the U-Net takes."
            )
        raise LatentsError(
            f'{path}: "{name}" has the shape {tuple(latents.shape)}, '
            f"expected {shape} for the bucket {width}x{height}. {step}"
        )
    mask = _mask(path, npz, suffix, width, height, flipped=flipped) if alpha_mask else None
    size = (
        _size_conditioning(path, npz, suffix, width, height, flipped=flipped)
        if family.size_conditioning
        else None
    )
    return Latents(latents, size, mask)


def _names(npz: Npz) -> str:
    return ", ".join(f'"{name}"' for name in sorted(npz.names)[:8]) or "no arrays"


def _scaled(path: LatentsFile, npz: Npz, name: str, family: Family) -> Tensor:
    """The latents as the U-Net takes them; raises `LatentsError` unless all of them are finite."""
    try:
        latents = torch.from_numpy(read_values(npz, name))
    except LatentTypeError as error:
        raise LatentsError(f"{path}: {error}. {_CACHE_AGAIN}") from error
    if family.latent_shift:
        latents = latents - family.latent_shift
    latents = latents * family.latent_scale
    # The sum takes 8 us for 4x128x128, `isfinite` of each value 105 us. The sum of finite values
    # may overflow, so the values decide.
    if not math.isfinite(latents.sum().item()):
        broken = int((~torch.isfinite(latents)).sum())
        if broken:
            raise LatentsError(
                f'{path}: {broken} of {latents.numel()} numbers of "{name}" are NaN or infinite, '
                f"expected none. {_CACHE_AGAIN}"
            )
    return latents


def _mask(
    path: LatentsFile, npz: Npz, suffix: str, width: int, height: int, *, flipped: bool
) -> Tensor:
    """The alpha mask at latent size, each value the mean of the pixels of one latent position."""
    name = "alpha_mask" + suffix
    if name not in npz.names:
        raise LatentsError(
            f'{path}: found {_names(npz)}, expected "{name}", which data.alpha_mask needs. '
            "Cache the latents again with the alpha mask, or set data.alpha_mask = false."
        )
    array = npz[name]
    if array.shape != (height, width) or array.dtype.kind not in "fb":
        found = f"{array.dtype} {array.shape}"
        raise LatentsError(
            f'{path}: "{name}" is {found}, expected floats ({height}, {width}) for its bucket. '
            f"{_CACHE_AGAIN}"
        )
    mask = torch.from_numpy(array.astype(np.float32))
    if not bool(((mask >= 0) & (mask <= 1)).all()):
        raise LatentsError(
            f'{path}: "{name}" holds numbers outside [0, 1], expected weights. {_CACHE_AGAIN}'
        )
    side = PIXELS_PER_LATENT
    mask = mask.view(height // side, side, width // side, side).mean(dim=(1, 3))
    return mask.flip(1) if flipped else mask


def _size_conditioning(
    path: LatentsFile, npz: Npz, suffix: str, width: int, height: int, *, flipped: bool
) -> SizeConditioning:
    original_width, original_height = _numbers(path, npz, "original_size" + suffix, 2)
    left, top, right, _ = _numbers(path, npz, "crop_ltrb" + suffix, 4)
    # Whole pixels: sd-scripts truncates them too (`int` in library/train_util.py, __getitem__).
    crop_left = math.trunc(width - right if flipped else left)
    return (
        *(float(math.trunc(number)) for number in (original_height, original_width, top)),
        float(crop_left),
        float(height),
        float(width),
    )  # type: ignore[return-value]


def _numbers(path: LatentsFile, npz: Npz, name: str, count: int) -> list[float]:
    array = npz[name]
    if array.shape != (count,) or array.dtype.kind not in "iuf" or not np.isfinite(array).all():
        raise LatentsError(
            f'{path}: "{name}" is {array.dtype} {array.tolist()}, expected {count} numbers. '
            f"{_CACHE_AGAIN}"
        )
    return [float(number) for number in array.tolist()]


def check_latent_scale(
    paths: Sequence[LatentsFile], family: Family, *, skip_broken: bool = False
) -> str | None:
    """A warning when the latents in `paths` do not have the scale of `family`, else None.

    Reads `FILES_CHECKED` evenly spaced files, whatever their buckets. Raises `LatentsError` as
    `load_latents` does for a file that cannot be read, unless such files are skipped.
    """
    asked = (
        paths
        if len(paths) <= FILES_CHECKED
        else [paths[place * len(paths) // FILES_CHECKED] for place in range(FILES_CHECKED)]
    )
    files, count, total, squares = 0, 0, 0.0, 0.0
    for path in asked:
        try:
            latents = _any_latents(path, family).double()
        except LatentsError:
            if skip_broken:
                continue
            raise
        files += 1
        count += latents.numel()
        total += latents.sum().item()
        squares += latents.square().sum().item()
    if not count:
        return None
    deviation = math.sqrt(max(0.0, squares / count - (total / count) ** 2))
    if LEAST_DEVIATION <= deviation <= LARGEST_DEVIATION:
        return None
    return (
        f"scaled by {family.latent_scale}, the latents of {files} files have a standard deviation "
        f"of {deviation:.2f}, expected {LEAST_DEVIATION} to {LARGEST_DEVIATION} for {family.name}. "
        "Check model.family: the latents seem to belong to another family. With another VAE, set "
        "model.latent_scale and model.latent_shift."
    )


def _any_latents(path: LatentsFile, family: Family) -> Tensor:
    """The first unflipped latents in the file, as `load_latents` reads them."""
    try:
        with Npz(path) as npz:
            names = [
                name for name in npz.names if (parsed := parse_array(name)) and not parsed.flipped
            ]
            if not names:
                raise LatentsError(
                    f'{path}: found {_names(npz)}, expected "latents". {_CACHE_AGAIN}'
                )
            return _scaled(path, npz, names[0], family)
    except READ_ERRORS as error:
        raise unreadable(path, error) from error
