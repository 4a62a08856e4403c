"""Where a run of `trainer.cache` reads and writes, checked before any work."""

from pathlib import Path
from typing import NamedTuple

from capmerge.errors import printable
from trainer.config.settings import CacheSettings
from trainer.errors import ConfigError


class Places(NamedTuple):
    """Where everything lies that is read or written."""

    images: Path
    output: Path
    """The folder of the latents."""
    metadata: Path | None
    metadata_output: Path | None
    """None if there is no metadata."""


def check_places(settings: CacheSettings, name: str, *, force: bool) -> Places:
    """The places that `[cache]` of the config called `name` asks for.

    The folder of the latents is made if it is missing. Raises `ConfigError` for what is missing
    else, and for an output that is there already, unless `force`.
    """
    images = Path(settings.images)
    if not settings.images:
        raise ConfigError(
            f"{name}: found no `cache.images`, expected the folder of the pictures. "
            'Add images = "..." to [cache].'
        )
    if not images.is_dir():
        raise ConfigError(
            f"cache.images: {printable(settings.images)} is no folder, expected that of the "
            "pictures. Set cache.images."
        )
    output = Path(settings.output or images)
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cache.output: {printable(str(output))} cannot be made ({error.strerror}), expected a "
            "folder for the latents. Set cache.output."
        ) from error
    if not settings.metadata:
        return Places(images, output, None, None)
    metadata = Path(settings.metadata)
    return Places(images, output, metadata, _metadata_output(settings, metadata, force=force))


def _metadata_output(settings: CacheSettings, metadata: Path, *, force: bool) -> Path:
    """Where to write the new metadata; raises `ConfigError` where that cannot be done."""
    if not metadata.is_file():
        raise ConfigError(
            f"cache.metadata: {printable(settings.metadata)} is no file, expected metadata whose "
            "keys name the pictures. Set cache.metadata, or remove it to take all pictures."
        )
    stem, dot, endings = metadata.name.partition(".")
    target = Path(settings.metadata_output or metadata.with_name(f"{stem}_lat{dot}{endings}"))
    shown = f"cache.metadata_output: {printable(str(target))}"
    if target.exists() and target.samefile(metadata):
        raise ConfigError(
            f"{shown} is cache.metadata itself, which is never written to. Set another name."
        )
    if target.exists() and not force:
        raise ConfigError(f"{shown} exists. Give --force to replace it, or set another name.")
    if _is_json_lines(target) != _is_json_lines(metadata):
        raise ConfigError(
            f"{shown} does not end as cache.metadata does, expected the same kind of file: .json "
            "or .jsonl. Set another name."
        )
    if not target.parent.is_dir():
        raise ConfigError(f"{shown} is in a folder that does not exist. Make the folder first.")
    return target


def _is_json_lines(path: Path) -> bool:
    return ".jsonl" in [ending.lower() for ending in path.suffixes[-2:]]
