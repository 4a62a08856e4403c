"""The work of one rank: it looks pictures up, reads and encodes them, and writes their latents.

Pictures are taken in windows of consecutive items, and in a window those of one bucket are encoded
together. A rank has every n-th window, so the batches, and with them every bit of the latents, do
not depend on the number of ranks. Threads read and write, some batches ahead of the VAE.
"""

import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from capmerge.errors import BusyError
from trainer.caching.buckets import Buckets, Placed, SidesWH, crop_of
from trainer.caching.encoding import DTYPE_NAMES, Encoder
from trainer.caching.finding import Found, Item, PictureFolder
from trainer.caching.latents_file import Encoded, file_name, is_finished, write_latents
from trainer.caching.pictures import MOST_PIXELS, Header, PictureError, read_header, read_pixels
from trainer.caching.places import Places
from trainer.caching.resize import Pixels, fit_to_bucket
from trainer.caching.results import Cached, Result, Skipped
from trainer.config.settings import CacheSettings
from trainer.errors import ConfigError, LatentsError

_WINDOW_BATCHES = 32


class Rule(NamedTuple):
    """What decides the latents of a picture, and the name of their file."""

    cache: CacheSettings
    buckets: Buckets
    suffix: str
    """The end of the names."""
    fingerprint: str
    """It stands for all settings that decide the latents."""


class _Picture(NamedTuple):
    """A picture that has a bucket."""

    item: Item
    found: Found
    header: Header
    placed: Placed
    target: Path
    """Its latents file."""
    is_finished: bool

    @property
    def sides(self) -> SidesWH:
        return self.header.width, self.header.height

    @property
    def result(self) -> Cached:
        """What became of the picture once it has latents."""
        number, is_new = self.item.number, not self.is_finished
        return Cached(number, self.sides, self.placed.bucket, is_new, self.header.is_turned)


class _Batch(NamedTuple):
    pictures: list[_Picture]
    pixels: list[Future[Pixels | PictureError]]


class _WindowEnd(NamedTuple):
    results: dict[int, Result]
    """What is known before the pictures are read, by the numbers of the items."""


