"""The story of `python -m trainer.cache`: from pictures to latents and to the sizes in metadata."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import PartialState

from capmerge import set_fields
from capmerge.errors import printable
from capmerge.files.atomic import AtomicFile
from capmerge.terminal import count_bar
from trainer.caching.buckets import SidesWH, buckets_of
from trainer.caching.encoding import Encoder
from trainer.caching.finding import Item, PictureFolder, items_of_folder, items_of_metadata
from trainer.caching.latents_file import fingerprint_of
from trainer.caching.results import Cached, Results
from trainer.caching.work import RankWork
from trainer.config.settings import CacheSettings, Config, family_of
from trainer.errors import ConfigError, LatentsError

SKIPPED_FILE = "cache_skipped.jsonl"
"""The list of the pictures without latents, in the folder of the latents."""
_LONGEST_WAIT = timedelta(days=30)
_SECONDS_BETWEEN_LINES = 60


class Places(NamedTuple):
    """Where everything lies that is read or written."""

    images: Path
    output: Path
    metadata: Path | None
    metadata_output: Path | None
    """None if there is no metadata."""


@dataclass
class Counts:
    """What became of the pictures of all ranks."""

    encoded: int = 0
    kept: int = 0
    """Latents that an earlier run made."""
    skipped: int = 0
    turned: int = 0
    """Pictures that EXIF data turn, though the settings do not."""


def cache(config: Config, name: str, *, force: bool, recache: bool) -> None:
    """Make the latents of all pictures that the config, called `name`, asks for, and tell about it.

    Every rank calls it. `force` replaces `cache.metadata_output`, `recache` latents that other
    settings or programs made. Raises `ConfigError`, `ModelError`, `LatentsError` and the errors of
    `capmerge.errors`; then the latents that are finished stay, and no metadata are written.
    """
    # Check the settings, and learn which rank this is.
    settings, family = config.cache, family_of(config.model)
    places = check_places(settings, name, force=force)
    state = PartialState(cpu=not torch.accelerator.is_available(), timeout=_LONGEST_WAIT)
    suffix = settings.suffix
    if suffix is None:
        suffix = "_sdxl" if family.name == "sdxl" else "_sd"
    encoder = Encoder(config, state.device)
    fingerprint = fingerprint_of(_decisive(settings, encoder.fingerprint, family.side_px))
    results = Results(places.output)

    # Encode. The list of rank 0 locks the folder against a second run.
    with AtomicFile(places.output / SKIPPED_FILE) if state.is_main_process else _nothing() as list_:
        if state.is_main_process:
            results.begin()
        state.wait_for_everyone()
        work = RankWork(
            settings,
            (PictureFolder(places.images), places.output),
            buckets_of(settings, family),
            suffix,
            encoder,
            fingerprint,
            recache=recache,
        )
        started = time.monotonic()
        with _progress(places.output, shown=state.is_main_process) as progress:
            work.run(
                _items(places),
                state.process_index,
                state.num_processes,
                lambda found: results.add(state.process_index, found),
                progress,
            )
        state.wait_for_everyone()
        seconds = time.monotonic() - started

        # Rank 0 lists what was skipped, and writes the metadata.
        if list_ is not None:
            counts = _list_skipped(results, list_)
            if counts.encoded + counts.kept == 0:
                raise LatentsError(_none_made(places, counts))
            if counts.skipped:
                list_.publish()
            else:
                list_.target.unlink(missing_ok=True)
            if places.metadata and places.metadata_output:
                _write_metadata(places.metadata, places.metadata_output, results, suffix, force)
            results.remove()
            _tell(counts, seconds, places, settings)
    state.wait_for_everyone()
    if state.num_processes > 1:
        state.destroy_process_group()


def check_places(settings: CacheSettings, name: str, *, force: bool) -> Places:
    """The places that `[cache]` names; the folder of the latents is made if it is missing.

    Raises `ConfigError` for what is missing, or is there and would be replaced without `force`.
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
    if not metadata.is_file():
        raise ConfigError(
            f"cache.metadata: {printable(settings.metadata)} is no file, expected metadata whose "
            "keys name the pictures. Set cache.metadata, or remove it to take all pictures."
        )
    stem, dot, endings = metadata.name.partition(".")
    target = Path(settings.metadata_output or metadata.with_name(f"{stem}_lat{dot}{endings}"))
    shown = f"cache.metadata_output: {printable(str(target))}"
    if target.exists() and not force:
        raise ConfigError(f"{shown} exists. Give --force to replace it, or set another name.")
    if _is_json_lines(target) != _is_json_lines(metadata):
        raise ConfigError(
            f"{shown} does not end as cache.metadata does, expected the same kind of file: .json "
            "or .jsonl. Set another name."
        )
    if not target.parent.is_dir():
        raise ConfigError(f"{shown} is in a folder that does not exist. Make the folder first.")
    return Places(images, output, metadata, target)


