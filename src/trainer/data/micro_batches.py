"""The micro-batches of one rank, each a function of its step and micro-step alone.

This module slices plans, collates samples and replaces samples whose latents are missing; making a
sample and opening a plan are functions that it is given. `loader` has worker processes make them.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import islice
from threading import Thread
from typing import Literal, NamedTuple

from torch.utils.data import Dataset, get_worker_info

from capmerge.errors import CapmergeError
from capmerge.tokens.chunks import Chunker
from trainer.data.batch import Batch, Sample, SampleRequest
from trainer.data.buckets import SetRows, next_of_bucket
from trainer.data.collate import collate
from trainer.data.latents import with_way_out
from trainer.data.plan import Batches, GlobalBatch, deal
from trainer.data.shared_memory import Handover
from trainer.errors import LatentsError

MakeSample = Callable[[SampleRequest], Sample]
"""A function that makes a sample; it raises `LatentsError` for missing or broken latents."""
Warnings = list[tuple[tuple[int, int], str]]
"""The (data set, record) of each record without latents, with the line to log."""
# A whole bucket without latents is not a gap that should be filled.
_MOST_TRIES = 100


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


class Loaded(NamedTuple):
    """The value that crosses from a worker to the training process.

    Errors cross as values, because torch would put a traceback into their messages.
    """

    result: Batch | CapmergeError
    replaced: Warnings


@dataclass
class MicroBatches(Dataset[Loaded | bytes]):
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

    def __getitem__(self, place: tuple[int, int]) -> Loaded | bytes:
        loaded, worker = self._loaded(place), get_worker_info()
        return (
            loaded
            if self.handover is None or worker is None
            else self.handover.put(loaded, worker.id)
        )

    def _loaded(self, place: tuple[int, int]) -> Loaded:
        replaced: Warnings = []
        try:
            return Loaded(self._batch(*place, replaced), replaced)
        except CapmergeError as error:
            return Loaded(error, replaced)

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
