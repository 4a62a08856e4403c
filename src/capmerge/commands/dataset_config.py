"""The dataset config for sd-scripts that lies beside a rewritten file."""

from collections.abc import Iterable
from math import gcd, isqrt
from pathlib import Path

from capmerge.errors import printable
from capmerge.metadata.format import DATASET
from capmerge.toml import to_toml


def dataset_config(target: Path, image_folder: Path, resolutions: Iterable[tuple[int, int]]) -> str:
    """The text of `OUT.dataset.toml`: a dataset config that sd-scripts reads (`--dataset_config`).

    `resolutions` are the [width, height] in px of some records, all sides above 0. Without
    `bucket_no_upscale`, sd-scripts since v0.10 maps sizes onto buckets of its own, and the cached
    latents no longer fit them (observed: 22 of 213 records). Keys: sd-scripts'
    library/config_util.py, subsets with `metadata_file`.
    """
    sizes = list(resolutions) or [(1024, 1024)]
    steps = gcd(64, *(side for size in sizes for side in size))
    largest_side = isqrt(max(width * height for width, height in sizes) - 1) + 1
    readable = target.with_suffix("") if target.suffix == ".gz" else target
    unzip = "\n  # sd-scripts does not read .gz: unzip it first." if readable != target else ""
    return f"""\
# For sd-scripts: --dataset_config {printable(target.name)}{DATASET} --cache_latents --cache_latents_to_disk
# The captions hold one alternative a line, with braces doubled. That is right only with enable_wildcard, and without
# --cache_text_encoder_outputs (it would encode all lines of a caption glued together).

[general]
enable_wildcard = true

[[datasets]]
# From the first records, rounded up: not less than what the latents were made with.
resolution = {-(-largest_side // 64) * 64}
enable_bucket = true
# Every size is its own bucket, as the latents are. Delete this line for sd-scripts up to v0.9.1: it refuses it, and
# takes the buckets from train_resolution.
bucket_no_upscale = true
bucket_reso_steps = {steps}
batch_size = 1

  [[datasets.subsets]]{unzip}
  metadata_file = {_toml_path(readable)}
  # The folder that relative image keys start from.
  image_dir = {_toml_path(image_folder)}
"""


def _toml_path(path: Path) -> str:
    """A path as TOML text, with question marks for bytes that are no UTF-8: TOML cannot hold them."""
    return to_toml(path.as_posix().encode("utf-8", "replace").decode())
