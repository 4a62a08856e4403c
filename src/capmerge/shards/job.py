"""What a task needs to know to rewrite its shards, and the names of the files that it leaves.

A job is handed to other processes and other machines, so it holds plain values alone.
"""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from capmerge.captions.templates import MergeOptions
from capmerge.commands.merge_blocks import OnError
from capmerge.errors import UsageError, printable
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.metadata.shard_files import MANIFEST, STATISTICS, is_shard
from capmerge.shards.places import Fingerprint, LocalFolder, Place, is_url
from capmerge.stats.collector import Tokenizers

_OWN = ".capmerge"
"""The folder in OUT for all that is neither an output nor for people."""
LOGS, DONE = f"{_OWN}/logs", f"{_OWN}/done"
_LONGEST = 227
"""The bytes of the longest name of a shard: 255, less 28 for the hidden name of its receipt."""


@dataclass(frozen=True, slots=True)
class Job:
    """The rewrite of one shard after the other, by any number of tasks."""

    source: str
    """The folder or the URL of the shards."""
    out: str
    """The folder or the URL of the outputs."""
    merge: MergeOptions
    """The options of the merge, with the default of `image_size` decided."""
    on_error: OnError = "stop"
    stats: Tokenizers | None = None
    max_record_bytes: int = MAX_RECORD_BYTES
    fingerprints: dict[str, Fingerprint] = field(default_factory=dict)
    """The shards as they were when the job was planned."""


@dataclass(frozen=True, slots=True)
class Failure:
    """A shard that could not be rewritten, and why."""

    shard: str
    message: str


def open_place(text: str) -> Place:
    """The place that a path or a URL names. Raises `UsageError` for an unknown kind of URL."""
    if is_url(text):
        from capmerge.shards.urls import UrlFolder

        return UrlFolder(text)
    return LocalFolder(Path(text))


def shard_names(place: Place) -> list[str]:
    """The names of the shards among the files of a place, sorted.

    Raises `UsageError` where there are none, and where one has a name that cannot be kept.
    """
    files = place.files()
    if not any(name.startswith(f"{_OWN}/") for name in files):
        _check_not_taken(place, files)
    found = [name for name in files if is_shard(name)]
    if not found:
        raise UsageError(
            f"{printable(place.name)}: found no shards, expected files that end in .json, .jsonl "
            "or .parquet, the first two also with .gz or .zst behind it. Check the path."
        )
    for name in found:
        size = len(os.fsencode(name.rpartition("/")[2]))
        if size > _LONGEST:
            raise UsageError(
                f"{printable(place.full_name(name))}: found a file name of {size} bytes, expected "
                f"at most {_LONGEST}, as longer names are made from it for the files beside its "
                "output. Rename the shard."
            )
    return found


def _check_not_taken(place: Place, files: dict[str, int]) -> None:
    """Raise `UsageError` where a folder that is not of an earlier run has files like those of one.

    They would be left out as none of the shards.
    """
    for name in (MANIFEST, STATISTICS):
        if name in files:
            raise UsageError(
                f"{printable(place.full_name(name))}: found a file of this name among the shards, "
                "expected none, as a run writes its own file of this name beside the outputs. "
                "Rename it if it is a shard, or else move it out of the folder."
            )


def marker_name(shard: str) -> str:
    """The file whose presence says that a shard is done, with what there is to know of it."""
    return f"{DONE}/{shard}.json"


def keys_name(shard: str) -> str:
    """The file of the hashes of the keys of a shard."""
    return f"{_OWN}/keys/{shard}.u64"


def captions_name(shard: str) -> str:
    """The file of the hashes of the captions of a shard."""
    return f"{_OWN}/captions/{shard}.u64"


def counts_name(shard: str) -> str:
    """The file of the statistics of a shard."""
    return f"{_OWN}/stats/{shard}.json.gz"


def failure_name(shard: str) -> str:
    """The file that says why a shard could not be rewritten."""
    return f"{_OWN}/failed/{shard}.txt"


def as_options(job: Job) -> dict[str, Any]:
    """The options that decide what the outputs hold, as the manifest keeps them."""
    options = asdict(job.merge) | {"on_error": job.on_error}
    options["stats"] = job.stats and {"family": job.stats.family, "tokenizer": job.stats.path}
    return {
        name: list(value) if isinstance(value, tuple) else value for name, value in options.items()
    }
