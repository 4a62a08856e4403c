"""The text of the dataset config for sd-scripts that is written beside a rewritten file."""

from collections.abc import Iterable
from math import gcd, isqrt
from pathlib import Path

from capmerge.commands.latent_files import Evidence
from capmerge.errors import printable
from capmerge.files.compression import without_compression
from capmerge.metadata.format import DATASET
from capmerge.toml import to_toml


def dataset_config(
    target: Path, image_folder: Path, resolutions: Iterable[tuple[int, int]], found: Evidence
) -> str:
    """The text of `OUT.dataset.toml`, a dataset config that sd-scripts reads (`--dataset_config`).

    `resolutions` are the [width, height] in px of the latents of some records, all sides above 0,
    which are used beside legacy files alone. Source of the keys: sd-scripts'
    library/config_util.py, subsets with `metadata_file`.
    """
    sizes = list(resolutions)
    is_legacy = found.files == "legacy" and found.one_size and bool(sizes)
    readable = without_compression(target)
    unzip = (
        f"\n  # sd-scripts does not read {target.suffix} files. Unpack the file first."
        if readable != target
        else ""
    )
    return f"""\
# Use it with sd-scripts like this:
#   --dataset_config {printable(target.name)}{DATASET} --cache_latents --cache_latents_to_disk
# The captions hold one alternative per line, with braces doubled. That is right only with
# enable_wildcard, and without --cache_text_encoder_outputs, which would encode all lines of a
# caption glued together.

[general]
enable_wildcard = true

[[datasets]]
# Latents: {found.files}. Evidence: {found.reason}.
{_buckets(sizes) if is_legacy else _OWN_BUCKETS}
batch_size = 1

  [[datasets.subsets]]{unzip}
  metadata_file = {_toml_path(readable)}
  # The folder that relative image keys start from.
  image_dir = {_toml_path(image_folder)}
"""


_OWN_BUCKETS = """\
# sd-scripts chooses the buckets itself, from the pictures' own sizes. Set resolution, here or by
# --resolution, and if you changed them bucket_reso_steps, min_bucket_reso, max_bucket_reso and
# bucket_no_upscale, to what the latents were cached with. They cannot be read from the metadata.
# resolution =
enable_bucket = true"""


def _buckets(sizes: list[tuple[int, int]]) -> str:
    """The settings beside legacy files, where each of `sizes` is a bucket.

    Without `bucket_no_upscale`, sd-scripts since v0.10 maps sizes onto buckets of its own, and the
    cached latents no longer fit them (observed: 22 of 213 records).
    """
    steps = gcd(64, *(side for size in sizes for side in size))
    largest_side = isqrt(max(width * height for width, height in sizes) - 1) + 1
    return f"""\
# Taken from the first records and rounded up, so that it is not less than what the latents were
# made with.
resolution = {-(-largest_side // 64) * 64}
enable_bucket = true
# Every size is a bucket of its own, as it is for the latents. Delete this line for versions that
# refuse it and take the buckets from train_resolution: up to v0.9.1, and the sd3 branch until
# January 2026.
bucket_no_upscale = true
bucket_reso_steps = {steps}"""


def _toml_path(path: Path) -> str:
    """A path as TOML text, with question marks for bytes that are not UTF-8.

    TOML cannot hold such bytes.
    """
    return to_toml(path.as_posix().encode("utf-8", "replace").decode())