def _is_json_lines(path: Path) -> bool:
    return ".jsonl" in [ending.lower() for ending in path.suffixes[-2:]]


def _decisive(settings: CacheSettings, vae: str, side_px: int) -> dict[str, object]:
    """Everything that decides the latents of a picture, besides the picture and rounding."""
    names = (
        "vae_precision",
        "bucket_steps",
        "upscale",
        "exif_rotation",
        "alpha_mask",
        "flip",
        "latents",
        "dtype",
    )
    decisive: dict[str, object] = {name: getattr(settings, name) for name in names}
    decisive |= {"vae": vae, "resolution": settings.resolution or side_px}
    if settings.upscale:
        decisive |= {"least": settings.bucket_min, "most": settings.bucket_max}
    if settings.latents == "sample":
        decisive["seed"] = settings.seed
    return decisive


def _items(places: Places) -> Iterator[Item]:
    """Everything that is asked for, in the same order on every rank."""
    if places.metadata is None:
        return items_of_folder(places.images)
    return items_of_metadata(places.metadata)


@contextmanager
def _nothing() -> Iterator[None]:
    yield None


@contextmanager
def _progress(output: Path, *, shown: bool) -> Iterator[Callable[[int], None]]:
    """Show the pictures of rank 0 on a terminal as a bar, elsewhere as a line each minute."""
    with count_bar(output, quiet=not shown) as bar:
        started = said = time.monotonic()

        def progress(done: int) -> None:
            nonlocal said
            if bar:
                bar(done)
            elif shown and time.monotonic() - said > _SECONDS_BETWEEN_LINES:
                said = time.monotonic()
                rate = done / (said - started)
                print(f"rank 0: {done:,} pictures, {rate:.1f} per second", file=sys.stderr)

        yield progress


def _list_skipped(results: Results, target: AtomicFile) -> Counts:
    """Write the pictures without latents to the list, and count all of them."""
    counts = Counts()
    for result in results.read():
        if isinstance(result, Cached):
            counts.encoded += result.is_new
            counts.kept += not result.is_new
            counts.turned += result.is_turned
        else:
            counts.skipped += 1
            line = {"key": result.key, "reason": result.reason}
            target.write(json.dumps(line).encode() + b"\n")
    return counts


def _none_made(places: Places, counts: Counts) -> str:
    shown = printable(str(places.images))
    if not counts.skipped:
        return f"{shown}: found no pictures, expected some. Set cache.images or cache.metadata."
    return (
        f"{shown}: none of {counts.skipped:,} pictures has latents, expected at least one. "
        f"{printable(str(places.output / SKIPPED_FILE))} says why. Check cache.images: keys are "
        "paths below it, with the extension of the picture or without."
    )


def _write_metadata(source: Path, target: Path, results: Results, suffix: str, force: bool) -> None:
    """Copy the metadata with the sizes of every picture that has latents.

    `train_resolution` is the bucket. `image_size` is the size of the picture, from which sd-scripts
    builds the names of the latents; beside the old names without a size it is the bucket too,
    because sd-scripts takes the bucket from it (sd-scripts-facts A4).
    """
    every = results.read()

    def fields_of(number: int, key: str) -> dict[str, list[int]] | None:
        result = next(every, None)
        if result is None or result.number != number:
            raise LatentsError(
                f"{printable(str(source))}: record {number:,}, {printable(key)}, was not there "
                "before, expected the same file. Run again when nothing writes to the file."
            )
        if not isinstance(result, Cached):
            return None
        own: SidesWH = result.original if suffix else result.bucket
        return {"train_resolution": list(result.bucket), "image_size": list(own)}

    set_fields(source, target, fields_of, force=force)


def _tell(counts: Counts, seconds: float, places: Places, settings: CacheSettings) -> None:
    """Print what was done, and what the user should know about it."""
    rows = {
        "pictures encoded": f"{counts.encoded:,}",
        "kept": f"{counts.kept:,}",
        "skipped": f"{counts.skipped:,}",
        "seconds": f"{seconds:.1f}",
        "pictures per second": f"{counts.encoded / seconds:.1f}",
    }
    for label, value in rows.items():
        print(f"{label:<19}{value:>10}")
    print(f"latents: {printable(str(places.output))}")
    if places.metadata_output:
        print(f"metadata: {printable(str(places.metadata_output))}")
    if counts.skipped:
        listed = printable(str(places.output / SKIPPED_FILE))
        print(f"note: {counts.skipped:,} pictures have no latents; {listed} says why.")
    if counts.turned and not settings.exif_rotation:
        print(
            f"note: {counts.turned:,} pictures are turned by their EXIF data alone, which is "
            "ignored, as in sd-scripts. cache.exif_rotation = true turns them."
        )
    if settings.dtype != "fp32":
        print(f"note: sd-scripts does not read latents in {settings.dtype}, this trainer does.")
