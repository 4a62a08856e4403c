"""The kind of the cached latents beside a metadata file, and what tells it.

sd-scripts needs other settings beside legacy files than beside new-style ones. The names in a
folder decide where it is given, and the sizes in the records otherwise. Source: sd-scripts-facts F,
and runs of the real code.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from capmerge.captions.tally import Tally
from capmerge.captions.templates import MergeOptions
from capmerge.errors import UsageError, printable

LatentFiles = Literal["legacy", "new-style", "both kinds", "unknown"]
"""Legacy files are named `<stem>.npz`, and new-style files `<stem>_WxH_<model>.npz`."""

_FILES_PER_REPORT = 1 << 14


@dataclass(frozen=True, slots=True)
class LatentNames:
    """How many latents of each kind a folder holds, by their names."""

    folder: Path
    legacy: int
    new_style: int

    @property
    def files(self) -> LatentFiles:
        """The kind of the files."""
        if self.legacy and self.new_style:
            return "both kinds"
        return "new-style" if self.new_style else "legacy"


@dataclass(frozen=True, slots=True)
class Evidence:
    """What kind of latents a rewritten file stands beside, and what tells it."""

    files: LatentFiles
    reason: str
    """A sentence for people."""
    one_size: bool
    """True when every `image_size` in the output is the size of the latents."""


def count_names(folder: Path, progress: Callable[[int], None] | None = None) -> LatentNames:
    """Count the latents in `folder` and below by the kind of their names.

    Cached outputs of text encoders are no latents. `progress` is told how many files were seen.
    Raises `UsageError` for a folder that is missing or holds no latents, and `CapmergeError` for
    one that cannot be listed.
    """
    from capmerge.index.latent_names import is_text_output, parse_sized
    from capmerge.index.latent_scan import iter_latents

    shown = printable(str(folder))
    if not folder.is_dir():
        raise UsageError(
            f"--latents {shown}: there is no such folder. Name the folder of the cached latents."
        )
    legacy = new_style = seen = 0
    for seen, (_, name) in enumerate(iter_latents(str(folder)), start=1):
        if parse_sized(name):
            new_style += 1
        elif not is_text_output(name):
            legacy += 1
        if progress and not seen % _FILES_PER_REPORT:
            progress(seen)
    if progress:
        progress(seen)
    if not legacy and not new_style:
        raise UsageError(
            f"--latents {shown}: found no latents (.npz), expected <stem>.npz or "
            "<stem>_WxH_sdxl.npz. Name the folder of the cached latents, or leave --latents out: "
            "then the sizes in the records decide."
        )
    return LatentNames(folder, legacy, new_style)


def with_image_size(merge: MergeOptions, names: LatentNames | None) -> MergeOptions:
    """The merge options with the default of `image_size` decided: not beside new-style files."""
    if merge.image_size is not None:
        return merge
    return replace(merge, image_size=not names or names.files != "new-style")


def evidence(tally: Tally, names: LatentNames | None, *, image_size: bool) -> Evidence:
    """The evidence of a finished run, whose records are counted in `tally`.

    `image_size` says whether an `image_size` was added where only `train_resolution` was.
    """
    records = tally.rewritten + tally.passed
    latents = records - tally.picture_sizes - tally.without_size
    one_size = image_size and not tally.picture_sizes
    if names:
        counts = f"legacy {names.legacy:,}, new-style {names.new_style:,}"
        return Evidence(names.files, f"names in the folder of latents: {counts}", one_size)
    counts = (
        f"records with only the size of their latents: {latents:,}, "
        f"with the picture's own size: {tally.picture_sizes:,}, "
        f"without a size: {tally.without_size:,}"
    )
    if tally.picture_sizes:
        return Evidence("both kinds" if latents else "new-style", counts, one_size)
    return Evidence("legacy" if latents else "unknown", counts, one_size)
