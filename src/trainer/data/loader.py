"""The micro-batches of one rank in order, from any step on, loaded by worker processes.

This module slices plans, collates samples and replaces samples whose latents are missing; making a
sample and opening a plan are functions that it is given. The batches do not depend on the number of
workers: a batch is a pure function of its step and micro-step.
"""

import logging
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from threading import Thread
from typing import Literal, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from capmerge.errors import CapmergeError, WorkerError
from capmerge.index.latent_names import PIXELS_PER_LATENT
from capmerge.tokens.chunks import Chunker
from trainer.data.batch import Batch, Sample, SampleRequest
from trainer.data.buckets import SetRows, largest_area, next_of_bucket
from trainer.data.collate import collate
from trainer.data.latents import with_way_out
from trainer.data.plan import Batches, GlobalBatch, deal
from trainer.data.shared_memory import Handover
from trainer.data.workers import iter_items, settle
from trainer.errors import LatentsError
from trainer.families import LATENT_CHANNELS

MakeSample = Callable[[SampleRequest], Sample]
"""A function that makes a sample; it raises `LatentsError` for missing or broken latents."""
Warnings = list[tuple[tuple[int, int], str]]
"""The (data set, record) of each record without latents, with the line to log."""

# The micro-batches that a worker prepares ahead; torch's own default.
_PREFETCHED = 2
# The ids of some thousand chunks; tensors that do not fit cross more slowly.
_BYTES_BESIDES = 1 << 20
# A whole bucket without latents is not a gap that should be filled.
_MOST_TRIES = 100
# Killed workers are started anew so often within so many seconds: memory that is short once, as
# beside another program, is no reason to end a run; memory that is always short is.
_MOST_RESTARTS, _RESTARTS_SECONDS = 3, 600

_logger = logging.getLogger(__name__)


class Share(NamedTuple):
    """The part of every global batch that one rank trains."""

    rank: int
    ranks: int
    batch_size: int
    """The number of samples in a micro-batch."""
    accumulation: int

    @property
    def global_batch_size(self) -> int:
        """The number of samples in a full global batch."""
        return self.ranks * self.batch_size * self.accumulation


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
        loader: "DataLoader[_Loaded | bytes]",
        batches: "_MicroBatches",
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
            assert isinstance(loaded, _Loaded)
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
    batches = _MicroBatches(
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


class _Loaded(NamedTuple):
    """The value that crosses from a worker to the training process.

    Errors cross as values, because torch would put a traceback into their messages.
    """

    result: Batch | CapmergeError
    replaced: Warnings


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


@dataclass
class _MicroBatches(Dataset[_Loaded | bytes]):
    """The micro-batches of the rank, indexed by (step, micro)."""

    make_sample: MakeSample
    open_epoch: Callable[[int], Batches]
    sets: Sequence[SetRows]
    chunker: Chunker
    share: Share
    on_missing: Sequence[Literal["stop", "skip"]]
    steps_per_epoch: int
    max_steps: int
    contrasts: bool
    plan: tuple[int, Batches] | None = None
    """The epoch whose plan is open in this process, and the plan."""
    built_ahead: int = 0
    """The newest epoch for which a thread of this process was started to build the plan."""
    handover: Handover | None = None
    """Memory shared with the training process; None where torch's own way carries the tensors."""

    def __getitem__(self, place: tuple[int, int]) -> _Loaded | bytes:
        loaded, worker = self._loaded(place), get_worker_info()
        return (
            loaded
            if self.handover is None or worker is None
            else self.handover.put(loaded, worker.id)
        )

    def _loaded(self, place: tuple[int, int]) -> _Loaded:
        replaced: Warnings = []
        try:
            return _Loaded(self._batch(*place, replaced), replaced)
        except CapmergeError as error:
            return _Loaded(error, replaced)

    def _batch(self, step: int, micro: int, replaced: Warnings) -> Batch:
        # Find this rank's slice of the global batch.
        epoch, place = divmod(step, self.steps_per_epoch)
        whole = self._plan(epoch, place).batch(place)
        rank, ranks, batch_size, accumulation = self.share
        slots = deal(
            len(whole.record), ranks=ranks, accumulation=accumulation, batch_size=batch_size
        )[micro][rank]
        # Make its samples, and the others to contrast them with, which depend on the plan alone.
        n_samples = len(whole.record)
        others = (
            [(at + 1) % n_samples for at in slots.places]
            if self.contrasts and n_samples > 1
            else []
        )
        made = {
            at: self._sample(whole, at, epoch, step, replaced)
            for at in dict.fromkeys((*slots.places, *others))
        }
        return collate(
            [made[at] for at in slots.places],
            whole,
            slots,
            self.chunker,
            step=step,
            epoch=epoch,
            micro=micro,
            others=[made[at] for at in others],
        )

    def _sample(
        self, whole: GlobalBatch, at: int, epoch: int, step: int, replaced: Warnings
    ) -> Sample:
        """The sample at a place of the global batch, or a replacement where it has no latents."""
        request = SampleRequest(
            dataset=int(whole.dataset[at]),
            record=int(whole.record[at]),
            repeat=int(whole.repeat[at]),
            epoch=epoch,
            step=step,
        )
        try:
            return self.make_sample(request)
        except LatentsError as error:
            if self.on_missing[request.dataset] == "stop":
                raise with_way_out(error) from error
            return self._another(request, error, replaced)

    def _another(self, request: SampleRequest, error: LatentsError, replaced: Warnings) -> Sample:
        """The sample of the next record in the bucket that has latents.

        Appends to `replaced` a warning for each record that had none.
        """
        dataset, record = request.dataset, request.record
        missing = [(record, error)]
        for _, other in islice(next_of_bucket(self.sets, dataset, record), _MOST_TRIES - 1):
            try:
                sample = self.make_sample(request._replace(record=other))
            except LatentsError as again:
                missing.append((other, again))
                continue
            replaced += [
                ((dataset, absent), f"{why} Trained in its place: {sample.key}")
                for absent, why in missing
            ]
            return replace(sample, events=(*sample.events, "replaced"))
        rows = self.sets[dataset]
        raise LatentsError(
            f"data.{dataset}, bucket {rows.width[record]} x {rows.height[record]}: "
            f"found no latents for {len(missing)} records in a row, "
            "expected one to train in place of the first. "
            "Cache their latents, or remove them from the metadata. "
            f"The first: {error}"
        )

    def _plan(self, epoch: int, place: int) -> Batches:
        if self.plan is None or self.plan[0] != epoch:
            self.plan = epoch, self.open_epoch(epoch)
        ahead, worker = epoch + 1, get_worker_info()
        due = place * 2 >= self.steps_per_epoch and ahead * self.steps_per_epoch < self.max_steps
        if due and self.built_ahead < ahead and (worker is None or worker.id == 0):
            self.built_ahead = ahead
            Thread(target=self._build_ahead, args=(ahead,), daemon=True).start()
        return self.plan[1]

    def _build_ahead(self, epoch: int) -> None:
        # An error is raised again when the epoch itself begins.
        with suppress(CapmergeError):
            self.open_epoch(epoch)


def _as_it_is(loaded: _Loaded | bytes) -> _Loaded | bytes:
    """The argument unchanged, because torch's own conversion would turn tuples into lists."""
    return loaded
