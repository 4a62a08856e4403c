"""The size of a run in samples, buckets and steps, its identity, and the plans of its epochs.

This module owns the numbers that the dry run shows, the loop uses, and a resumed run must share.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config.settings import Config
from trainer.data.captions import token_warmup_steps
from trainer.data.datasets import DataSet
from trainer.data.plan import Plan, count_epoch
from trainer.data.plan_files import open_plan
from trainer.errors import ConfigError


@dataclass(frozen=True, slots=True)
class RunSize:
    """The size of a run, which follows from its config, its data and its world size."""

    records: int
    """The number of records in all data sets, usable or not."""
    samples_per_epoch: int
    """Usable records times repeats."""
    buckets: int
    """The number of buckets: latent sizes, times chunk counts when they are dynamic."""
    global_batch_size: int
    """Samples per optimizer step: micro-batch x accumulation x ranks."""
    steps_per_epoch: int
    max_steps: int
    """The number of optimizer steps in the whole run."""


def run_size(config: Config, datasets: Sequence[DataSet], world_size: int) -> RunSize:
    """The size of the run of `config` on `world_size` ranks.

    Raises `ConfigError` for a contrastive loss in global batches of one sample.
    """
    rows = [dataset.rows for dataset in datasets]
    global_batch_size = config.train.batch_size * config.train.accumulation * world_size
    if config.loss.contrastive and global_batch_size == 1:
        raise ConfigError(
            "`loss.contrastive` has no effect with a global batch of 1 sample, because it compares "
            "each sample with the next one. Remove it, or set train.batch_size or "
            "train.accumulation to 2 or more."
        )
    buckets, steps = count_epoch(rows, global_batch_size)
    ends = [config.train.max_steps, config.train.max_epochs and config.train.max_epochs * steps]
    return RunSize(
        records=sum(len(dataset.index) for dataset in datasets),
        samples_per_epoch=sum(_usable(dataset) * dataset.settings.repeats for dataset in datasets),
        buckets=buckets,
        global_batch_size=global_batch_size,
        steps_per_epoch=steps,
        max_steps=min(end for end in ends if end),
    )


def length_warnings(config: Config, max_steps: int) -> Iterator[str]:
    """A line for each setting that has no effect, or not its whole effect, in a run this short."""
    for number in range(len(config.data)):
        caption = config.caption_of(number)
        if caption.token_warmup_steps and not token_warmup_steps(caption, max_steps):
            yield (
                f"WARNING: caption.token_warmup_steps = {caption.token_warmup_steps:g} of "
                f"{max_steps:,} steps is less than one step, so data.{number} has no token "
                "warm-up. Set a number of steps, or a larger share."
            )
    warmup = config.optimizer.warmup_steps
    if warmup >= max_steps:
        yield (
            f"WARNING: optimizer.warmup_steps = {warmup:,} does not end within the {max_steps:,} "
            "steps of the run, so the learning rates never reach their full values. "
            "Set fewer of them."
        )
    if config.ema.warmup_steps >= max_steps:
        yield (
            f"WARNING: ema.warmup_steps = {config.ema.warmup_steps:,} does not end within the "
            f"{max_steps:,} steps of the run, so the decay never reaches its full value. "
            "Set fewer of them."
        )


def _usable(dataset: DataSet) -> int:
    usable = dataset.rows.usable
    return len(dataset.index) if usable is None else int(np.count_nonzero(usable))


def identity(config: Config, datasets: Sequence[DataSet], size: RunSize) -> dict[str, Any]:
    """The values that a resumed run must share, keyed by the name of the setting.

    With the same values, its samples are those of an uninterrupted run.
    """
    found: dict[str, Any] = {
        "train.seed": config.train.seed,
        "global batch size": size.global_batch_size,
        "model.family": config.model.family,
        "optimizer.name": config.optimizer.name,
        "text.chunking": config.text.chunking,
        "text.max_tokens": config.text.max_tokens,
        "text.dynamic_chunks": config.text.dynamic_chunks,
    }
    for dataset in datasets:
        found[f"data.{dataset.number}.metadata fingerprint"] = dataset.index.fingerprint
        records = dataset.index.records_fingerprint()
        found[f"data.{dataset.number}.records fingerprint"] = records
        found[f"data.{dataset.number}.repeats"] = dataset.settings.repeats
        if dataset.rows.usable is not None:
            left_out = hashlib.blake2b(
                np.packbits(dataset.rows.usable).tobytes(), digest_size=8
            ).hexdigest()
            found[f"data.{dataset.number} records left out"] = left_out
    return found


class EpochPlans:
    """The plans of the epochs of a run, in the files of one folder."""

    def __init__(
        self, folder: Path, config: Config, datasets: Sequence[DataSet], size: RunSize
    ) -> None:
        self._folder, self._seed = folder, config.train.seed
        self._size = size
        self._rows = [dataset.rows for dataset in datasets]
        self._fingerprint = json.dumps(identity(config, datasets, size))

    def __call__(self, epoch: int) -> Plan:
        """The plan of an epoch, counted from 0, built if it is missing."""
        # A seed was drawn when the config had none.
        assert self._seed is not None
        return open_plan(
            self._folder,
            seed=self._seed,
            epoch=epoch,
            global_batch_size=self._size.global_batch_size,
            sets=self._rows,
            fingerprint=self._fingerprint,
            hold_room=(epoch + 1) * self._size.steps_per_epoch < self._size.max_steps,
        )