class RankWork:
    """The work of one rank; with `recache`, files that others made are replaced."""

    def __init__(self, rule: Rule, places: Places, encoder: Encoder, *, recache: bool) -> None:
        self._rule, self._cache = rule, rule.cache
        self._folder, self._places = PictureFolder(places.images), places
        self._encoder, self._recache = encoder, recache
        self._threads = ThreadPoolExecutor(rule.cache.workers, "pictures")
        self._writes: list[Future[None]] = []

    def iter_results(self, items: Iterable[Item], rank: int, ranks: int) -> Iterator[list[Result]]:
        """Make the latents of this rank's share of the items.

        Yields the results of each window, in the order of the items, when its files are on disk.
        Raises `LatentsError` for a file of others and for latents that are not finite,
        `OutputError` when one cannot be written, and what `items` raises.
        """
        failed: dict[int, Result] = {}
        try:
            for step in self._ahead(self._steps(items, rank, ranks)):
                if isinstance(step, _Batch):
                    failed |= self._encode(step)
                else:
                    for write in self._writes:
                        write.result()
                    self._writes.clear()
                    yield list((step.results | failed).values())
                    failed.clear()
        finally:
            self._threads.shutdown(cancel_futures=True)

    def _ahead(self, steps: Iterator[_Batch | _WindowEnd]) -> Iterator[_Batch | _WindowEnd]:
        """The steps, of which so many are made ahead that every thread has two pictures to read."""
        made: deque[_Batch | _WindowEnd] = deque()
        most = -(-2 * self._cache.workers // self._cache.batch_size)
        with warnings.catch_warnings():
            # Of damaged EXIF data, and of half of the largest number of pixels.
            warnings.filterwarnings("ignore", module=r"PIL\.")
            for step in steps:
                made.append(step)
                if len(made) > most:
                    yield made.popleft()
            yield from made

    def _steps(self, items: Iterable[Item], rank: int, ranks: int) -> Iterator[_Batch | _WindowEnd]:
        """The batches of this rank, whose pictures are being read, and the ends of its windows."""
        every, size = iter(items), _WINDOW_BATCHES * self._cache.batch_size
        number = 0
        while window := list(islice(every, size)):
            if number % ranks == rank:
                looked = list(self._threads.map(self._look, window))
                pictures = [one for one in looked if isinstance(one, _Picture)]
                for batch in self._batches(pictures):
                    yield _Batch(batch, [self._threads.submit(self._read, one) for one in batch])
                results = [one.result if isinstance(one, _Picture) else one for one in looked]
                yield _WindowEnd({one.number: one for one in results})
            number += 1

    def _batches(self, pictures: list[_Picture]) -> Iterator[list[_Picture]]:
        """The pictures by buckets, without the batches that are finished.

        A batch of which some are finished is encoded as a whole, so that the others get the same
        bits as in a run that was not interrupted.
        """
        by_bucket: dict[SidesWH, list[_Picture]] = {}
        for picture in pictures:
            by_bucket.setdefault(picture.placed.bucket, []).append(picture)
        size = self._cache.batch_size
        for those in by_bucket.values():
            for start in range(0, len(those), size):
                batch = those[start : start + size]
                if not all(picture.is_finished for picture in batch):
                    yield batch

    # In threads: look a picture up, read it, and write its latents.

    def _look(self, item: Item) -> _Picture | Skipped:
        """Find a picture, its bucket, and its latents if they are there."""
        if item.problem:
            return Skipped(*item)
        try:
            found = self._folder.find(item.key)
            header = read_header(found.path, exif_rotation=self._cache.exif_rotation)
            sides = header.width, header.height
            placed = self._rule.buckets.place(*sides)
        except (PictureError, ValueError) as error:
            return Skipped(item.number, item.key, str(error))
        if placed.resized[0] * placed.resized[1] > MOST_PIXELS:
            reason = f"{sides[0]} x {sides[1]} px is too narrow for any bucket"
            return Skipped(item.number, item.key, reason)
        if found.is_absolute and self._places.output != self._places.images:
            raise ConfigError(
                f"cache.output: found {self._places.output}, but keys are absolute paths, whose "
                "latents lie beside the pictures. Remove cache.output."
            )
        target = self._places.output / file_name(found.stem, sides, self._rule.suffix)
        try:
            finished = is_finished(target, self._mark(header))
        except LatentsError:
            if not self._recache:
                raise
            finished = False
        return _Picture(item, found, header, placed, target, finished)

    def _mark(self, header: Header) -> str:
        return f"{self._rule.fingerprint} {header.n_bytes}"

    def _read(self, picture: _Picture) -> Pixels | PictureError:
        """The pixels at the size of the bucket, or why there are none."""
        try:
            pixels = read_pixels(
                picture.found.path,
                exif_rotation=self._cache.exif_rotation,
                alpha=self._cache.alpha_mask,
            )
        except PictureError as error:
            return error
        if pixels.shape[1::-1] != picture.sides:
            return PictureError("its size has changed while it was read")
        return fit_to_bucket(pixels, picture.placed)

    def _write(self, picture: _Picture, pixels: Pixels, arrays: dict[str, NDArray[Any]]) -> None:
        mask = None
        if self._cache.alpha_mask:
            mask = pixels[..., 3].astype(np.float32) / np.float32(255)
        crop = crop_of(picture.placed.bucket, *picture.sides)
        dtype = DTYPE_NAMES[self._cache.dtype]
        if self._places.output != self._places.images:
            picture.target.parent.mkdir(parents=True, exist_ok=True)
        encoded = Encoded(arrays, dtype, picture.sides, crop, mask)
        # Another key of the same picture may have its latents written at this moment.
        with suppress(BusyError):
            write_latents(picture.target, encoded, self._mark(picture.header))

    # In the main thread: the VAE.

    def _encode(self, batch: _Batch) -> dict[int, Result]:
        """Encode a batch and hand its latents to the threads; the pictures that are damaged."""
        failed: dict[int, Result] = {}
        read: list[tuple[_Picture, Pixels]] = []
        for picture, future in zip(*batch, strict=True):
            pixels = future.result()
            if isinstance(pixels, PictureError):
                number, key, _ = picture.item
                failed[number] = Skipped(number, key, str(pixels))
            else:
                read.append((picture, pixels))
        if read:
            made = self._encoder.encode(
                [pixels[..., :3] for _, pixels in read], [picture.found.stem for picture, _ in read]
            )
            self._writes += [
                self._threads.submit(self._write, picture, pixels, arrays)
                for (picture, pixels), arrays in zip(read, made, strict=True)
                if not picture.is_finished
            ]
        return failed
