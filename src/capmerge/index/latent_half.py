"""A file of latents with its latents as float16, for half the bytes."""

import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from capmerge.files.npz import Npz
from capmerge.files.openable import Openable
from capmerge.index.latent_names import parse_array
from capmerge.index.latent_values import read_values

DTYPE_TAG = "latents_dtype"


def in_half(place: Path | Openable) -> bytes | None:
    """Return the bytes of a sound file with its latents rounded to float16.

    All other arrays stay as they are, in the order of the file; only a text that names the type of
    the latents names the new one. The bytes depend on the arrays alone. Returns None when a number
    is beyond the range of float16, which ends at 65,504. Raises what `Npz` raises.
    """
    written = BytesIO()
    with Npz(place) as npz, zipfile.ZipFile(written, "w") as zipped:
        for name in npz.names:
            array = half_of(npz, name)
            if parse_array(name) and not np.isfinite(array).all():
                return None
            with zipped.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return written.getvalue()


def half_of(npz: Npz, name: str) -> NDArray[np.generic]:
    """Return the array of this name as `in_half` writes it; beyond float16 it is infinite."""
    if parse_array(name):
        with np.errstate(over="ignore"):
            return read_values(npz, name).astype(np.float16)
    if name.startswith(DTYPE_TAG):
        return np.array("float16")
    return npz[name]
