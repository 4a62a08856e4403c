"""A picture at the size of its bucket, as sd-scripts resizes and crops it.

Pictures that shrink are averaged over areas, as OpenCV's INTER_AREA does; others are resized by
Pillow's Lanczos filter. Source: `resize_image` in sd-scripts' library/utils.py, and
`trim_and_resize_if_required` in its library/train_util.py.
"""

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.caching.buckets import Placed

Pixels = NDArray[np.uint8]
"""(height, width, channels)."""


def fit_to_bucket(pixels: Pixels, placed: Placed) -> Pixels:
    """The pixels resized to cover the bucket, and the middle of them that it shows."""
    height, width = pixels.shape[:2]
    if (width, height) != placed.resized:
        pixels = _resized(pixels, *placed.resized)
    for axis, side in ((1, placed.bucket[0]), (0, placed.bucket[1])):
        spare = pixels.shape[axis] - side
        pixels = np.take(pixels, range(spare // 2, spare // 2 + side), axis) if spare else pixels
    return np.ascontiguousarray(pixels)


def _resized(pixels: Pixels, width: int, height: int) -> Pixels:
    if pixels.shape[1] < width or pixels.shape[0] < height:
        image = Image.fromarray(pixels).resize((width, height), Image.Resampling.LANCZOS)
        return np.asarray(image)
    return shrink(pixels, width, height)


def shrink(pixels: Pixels, width: int, height: int) -> Pixels:
    """The mean of the part of the picture that each new pixel covers, to fractions of old pixels.

    Against OpenCV's INTER_AREA, no value differs by more than 1. Pillow has no such filter: its box
    filter takes whole pixels alone, and differs by up to 154 on noise.
    """
    is_half = pixels.shape[0] == 2 * height and pixels.shape[1] == 2 * width
    means = _means(_means(pixels, 0, height), 1, width)
    # OpenCV halves with whole numbers, and rounds a half up there, else to the even neighbour.
    rounded = np.floor(means + np.float32(0.5)) if is_half else np.rint(means)
    return rounded.astype(np.uint8)


def _means(values: NDArray[np.generic], axis: int, n_new: int) -> NDArray[np.float32]:
    """The values along an axis as `n_new` means of equal parts of it."""
    n_old = values.shape[axis]
    if n_new == n_old:
        return values.astype(np.float32)
    # A part begins and ends inside of an old pixel, of which it takes a share.
    ends = np.arange(n_new + 1) * n_old / n_new
    first = ends[:-1].astype(int)
    total: NDArray[np.float32] | None = None
    for step in range(-(-n_old // n_new) + 1):
        taken = first + step
        shares = np.minimum(ends[1:], taken + 1) - np.maximum(ends[:-1], taken)
        shares = np.maximum(shares, 0) * n_new / n_old
        if not shares.any():
            continue
        part = np.take(values, np.minimum(taken, n_old - 1), axis).astype(np.float32)
        part *= shares.astype(np.float32).reshape([-1 if one == axis else 1 for one in range(3)])
        total = part if total is None else np.add(total, part, out=total)
    assert total is not None
    return total
