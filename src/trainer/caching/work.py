"""The work of one rank: it looks pictures up, reads and encodes them, and writes their latents.

Pictures are taken in windows of consecutive items, and in a window those of one bucket are encoded
together. A rank has every n-th window, so the batches, and with them every bit of the latents, do
not depend on the number of ranks. Threads read and write, some batches ahead of the VAE.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.caching.buckets import Buckets, Placed, crop_of
from trainer.caching.encoding import DTYPE_NAMES, Encoder
from trainer.caching.finding import Found, Item, PictureFolder
from trainer.caching.latents_file import Encoded, file_name, is_finished, write_latents
from trainer.caching.pictures import MOST_PIXELS, Header, PictureError, read_header, read_pixels
from trainer.caching.resize import fit_to_bucket
from trainer.caching.results import Cached, Result, Skipped
from trainer.config.settings import CacheSettings
from trainer.errors import ConfigError, LatentsError

_WINDOW_BATCHES = 32


class Picture(NamedTuple):
    """A picture that has a bucket."""

    item: Item
    found: Found
    header: Header
    placed: Placed
    target: Path
    """Its latents file."""
    is_finished: bool

    @property
    def result(self) -> Cached:
        """What became of the picture once it has latents."""
        return Cached(
            self.item.number,
            (self.header.width, self.header.height),
            self.placed.bucket,
            not self.is_finished,
            self.header.is_turned,
        )


class _Batch(NamedTuple):
    pictures: list[Picture]
    pixels: "list[Future[NDArray[np.uint8] | PictureError]]"


class _End(NamedTuple):
    """The end of a window, with the results that are known before its pictures are read."""

    results: dict[int, Result]


class RankWork:
    """The work of one rank. `fingerprint` stands for all settings that decide the latents.

    With `recache`, files that others made are replaced.
    """

    def __init__(
        self,
        settings: CacheSettings,
        folders: tuple[PictureFolder, Path],
        buckets: Buckets,
        suffix: str,
        encoder: Encoder,
        fingerprint: str,
        *,
        recache: bool,
    ) -> None:
        self._settings, self._buckets, self._suffix = settings, buckets, suffix
        self._folder, self._output = folders
        self._encoder, self._fingerprint, self._recache = encoder, fingerprint, recache
        self._threads = ThreadPoolExecutor(settings.workers, "pictures")
        self._writes: deque[Future[None]] = deque()

    def run(
        self,
        items: Iterable[Item],
        rank: int,
        ranks: int,
        keep: Callable[[Iterable[Result]], None],
        progress: Callable[[int], None],
    ) -> None:
        """Make the latents of this rank's share of the items.

        `keep` takes the results of each window, in the order of the items; `progress` takes the
        number of pictures looked at so far. Raises `LatentsError` for a file of others and for
        latents that are not finite, `OutputError` when one cannot be written, and what `items`
        raises.
        """
        done = 0
        read_ahead: deque[_Batch | _End] = deque()
        # Twice as many pictures as threads are read ahead of the VAE.
        most = 1 + -(-2 * self._settings.workers // self._settings.batch_size)
        failed: dict[int, Result] = {}
        try:
            for step in self._steps(items, rank, ranks):
                read_ahead.append(step)
                while len(read_ahead) > most:
                    done = self._finish(read_ahead.popleft(), failed, keep, progress, done)
            while read_ahead:
                done = self._finish(read_ahead.popleft(), failed, keep, progress, done)
        finally:
            self._threads.shutdown(cancel_futures=True)

    def _steps(self, items: Iterable[Item], rank: int, ranks: int) -> Iterator[_Batch | _End]:
        """The batches of this rank, whose pictures are being read, and the ends of its windows."""
        every, size = iter(items), _WINDOW_BATCHES * self._settings.batch_size
        number = 0
        while window := list(islice(every, size)):
            if number % ranks == rank:
                looked = list(self._threads.map(self._look, window))
                pictures = [one for one in looked if isinstance(one, Picture)]
                for batch in self._batches(pictures):
                    yield _Batch(batch, [self._threads.submit(self._read, one) for one in batch])
                results = [one.result if isinstance(one, Picture) else one for one in looked]
                yield _End({one.number: one for one in results})
            number += 1

    def _batches(self, pictures: list[Picture]) -> Iterator[list[Picture]]:
        """The pictures by buckets, without the batches that are finished.

        A batch of which some are finished is encoded as a whole, so that the others get the same
        bits as in a run that was not interrupted.
        """
        by_bucket: dict[tuple[int, int], list[Picture]] = {}
        for picture in pictures:
            by_bucket.setdefault(picture.placed.bucket, []).append(picture)
        size = self._settings.batch_size
        for those in by_bucket.values():
            for start in range(0, len(those), size):
                batch = those[start : start + size]
                if not all(picture.is_finished for picture in batch):
                    yield batch

    def _look(self, item: Item) -> Picture | Skipped:
        """Find a picture, its bucket, and its latents if they are there."""
        if item.problem:
            return Skipped(item.number, item.key, item.problem)
        try:
            found = self._folder.find(item.key)
            header = read_header(found.path, exif_rotation=self._settings.exif_rotation)
            sides = header.width, header.height
            placed = self._buckets.place(*sides)
        except (PictureError, ValueError) as error:
            return Skipped(item.number, item.key, str(error))
        if placed.resized[0] * placed.resized[1] > MOST_PIXELS:
            reason = f"{sides[0]} x {sides[1]} px is too narrow for the bucket"
            return Skipped(item.number, item.key, reason)
        if found.is_absolute and self._output != self._folder.images:
            raise ConfigError(
                f"cache.output: found {self._output}, but keys are absolute paths, whose latents "
                "lie beside the pictures. Remove cache.output."
            )
        target = self._output / file_name(found.stem, sides, self._suffix)
        try:
            finished = is_finished(target, self._mark(header))
        except LatentsError:
            if not self._recache:
                raise
            finished = False
        return Picture(item, found, header, placed, target, finished)

    def _mark(self, header: Header) -> str:
        return f"{self._fingerprint} {header.n_bytes}"

    def _read(self, picture: Picture) -> NDArray[np.uint8] | PictureError:
        """The pixels at the size of the bucket, or why there are none."""
        try:
            pixels = read_pixels(
                picture.found.path,
                exif_rotation=self._settings.exif_rotation,
                alpha=self._settings.alpha_mask,
            )
        except PictureError as error:
            return error
        if pixels.shape[1::-1] != (picture.header.width, picture.header.height):
            return PictureError("its size has changed while it was read")
        return fit_to_bucket(pixels, picture.placed)

    def _finish(
        self,
        step: _Batch | _End,
        failed: dict[int, Result],
        keep: Callable[[Iterable[Result]], None],
        progress: Callable[[int], None],
        done: int,
    ) -> int:
        """Encode a batch, or keep the results of a window; how many pictures were looked at."""
        if isinstance(step, _End):
            while self._writes:
                self._writes.popleft().result()
            keep((step.results | failed).values())
            failed.clear()
            progress(done + len(step.results))
            return done + len(step.results)
        read = [(picture, future.result()) for picture, future in zip(*step, strict=True)]
        pictures, pixels = [], []
        for picture, one in read:
            if isinstance(one, PictureError):
                number, key, _ = picture.item
                failed[number] = Skipped(number, key, str(one))
            else:
                pictures.append(picture)
                pixels.append(one)
        if not pictures:
            return done
        stems = [picture.found.stem for picture in pictures]
        made = self._encoder.encode([one[..., :3] for one in pixels], stems)
        for picture, one, arrays in zip(pictures, pixels, made, strict=True):
            if not picture.is_finished:
                self._writes.append(self._threads.submit(self._write, picture, one, arrays))
        return done

    def _write(
        self, picture: Picture, pixels: NDArray[np.uint8], arrays: dict[str, NDArray[np.generic]]
    ) -> None:
        sides = picture.header.width, picture.header.height
        mask = None
        if self._settings.alpha_mask:
            mask = pixels[..., 3].astype(np.float32) / np.float32(255)
        encoded = Encoded(
            arrays,
            DTYPE_NAMES[self._settings.dtype],
            sides,
            crop_of(picture.placed.bucket, *sides),
            mask,
        )
        if self._output != self._folder.images:
            picture.target.parent.mkdir(parents=True, exist_ok=True)
        write_latents(picture.target, encoded, self._mark(picture.header))
