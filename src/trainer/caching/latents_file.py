"""The latents file of one picture: its name, its arrays, and how a finished one is recognised.

Names and arrays are sd-scripts' (sd-scripts-facts A4, A5), whose every version reads latents
without a size in their name. One more array, which it leaves alone, is `MARK`: a hash of all
settings that decide the latents, and the number of bytes of the picture's file.
"""

import hashlib
import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from capmerge.errors import printable
from capmerge.files.atomic import AtomicFile
from capmerge.files.npz import READ_ERRORS, Npz
from capmerge.index.latent_names import legacy_name, sized_name
from trainer.caching.buckets import CropLTRB, SidesWH
from trainer.errors import LatentsError

MARK = "trainer_cache"
_VERSION = 1
_LARGEST_MARK = 4096


class Encoded(NamedTuple):
    """What a file holds of one picture."""

    arrays: Mapping[str, NDArray[Any]]
    """`latents` and, if they were asked for, `latents_flipped`: (channels, height, width)."""
    latents_dtype: str
    """The type that they stand for; "bfloat16" is stored as uint16."""
    original: SidesWH
    crop: CropLTRB
    alpha_mask: NDArray[np.float32] | None
    """(height, width) in px of the bucket, from 0 to 1."""


def fingerprint_of(decisive: Mapping[str, Any]) -> str:
    """A hash of everything that decides the latents of a picture."""
    text = json.dumps({"version": _VERSION, **decisive}, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_name(stem: str, original: SidesWH, suffix: str) -> str:
    """The name of the latents file of a picture, below the folder of the latents.

    >>> file_name("a/b", (547, 466), "_sdxl"), file_name("a/b", (547, 466), "")
    ('a/b_0547x0466_sdxl.npz', 'a/b.npz')
    """
    return sized_name(stem, *original, suffix) if suffix else legacy_name(stem)


def is_finished(path: Path, mark: str) -> bool:
    """True if the file was made by these settings of this picture, false if there is none.

    Raises `LatentsError` for a file that other settings or another program made.
    """
    found = None
    try:
        with Npz(path) as npz:
            if MARK in npz.names:
                shape, dtype = npz.header(MARK)
                found = str(npz[MARK]) if not shape and dtype.itemsize <= _LARGEST_MARK else None
    except FileNotFoundError:
        return False
    except READ_ERRORS as error:
        raise _of_others(path, f"it cannot be read ({error})") from error
    if found == mark:
        return True
    if found is None:
        raise _of_others(path, "another program made it")
    same_settings = found.partition(" ")[0] == mark.partition(" ")[0]
    raise _of_others(
        path, "the picture has changed since" if same_settings else "other settings made it"
    )


def _of_others(path: Path, problem: str) -> LatentsError:
    return LatentsError(
        f"{printable(str(path))}: {problem}, expected latents of these settings, or no file. "
        "To replace such files, give --recache; or set cache.output to another folder."
    )


def write_latents(path: Path, encoded: Encoded, mark: str) -> None:
    """Write a file whole or not at all; raises `OutputError` when the disk is full."""
    arrays = {
        **encoded.arrays,
        "original_size": np.array(encoded.original),
        "crop_ltrb": np.array(encoded.crop, np.float64),
        MARK: np.array(mark),
    }
    if encoded.alpha_mask is not None:
        arrays["alpha_mask"] = encoded.alpha_mask
    if encoded.latents_dtype != "float32":
        arrays["latents_dtype"] = np.array(encoded.latents_dtype)
    content = BytesIO()
    np.savez(content, **arrays)  # type: ignore[arg-type]
    with AtomicFile(path) as file:
        file.write(content.getbuffer())
        file.publish()
