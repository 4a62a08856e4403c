"""The micro-batches of one rank in order, from any step on, loaded by worker processes.

The batches do not depend on the number of workers: a batch is a pure function of its step and
micro-step, which `micro_batches` has.
"""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Literal

import torch
from torch.utils.data import DataLoader, Sampler

from capmerge.errors import CapmergeError, WorkerError
from capmerge.index.latent_names import PIXELS_PER_LATENT
from capmerge.tokens.chunks import Chunker
from trainer.data.batch import Batch
from trainer.data.buckets import SetRows, largest_area
from trainer.data.micro_batches import Loaded, MakeSample, MicroBatches, Share
from trainer.data.plan import Batches
from trainer.data.shared_memory import Handover
from trainer.data.workers import iter_items, settle
from trainer.families import LATENT_CHANNELS

# The micro-batches that a worker prepares ahead; torch's own default.
_PREFETCHED = 2
# The ids of some thousand chunks; tensors that do not fit cross more slowly.
_BYTES_BESIDES = 1 << 20
# Killed workers are started anew so often within so many seconds: memory that is short once, as
# beside another program, is no reason to end a run; memory that is always short is.
_MOST_RESTARTS, _RESTARTS_SECONDS = 3, 600

_logger = logging.getLogger(__name__)


class Loader:
    """The micro-batches of one rank in order: `micro` 0, 1, ... of a step, then of the next step.

    `len` counts micro-batches. The workers live as long as one iterator, which goes over all
    epochs. Records that were replaced are logged as warnings, each once. Iterating raises the
    errors of the workers: a `CapmergeError` as it was raised there, any other error with the
    worker's traceback. When a worker was killed, new ones are started and the batches go on; the
    fourth time within ten minutes raises `WorkerError`.
    """

    def __init__(
        self,
        loader: "DataLoader[Loaded | bytes]",
        batches: MicroBatches,
        order: "_Steps",
        slot_bytes: int,
    ) -> None:
        self._loader, self._batches, self._order = loader, batches, order
        self._slot_bytes = slot_bytes
        self._logged: set[tuple[int, int]] = set()

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for result in self.iter_results():
            if isinstance(result, CapmergeError):
                raise result
            yield result

    def iter_results(self) -> Iterator[Batch | CapmergeError]:
        """The micro-batches, with the error in place of each that cannot be made."""
        done = 0
        restarts: deque[float] = deque(maxlen=_MOST_RESTARTS)
        while True:
            try:
                for result in self._iter_after(done):
                    done += 1
                    yield result
            except WorkerError as error:
                # Batches are pure functions of the step, so new workers make the same ones.
                now = time.monotonic()
                if len(restarts) == _MOST_RESTARTS and now - restarts[0] < _RESTARTS_SECONDS:
                    raise
                restarts.append(now)
                _logger.warning("WARNING: %s The workers are started anew.", error)
            else:
                return

    def _iter_after(self, done: int) -> Iterator[Batch | CapmergeError]:
        """The micro-batches after the first `done`, made by new workers."""
        self._order.done = done
        handover = self._handover()
        # It belongs to this iterator alone: its workers inherit it.
        self._batches.handover = handover
        for crossed in iter_items(self._loader):
            loaded = (
                handover.take(crossed, pinned=torch.cuda.is_available())
                if handover and isinstance(crossed, bytes)
                else crossed
            )
            assert isinstance(loaded, Loaded)
            for record, line in loaded.replaced:
                if record not in self._logged:
                    self._logged.add(record)
                    _logger.warning(line)
            yield loaded.result

    def _handover(self) -> Handover | None:
        """The memory in which batches cross; None where torch's own way has to carry them.

        A single record whose size is beyond all sense asks for more memory than there is.
        """
        workers = self._loader.num_workers
        if not workers or sys.platform != "linux":
            return None
        try:
            return Handover(workers, _PREFETCHED + 1, self._slot_bytes)
        except (OSError, OverflowError) as error:
            _logger.warning(
                "WARNING: data loading: found no shared memory of %s bytes (%s), expected as much "
                "for %s workers. Batches cross more slowly now. Lower train.batch_size or "
                "train.workers, or check the largest size in the metadata.",
                f"{workers * (_PREFETCHED + 1) * self._slot_bytes:,}",
                error,
                workers,
            )
            return None


def build_loader(
    make_sample: MakeSample,
    open_epoch: Callable[[int], Batches],
    sets: Sequence[SetRows],
    chunker: Chunker,
    *,
    share: Share,
    on_missing: Sequence[Literal["stop", "skip"]],
    steps_per_epoch: int,
    start_step: int,
    max_steps: int,
    workers: int,
    channels: int = LATENT_CHANNELS,
    contrasts: bool = False,
) -> Loader:
    """The loader of all micro-batches of the steps `start_step` .. `max_steps` - 1.

    The steps may span several epochs. `open_epoch` returns the plan of an epoch, made for
    `share.global_batch_size`; `steps_per_epoch` is its `steps`. It is called in the workers, and
    half an epoch ahead in a thread, so that no epoch begins with waiting. `on_missing` has one
    value per data set. With "skip", the next record of the bucket is trained in place of a record
    without latents, with the event "replaced". With `contrasts`, a batch also holds the flow of the
    sample that follows each of its own in the global batch; the first one follows the last.
    `channels` is the number of channels of the latents.
    """
    batches = MicroBatches(
        make_sample,
        open_epoch,
        sets,
        chunker,
        share,
        on_missing,
        steps_per_epoch,
        max_steps,
        contrasts,
    )
    order = _Steps(start_step, max_steps, share.accumulation)
    loader = DataLoader(
        batches,
        batch_size=None,
        sampler=order,
        num_workers=workers,
        prefetch_factor=_PREFETCHED if workers else None,
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        # Without batching, the function gets one sample.
        collate_fn=_as_it_is,  # type: ignore[arg-type]
        worker_init_fn=settle,
        pin_memory=torch.cuda.is_available(),
        # Without a generator, a loader would draw from the run's own random stream.
        generator=torch.Generator(),
    )
    latents = largest_area(sets) * share.batch_size // PIXELS_PER_LATENT**2
    # float32 latents, noise, input noise or other flow, and a mask of one channel.
    bytes_per_latent = 4 * (3 * channels + 1)
    return Loader(loader, batches, order, latents * bytes_per_latent + _BYTES_BESIDES)


class _Steps(Sampler[tuple[int, int]]):
    """All pairs (step, micro) in order, without the first `done` ones."""

    def __init__(self, start_step: int, max_steps: int, accumulation: int) -> None:
        self._steps, self._accumulation = range(start_step, max_steps), accumulation
        self.done = 0

    def __len__(self) -> int:
        return len(self._steps) * self._accumulation

    def __iter__(self) -> Iterator[tuple[int, int]]:
        pairs = ((step, micro) for step in self._steps for micro in range(self._accumulation))
        return islice(pairs, self.done, None)


def _as_it_is(loaded: Loaded | bytes) -> Loaded | bytes:
    """The argument unchanged, because torch's own conversion would turn tuples into lists."""
    return loaded
