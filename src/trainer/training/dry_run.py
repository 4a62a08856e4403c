"""The dry run: the resolved config, the derived numbers and the first samples of a run, printed."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from capmerge.errors import printable
from capmerge.tokens.chunks import Chunker
from trainer.config.load import resolved_toml, with_seed
from trainer.config.settings import Config
from trainer.data.batch import Sample, SampleRequest
from trainer.data.datasets import DataSet, open_datasets
from trainer.data.epochs import EpochPlans, RunSize, length_warnings, run_size
from trainer.data.held_out import hold_out
from trainer.data.samples import SampleMaker, build_chunker
from trainer.model.build import build_model
from trainer.model.model import Model
from trainer.model.sd2_guess import guess_on_source
from trainer.model.source import check_source
from trainer.model.trainable import parameter_groups, trained_share
from trainer.training.ema import check_ema
from trainer.training.optim import check_optimizer
from trainer.training.sampling import check_samples

FIRST_SAMPLES = 8


def show(config: Config) -> None:
    """Print what `config` would train, without a GPU and writing nothing but missing indexes.

    The number of ranks is the one that a launcher sets (WORLD_SIZE), else 1. Raises the errors that
    the run itself would raise before its first step, except that of an output folder that is not
    free, and of an optimizer that only another machine can try.
    """
    check_ema(config)
    datasets = open_datasets(config)
    check_samples(config)
    config = with_seed(config)
    split = hold_out(config, datasets)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    size = run_size(config, split.datasets, ranks)
    model = build_model(config, weights=False)
    untried = check_optimizer(parameter_groups(model, config), config.optimizer, size.max_steps)
    print(resolved_toml(config))
    for line in _numbers(config, size, model, ranks):
        print(f"# {line}")
    notes = [note for dataset in datasets for note in dataset.notes]
    warnings = length_warnings(config, size.max_steps)
    guess = guess_on_source(model, check_source(model, config), config)
    for note in [*notes, *split.notes, *warnings, *guess, *filter(None, [untried])]:
        print(f"# {note}")
    chunker = build_chunker(config)
    for number, sample in enumerate(
        islice(_samples(config, split.datasets, size), FIRST_SAMPLES), 1
    ):
        print(f"\n# sample {number}: {_described(sample, chunker)}\n{printable(sample.caption)}")


def _numbers(config: Config, size: RunSize, model: Model, ranks: int) -> Iterator[str]:
    """Lines with the numbers that follow from the config and the data."""
    micro, accumulation = config.train.batch_size, config.train.accumulation
    epochs = size.max_steps / size.steps_per_epoch
    yield (
        f"records: {size.records:,}; samples per epoch: {size.samples_per_epoch:,}; "
        f"buckets: {size.buckets:,}"
    )
    yield (
        f"global batch: {size.global_batch_size:,} = {micro:,} x {accumulation:,} (accumulation)"
        f" x {ranks:,} (ranks)"
    )
    yield (
        f"steps: {size.max_steps:,}; steps per epoch: {size.steps_per_epoch:,}; "
        f"epochs: {epochs:.3g}"
    )
    for part, (trained, total) in trained_share(model).items():
        yield f"{part}: {trained:,} of {total:,} parameters trained ({trained / total:.1%})"


def _samples(config: Config, datasets: Sequence[DataSet], size: RunSize) -> Iterator[Sample]:
    """The samples of the first epoch, in the order in which they train."""
    maker = SampleMaker(config, datasets, size.max_steps)
    with tempfile.TemporaryDirectory() as folder:
        plan = EpochPlans(Path(folder), config, datasets, size)(0)
        for step in range(plan.steps):
            batch = plan.batch(step)
            for dataset, record, repeat in zip(
                batch.dataset.tolist(), batch.record.tolist(), batch.repeat.tolist(), strict=True
            ):
                yield maker.make(SampleRequest(dataset, record, repeat, epoch=0, step=step))


def _described(sample: Sample, chunker: Chunker) -> str:
    """One line about a sample: where it comes from, and how its caption fills the chunks."""
    chunks = chunker.chunks_of(sample.cut)
    filled = " + ".join(str(tokens) for tokens in sample.cut.filled[:chunks])
    dropped = sample.cut.dropped_tokens(chunks)
    events = "".join(f", {event.replace('_', ' ')}" for event in sample.events)
    return (
        f"{printable(sample.key)} (data.{sample.dataset}, repeat {sample.repeat}), "
        f"style {sample.style or 'none'}, timestep {sample.timestep:.6g}, "
        f"{sample.cut.tokens} tokens, "
        f"chunks {filled}, {dropped} dropped{events}"
    )
