"""The sizes of the latents in an `.npz` file, read from the headers of its arrays alone.

An array `latents` or `latents_{h}x{w}` of the shape (channels, h, w) belongs to a bucket of 8 w x
8 h px. Whether the model takes so many channels is checked when the latents are read. A file that
sd-scripts wrote for several resolutions holds several of them. Source: sd-scripts-facts A5 and F.
"""

from pathlib import Path
from typing import NamedTuple

from capmerge.files.npz import READ_ERRORS, Npz
from capmerge.files.openable import Openable
from capmerge.index.latent_names import PIXELS_PER_LATENT, parse_array

MOST_PX = (1 << 16) - 1
"""The longest side of a bucket, because a listing stores its sides in 16 bits."""

LEAST_PX = 64
"""The shortest side of a bucket, since U-Nets halve 8 latent positions three times."""

_MOST_SIZES = 256

Size = tuple[int, int]
"""Width and height of a bucket in px."""


class Sizes(NamedTuple):
    """The sizes in one file, or the reason why there are none."""

    sizes: list[Size]
    """In ascending order, each once; empty when there is a `problem`."""
    problem: str = ""
    """The reason in words, as a part of a sentence."""


def read_sizes(place: Path | Openable) -> Sizes:
    """Return the sizes of all latents in the file, whose values are not read."""
    try:
        with Npz(place) as npz:
            return sizes_in(npz)
    except READ_ERRORS as error:
        return Sizes([], problem_of(error))


def sizes_in(npz: Npz) -> Sizes:
    """Return the sizes of all latents in an open file. Raises what `Npz` raises."""
    names = [name for name in npz.names if name.startswith("latents")]
    sizes = {size for name in names[:_MOST_SIZES] if (size := size_of_array(npz, name))}
    if sizes:
        return Sizes(sorted(sizes))
    arrays = ", ".join(f'"{name}"' for name in sorted(npz.names)[:8]) or "no arrays"
    expected = "latents of the shape (channels, height / 8, width / 8)"
    return Sizes([], f"found {arrays}, expected {expected}")


def size_of_array(npz: Npz, name: str) -> Size | None:
    """Return the size of the bucket that an array of the file belongs to.

    None if it is not an array of latents, or of another shape than its name says.
    """
    array = parse_array(name)
    if array is None or array.flipped:
        return None
    shape, _ = npz.header(name)
    if len(shape) != 3 or not shape[0]:
        return None
    _, rows, columns = shape
    if array.sides and array.sides != (rows, columns):
        return None
    size = columns * PIXELS_PER_LATENT, rows * PIXELS_PER_LATENT
    return size if min(size) >= LEAST_PX and max(size) <= MOST_PX else None


def problem_of(error: Exception) -> str:
    """Return the reason why a file cannot be read, in one line without a full stop."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
