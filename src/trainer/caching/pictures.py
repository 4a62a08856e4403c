"""Pictures read from files: their sizes from the headers, and their pixels as sd-scripts has them.

Source: `load_image` in sd-scripts' library/train_util.py. What differs from it: 16-bit grey is
scaled to 8 bits, where sd-scripts makes every value above 255 white; and `exif_rotation` turns
pictures, which sd-scripts never does (sd-scripts #1316).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

Image.init()
FORMATS: list[str] = [
    name
    for name in ("JPEG", "MPO", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF")
    if name in Image.OPEN
]
"""The formats that are read, whatever the name of a file says.

Others may run programs, as EPS does. AVIF is not in every build of Pillow.
"""
MOST_PIXELS = 178_956_970
"""The largest picture that is read, and made by resizing: that of Pillow."""
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What shows a picture upright, by its EXIF orientation. 1 is upright already."""
_PNG_EXIF = {"exif", "Raw profile type exif"}


class PictureError(Exception):
    """A picture cannot be read or used; the text says why, without a full stop."""


class Header(NamedTuple):
    """What the head of a file says."""

    width: int
    """Pixels, after a rotation that was asked for."""
    height: int
    n_bytes: int
    """The size of the file."""
    is_turned: bool
    """True if EXIF data say that the picture is shown in another orientation than it is stored."""


def read_header(path: Path, *, exif_rotation: bool) -> Header:
    """The size of a picture in px; its pixels are not read.

    Raises `PictureError` for a file that is missing, no picture, or larger than `MOST_PIXELS`.
    """
    with _opened(path) as image:
        width, height = image.size
        orientation = _orientation(image)
        if exif_rotation and orientation >= 5:
            width, height = height, width
        return Header(width, height, path.stat().st_size, orientation != 1)


def read_pixels(path: Path, *, exif_rotation: bool, alpha: bool) -> NDArray[np.uint8]:
    """The pixels of a picture, (height, width, 3) for red, green and blue, 4 with `alpha`.

    Of an animation it is the first picture. Without `alpha`, transparency is dropped: the colours
    under it are seen, as in sd-scripts. Raises `PictureError` for a file that is damaged anywhere.
    """
    with _opened(path) as image:
        turn = _TURNS.get(_orientation(image)) if exif_rotation else None
        if image.mode.startswith("I;16"):
            # Pillow would make all values above 255 white.
            grey = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
            converted = grey.convert("RGBA" if alpha else "RGB")
        else:
            converted = image.convert("RGBA" if alpha else "RGB")
        return np.array(converted.transpose(turn) if turn is not None else converted)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """The opened picture; every error of Pillow in the block becomes a `PictureError`."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            yield image
    except FileNotFoundError:
        raise PictureError("there is no such file") from None
    except UnidentifiedImageError:
        raise PictureError(f"it is none of {', '.join(FORMATS)}") from None
    except OSError as error:
        raise PictureError(error.strerror or _one_line(error)) from error
    except Exception as error:
        # The decoders of Pillow raise errors of any kind for damaged files.
        raise PictureError(_one_line(error)) from error


def _one_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation from 1 to 8; 1 where there is none or the EXIF data are damaged."""
    if image.format == "PNG" and _PNG_EXIF.isdisjoint(image.info):
        return 1  # Pillow would decode the whole picture to look for EXIF data behind it
    try:
        found: Any = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # noqa: BLE001  # damaged EXIF data do not make a picture unreadable
        return 1
    return found if found in _TURNS else 1
