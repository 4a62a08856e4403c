"""What lies beside a rewritten file: the receipt that later commands read, and a dataset config for sd-scripts."""

import json
from collections.abc import Iterable
from dataclasses import asdict
from math import isqrt
from pathlib import Path
from typing import Any

import capmerge
from capmerge.errors import DataError, UsageError, printable
from capmerge.output import side_path
from capmerge.tally import Tally
from capmerge.templates import MergeOptions

REJECTS, RECEIPT, DATASET = ".rejects.jsonl", ".capmerge.json", ".dataset.toml"
"""What is added to the output's name for its side files."""


def receipt(source: str, fingerprint: dict[str, Any], merge: MergeOptions, on_error: str, tally: Tally) -> str:
    """The text of `OUT.capmerge.json`: how OUT was made, for `verify` and for whoever finds it in a year."""
    content = {
        "version": capmerge.__version__,
        "source": {"name": source, **fingerprint},
        "options": {**asdict(merge), "on_error": on_error},
        "templates": [asdict(template) for template in merge.templates()],
        "counts": tally.as_dict(),
    }
    return json.dumps(content, indent=2) + "\n"


def load_receipt(target: Path) -> tuple[MergeOptions, bool]:
    """The merge options of the run that wrote `target`, and whether it left out records that cannot be merged.

    Raises `UsageError` when there is no receipt, `DataError` when it cannot be read.
    """
    path = side_path(target, RECEIPT)
    try:
        options = json.loads(path.read_text(encoding="utf-8"))["options"]
        skips = options.pop("on_error") == "skip"
        return MergeOptions(**{**options, "lines": tuple(options["lines"])}), skips
    except FileNotFoundError as error:
        raise UsageError(
            f"{printable(str(path))}: no such file. It says how the output was made; else give the options of the rewrite."
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            str(path), None, None, f"the file is no receipt of capmerge ({error}).", "Give the options of the rewrite instead."
        ) from error


def dataset_config(target: Path, resolutions: Iterable[tuple[int, int]]) -> str:
    """The text of `OUT.dataset.toml`: a dataset config that sd-scripts reads (`--dataset_config`).

    `resolutions` are the [width, height] in px of some records; the training resolution is guessed from their largest.
    Keys: sd-scripts' library/config_util.py, subsets with `metadata_file`.
    """
    sizes = list(resolutions) or [(1024, 1024)]
    side = max(64, (isqrt(max(width * height for width, height in sizes)) + 32) // 64 * 64)
    return f"""\
# For sd-scripts: --dataset_config {printable(target.name)}{DATASET}
# The captions hold one alternative a line, with braces doubled. That is right only with enable_wildcard, and without
# --cache_text_encoder_outputs (it would encode all lines of a caption glued together).

[general]
enable_wildcard = true

[[datasets]]
# Guessed from the first records: give what the latents were made with.
resolution = {side}
enable_bucket = true
min_bucket_reso = {min(256, *(min(size) for size in sizes))}
max_bucket_reso = {max(side, *(max(size) for size in sizes))}
bucket_reso_steps = 64
batch_size = 1

  [[datasets.subsets]]
  metadata_file = {_toml(target.as_posix())}
  # The folder that the image keys are relative to.
  image_dir = {_toml(target.parent.as_posix())}
"""


def _toml(text: str) -> str:
    """`text` as a TOML string; bytes of a file name that are no UTF-8, which TOML cannot hold, become question marks."""
    return json.dumps(text.encode("utf-8", "replace").decode(), ensure_ascii=False).replace("\x7f", "\\u007f")
