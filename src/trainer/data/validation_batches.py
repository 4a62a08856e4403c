"""The micro-batches of a validation: one record each, at all timesteps that are validated.

A record is made as it trains, but the same every time: one fixed caption line, its tags in the
order of the line and none left out, latents that are not flipped, and one noise, without what
disturbs the input. So a micro-batch depends on nothing but its record, the seed and the config, on
neither the number of ranks and workers nor `train.batch_size`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import numpy as np

from capmerge.errors import CapmergeError
from capmerge.index.latent_names import PIXELS_PER_LATENT
from trainer.config.settings import CaptionSettings, Config, family_of
from trainer.data.batch import Batch, Sample, SampleRequest
from trainer.data.datasets import DataSet
from trainer.data.held_out import Record
from trainer.data.loader import build_loader
from trainer.data.micro_batches import Share
from trainer.data.noise import timestep_at
from trainer.data.plan import GlobalBatch
from trainer.data.samples import SampleMaker, build_chunker
from trainer.errors import LatentsError, TrainerError

QUANTILES = (0.125, 0.375, 0.625, 0.875)
"""The quantiles of the timesteps that are drawn in the training: the middles of four quarters."""
_EPOCH = -1
"""No sample of the training has this epoch, so no noise or caption line of it is used again."""


class LeftOutError(TrainerError):
    """The latents of a record are missing or broken, in a data set that may skip such records."""


def iter_validation(
    config: Config, datasets: Sequence[DataSet], records: Sequence[Record]
) -> Iterator[Batch | CapmergeError]:
    """The micro-batch of each record in order, loaded by the workers of `train.workers`.

    The ids of the caption, which all timesteps share, are in it once: (1, N, L).
    `datasets` are those before records were held out. A record that cannot be made gives the error
    in place of its batch, `LeftOutError` if it may be skipped. Warnings and errors of the workers
    are those of `Loader`.
    """
    if not records:
        return iter(())
    rows = [dataset.rows for dataset in datasets]
    plan = _Plan(datasets, records)
    loader = build_loader(
        _Maker(config, datasets).make,
        plan.of_epoch,
        rows,
        build_chunker(config),
        share=Share(rank=0, ranks=1, batch_size=len(QUANTILES), accumulation=1),
        on_missing=["stop"] * len(datasets),
        steps_per_epoch=len(records),
        start_step=0,
        max_steps=len(records),
        workers=config.train.workers,
        channels=family_of(config.model).latent_channels,
    )
    return map(_with_one_text, loader.iter_results())


def _with_one_text(result: Batch | CapmergeError) -> Batch | CapmergeError:
    """The micro-batch with the ids of its caption once, (1, N, L), as all its samples share it."""
    if isinstance(result, CapmergeError):
        return result
    return replace(result, ids=tuple(ids_BNL[:1] for ids_BNL in result.ids))


@dataclass
class _Plan:
    """Batches of the loader's kind, in which each "repeat" of a record is one of its timesteps."""

    datasets: Sequence[DataSet]
    records: Sequence[Record]

    def of_epoch(self, _: int) -> Self:
        """The plan itself, which all epochs share."""
        return self

    def batch(self, place: int) -> GlobalBatch:
        """The micro-batch of the record at a place."""
        dataset, record = self.records[place]
        rows, size = self.datasets[dataset].rows, len(QUANTILES)
        return GlobalBatch(
            np.full(size, dataset, np.int64),
            np.full(size, record, np.int64),
            np.arange(size, dtype=np.int64),
            int(rows.width[record]),
            int(rows.height[record]),
            None if rows.chunks is None else int(rows.chunks[record]),
        )


@dataclass
class _Maker:
    """The maker of the samples; the last one is kept for the other timesteps of its record."""

    config: Config
    datasets: Sequence[DataSet]
    last: tuple[Record, Sample] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        undisturbed = {
            "text": {"random_caption_rate": 0.0, "word_repeat_rate": 0.0},
            "noise": {"input_perturbation": 0.0},
        }
        config = self.config.model_copy(
            update={
                name: getattr(self.config, name).model_copy(update=settings)
                for name, settings in undisturbed.items()
            }
        )
        datasets = [
            replace(
                dataset,
                captions=_fixed(dataset.captions),
                settings=dataset.settings.model_copy(update={"flip": False}),
            )
            for dataset in self.datasets
        ]
        self._samples = SampleMaker(config, datasets, max_steps=1)

    def make(self, request: SampleRequest) -> Sample:
        """The record of a request at the timestep that its repeat stands for.

        Raises the errors of `SampleMaker`, and `LeftOutError`.
        """
        record = request.dataset, request.record
        if self.last is None or self.last[0] != record:
            # Step 1 is past the token warm-up of `_fixed`.
            whole = request._replace(repeat=0, epoch=_EPOCH, step=1)
            try:
                self.last = record, self._samples.make(whole)
            except LatentsError as error:
                if self.datasets[request.dataset].settings.on_missing == "stop":
                    raise
                raise LeftOutError(str(error)) from error
        sample = self.last[1]
        n_pixels = sample.latents_CHW[0].numel() * PIXELS_PER_LATENT**2
        timestep = timestep_at(QUANTILES[request.repeat], self.config.noise, n_pixels)
        return replace(sample, timestep=timestep)


def _fixed(settings: CaptionSettings) -> CaptionSettings:
    """The caption settings without chance, and with every tag.

    Tags are cut apart and joined again if they are so in the training: a token warm-up that is over
    does it, and changes nothing else.
    """
    is_split = settings.shuffle or settings.tag_dropout_rate or settings.token_warmup_steps
    return settings.model_copy(
        update={
            "pick": "random",
            "shuffle": False,
            "tag_dropout_rate": 0.0,
            "token_warmup_steps": 1.0 if is_split else 0.0,
            "dropout_rate": 0.0,
            "dropout_every_epochs": 0,
        }
    )
