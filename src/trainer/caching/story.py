"""The story of `python -m trainer.cache`: from pictures to latents and to the sizes in metadata."""

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from capmerge import set_fields
from capmerge.errors import printable
from capmerge.files.atomic import AtomicFile
from capmerge.terminal import count_bar
from trainer.caching.buckets import Buckets, SidesWH, buckets_of
from trainer.caching.encoding import Encoder
from trainer.caching.finding import Item, items_of_folder, items_of_metadata
from trainer.caching.latents_file import fingerprint_of
from trainer.caching.places import Places, check_places
from trainer.caching.results import Cached, Results
from trainer.caching.work import RankWork, Rule
from trainer.config.settings import CacheSettings, Config, family_of
from trainer.errors import LatentsError

SKIPPED_FILE = "cache_skipped.jsonl"
"""The list of the pictures without latents, in the folder of the latents."""
_LONGEST_WAIT = timedelta(days=30)
_SECONDS_BETWEEN_LINES = 60


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
    rank, ranks, is_first = state.process_index, state.num_processes, state.is_main_process
    encoder = Encoder(config, state.device)
    suffix = settings.suffix
    if suffix is None:
        suffix = "_sdxl" if family.name == "sdxl" else "_sd"
    buckets = buckets_of(settings, family)
    fingerprint = fingerprint_of(_decisive(settings, buckets, encoder))
    work = RankWork(Rule(settings, buckets, suffix, fingerprint), places, encoder, recache=recache)

    # Rank 0 locks the folder against a second run by the list that it is going to write.
    results = Results(places.output)
    with AtomicFile(places.output / SKIPPED_FILE) if is_first else nullcontext() as skipped:
        if is_first:
            results.begin()
        state.wait_for_everyone()

        # Encode.
        started, done = time.monotonic(), 0
        with _progress(places.output, shown=is_first) as progress:
            for found in work.iter_results(_items(places), rank, ranks):
                results.add(rank, found)
                done += len(found)
                progress(done)
        state.wait_for_everyone()
        seconds = time.monotonic() - started

        # Rank 0 lists what was skipped, and writes the metadata.
        if skipped is not None:
            counts = _list_skipped(results, skipped)
            if counts.encoded + counts.kept == 0:
                raise LatentsError(_none_made(places, counts))
            if places.metadata and places.metadata_output:
                _write_metadata(
                    places.metadata, places.metadata_output, results, suffix, force=force
                )
            results.remove()
            _tell(counts, seconds, places, settings)
    state.wait_for_everyone()
    if ranks > 1:
        state.destroy_process_group()


def _decisive(settings: CacheSettings, buckets: Buckets, encoder: Encoder) -> dict[str, Any]:
    """Everything that decides the latents of a picture, besides the picture and rounding."""
    return {
        "vae": [encoder.fingerprint, settings.vae_precision],
        "buckets": [buckets.resolution, buckets.step],
        "limits": [buckets.least, buckets.most] if buckets.upscale else None,
        "picture": [settings.exif_rotation, settings.alpha_mask, settings.flip],
        "latents": [settings.latents, settings.seed if settings.latents == "sample" else None],
        "dtype": settings.dtype,
    }


def _items(places: Places) -> Iterator[Item]:
    """Everything that is asked for, in the same order on every rank."""
    if places.metadata is None:
        return items_of_folder(places.images)
    return items_of_metadata(places.metadata)


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
    """Write the list of the pictures without latents, if there are any, and count all pictures."""
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
    if counts.skipped:
        target.publish()
    else:
        target.target.unlink(missing_ok=True)
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


def _write_metadata(
    source: Path, target: Path, results: Results, suffix: str, *, force: bool
) -> None:
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
