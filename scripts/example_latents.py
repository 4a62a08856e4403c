#!/usr/bin/env python3
"""Write `examples/latents`: made-up cached latents for the records of `examples/meta_lat.json`.

.venv/bin/python scripts/example_latents.py [FOLDER]

Equal versions of numpy give equal bytes. The files are laid out as sd-scripts caches latents, which
it does not scale. They hold smooth noise whose standard deviation is 1 when it is multiplied by the
scale factor of SD 1, so the tiny configs of all families train on them. sd-scripts stores floats
with all their bits; here they keep three bits of the mantissa, which compresses to a third.

The names and contents vary as they do in real caches:

- Most files are `<stem>.npz`. Every tenth has the original size in its name, as sd-scripts writes
  it since v0.10, and in every seventeenth the latent size follows the name of each array.
- All have `latents_flipped`, and every fourth picture of `photos` has an `alpha_mask`.
"""

import hashlib
import json
import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
SCALE = 0.18215
KEPT_BITS = 3
SMOOTHING = (0.6, 0.8, 0.9)
"""Share of each coarser level of noise, by factors of 2, 4 and 8."""


def latents_of(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Unscaled latents of shape (4, height, width), with few bits each."""
    values = 0.5 * rng.standard_normal((4, height, width))
    for level, share in enumerate(SMOOTHING, 1):
        side = 2**level
        coarse = rng.standard_normal((4, height // side + 2, width // side + 2))
        rows, columns = ((np.arange(size) / side) for size in (height, width))
        values += share * _between(_between(coarse, rows, 1), columns, 2)
    values = (values - values.mean()) / values.std() / SCALE
    cut = 23 - KEPT_BITS
    bits = values.astype(np.float32).view(np.uint32) + np.uint32(1 << (cut - 1))
    return (bits >> np.uint32(cut) << np.uint32(cut)).view(np.float32)


def _between(
    values: NDArray[np.float64], places: NDArray[np.float64], axis: int
) -> NDArray[np.float64]:
    """`values`, interpolated linearly at fractional positions along one axis."""
    first = places.astype(int)
    share = np.expand_dims(places - first, tuple(other for other in range(3) if other != axis))
    return np.take(values, first, axis) * (1 - share) + np.take(values, first + 1, axis) * share


def alpha_mask_of(height: int, width: int) -> NDArray[np.float32]:
    """A mask of (height, width) px: 1 inside an ellipse, and a quarter around it."""
    y, x = np.mgrid[0:height, 0:width]
    inside = ((y + 0.5) / height * 2 - 1) ** 2 + ((x + 0.5) / width * 2 - 1) ** 2 <= 1
    return np.where(inside, 1, 0.25).astype(np.float32)


def write(folder: Path, number: int, key: str, width: int, height: int) -> None:
    """Write the file of record `number`, whose bucket is `width` x `height` px."""
    rng = np.random.default_rng(list(hashlib.blake2b(key.encode(), digest_size=16).digest()))
    latents = latents_of(rng, height // 8, width // 8)
    original_width = int(width * rng.uniform(3, 5))
    original_height = int(height * rng.uniform(3, 5))
    # The picture was scaled to cover the bucket, and its middle cut out. Source: sd-scripts,
    # BucketManager.get_crop_ltrb.
    ratio = original_width / original_height
    scaled_width, scaled_height = (
        (height * ratio, height) if width / height > ratio else (width, width / ratio)
    )
    left, top = (width - scaled_width) // 2, (height - scaled_height) // 2
    arrays = {
        "latents": latents,
        "original_size": np.array([original_width, original_height]),
        "crop_ltrb": np.array([left, top, left + scaled_width, top + scaled_height]),
        "latents_flipped": np.ascontiguousarray(latents[:, :, ::-1]),
    }
    if key.startswith("photos/") and number % 4 == 0:
        arrays["alpha_mask"] = alpha_mask_of(height, width)
    suffix = f"_{height // 8}x{width // 8}" if number % 17 == 0 else ""
    ending = f"_{original_width:04d}x{original_height:04d}_sdxl" if number % 10 == 0 else ""
    path = folder / f"{key}{ending}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(
        path, allow_pickle=False, **{name + suffix: array for name, array in arrays.items()}
    )


def main() -> None:
    """Write all files."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "examples" / "latents"
    records = json.loads((ROOT / "examples" / "meta_lat.json").read_text(encoding="utf-8"))
    for number, (key, record) in enumerate(records.items()):
        write(folder, number, key, *record["train_resolution"])
    sizes = [path.stat().st_size for path in folder.rglob("*.npz")]
    print(f"{folder}: {len(sizes)} files, {sum(sizes):,} bytes")


if __name__ == "__main__":
    main()
