"""The values of an array of latents, in whatever type they were cached.

Floats of any size are themselves. bfloat16, which numpy lacks, is stored as uint16, and a text
array `latents_dtype` or `latents_dtype_{h}x{w}` may say so. Source: model-facts 3.
"""

import numpy as np
from numpy.typing import NDArray

from capmerge.files.npz import Npz
from capmerge.index.latent_names import parse_array


class LatentTypeError(Exception):
    """The type of an array is not one of latents, or not what the file says it is.

    Its text is a part of a sentence, without a full stop.
    """


def read_values(npz: Npz, name: str) -> NDArray[np.float32]:
    """Return the latents of that name as float32; numbers that it cannot hold become infinite.

    Raises `LatentTypeError`, and what `Npz` raises.
    """
    parsed = parse_array(name)
    assert parsed is not None
    array, tag = npz[name], _tag(npz, parsed.suffix)
    stored = "bfloat16" if array.dtype.kind == "u" and array.itemsize == 2 else array.dtype.name
    if array.dtype.kind != "f" and stored != "bfloat16":
        raise LatentTypeError(f'"{name}" is of type {array.dtype}, expected a float type')
    if tag not in (None, stored):
        raise LatentTypeError(
            f'"{name}" is of type {array.dtype}, but "latents_dtype{parsed.suffix}" says {tag!r}, '
            "expected both to agree (bfloat16 is stored as uint16, any other type as itself)"
        )
    if stored == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    with np.errstate(over="ignore"):
        return array.astype(np.float32, copy=False)


def _tag(npz: Npz, suffix: str) -> str | None:
    """The type that a file names for its latents; None if it names none."""
    name = f"latents_dtype{suffix}"
    if name not in npz.names:
        # One tag without a size may stand beside arrays with one.
        name = "latents_dtype"
        if name not in npz.names or "latents" in npz.names:
            return None
    tag = npz[name]
    if tag.dtype.kind not in "US" or tag.size != 1:
        raise LatentTypeError(
            f'"{name}" is {tag.dtype} {tag.shape}, expected one text such as "float16"'
        )
    text = tag.reshape(-1)[0]
    return text.decode("ascii", "replace") if isinstance(text, bytes) else str(text)
