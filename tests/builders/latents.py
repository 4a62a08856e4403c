"""Files of cached latents for tests, named and laid out as sd-scripts writes them."""

import numpy as np


def arrays_of(width, height, suffix="", *, flipped=False, seed=0):
    """Return the arrays of one resolution, for a bucket of `width` x `height` px."""
    shape = (4, height // 8, width // 8)
    arrays = {
        f"latents{suffix}": np.random.default_rng(seed).standard_normal(shape, np.float32),
        f"original_size{suffix}": np.array([width, height]),
        f"crop_ltrb{suffix}": np.array([0, 0, width, height]),
    }
    if flipped:
        arrays[f"latents_flipped{suffix}"] = arrays[f"latents{suffix}"][:, :, ::-1]
    return arrays


def write_latents(path, *sizes, suffixed=True, **options):
    """Write the latents of buckets of these sizes, given as (width, height), into one file."""
    arrays = {}
    for width, height in sizes:
        suffix = f"_{height // 8}x{width // 8}" if suffixed else ""
        arrays |= arrays_of(width, height, suffix, **options)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)
    return path
