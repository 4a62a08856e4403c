"""The dry run: the resolved config, the derived numbers and the first samples of a run, printed."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from capmerge.errors import printable
from capmerge.tokens.chunks import Chunker
from trainer.config.load import resolved_toml, with_rounding, with_seed
from trainer.config.settings import Config, family_of
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
from trainer.training.engines.deepspeed_engine import name_of
from trainer.training.engines.divided_optimizer import check_divided
from trainer.training.engines.fused_backward import check_fused_backward
from trainer.training.engines.launcher import agreed
from trainer.training.memory.estimate import estimate_memory, largest_shape, memory_lines
from trainer.training.memory.parts import GIB
from trainer.training.optimizer.build import check_optimizer
from trainer.training.optimizer.classes import is_of_bitsandbytes
from trainer.training.sampling import check_samples

FIRST_SAMPLES = 8
_PACKAGES = {
    "deepspeed": "deepspeed",
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "xformers": "xformers",
    "flash-attention": "flash_attn",
}
"""What settings ask for by name -> the module that the machine which trains has to have."""


def show(config: Config, ranks: int | None = None, name: str = "the config") -> None:
    """Print what `config` would train, without a GPU and writing nothing but missing indexes.

    Without `ranks`, their number is the one that a launcher sets (WORLD_SIZE), else 1. `name` is
    the file of the config in messages. Raises the errors that the run itself would raise before its
    first step, except for those of the machine: an output folder that is not free, a kernel of
    attention or a package that is missing, and an optimizer that only another machine can try.
    """
    launched = agreed(config, name)
    config = launched.config
    check_ema(config)
    datasets = open_datasets(config)
    check_samples(config)
    config = with_rounding(with_seed(config), uses_deepspeed=launched.uses_deepspeed)
    split = hold_out(config, datasets)
    ranks = ranks or int(os.environ.get("WORLD_SIZE", "1"))
    check_fused_backward(config, ranks)
    size = run_size(config, split.datasets, ranks)
    model = build_model(config, weights=False)
    groups = parameter_groups(model, config)
    on_optimizer = check_optimizer(groups, config.optimizer, size.max_steps)
    if launched.uses_deepspeed:
        _check_divided(config, groups)
    guess = guess_on_source(model, check_source(model, config), config)
    print(resolved_toml(config))
    for line in _numbers(config, size, model, ranks):
        print(f"# {line}")
    print(f"# engine: {_engine(config, ranks, uses_deepspeed=launched.uses_deepspeed)}")
    for line in _memory(
        config, split.datasets, model, ranks, uses_deepspeed=launched.uses_deepspeed
    ):
        print(f"# {line}")
    notes = [note for dataset in datasets for note in dataset.notes]
    warnings = length_warnings(config, size.max_steps)
    missing = _missing(config, uses_deepspeed=launched.uses_deepspeed)
    for note in [*notes, *split.notes, *warnings, *guess, *on_optimizer, *missing]:
        print(f"# {note}")
    chunker = build_chunker(config)
    for number, sample in enumerate(
        islice(_samples(config, split.datasets, size), FIRST_SAMPLES), 1
    ):
        print(f"\n# sample {number}: {_described(sample, chunker)}\n{printable(sample.caption)}")


def _check_divided(config: Config, groups: list[dict[str, Any]]) -> None:
    """Refuse what `check_divided` refuses, where the optimizer can take steps at all."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if device is not None or not is_of_bitsandbytes(config.optimizer.name):
        stage = config.engine.zero_stage
        check_divided(config.optimizer, groups, device or torch.device("cpu"), stage)


def _engine(config: Config, ranks: int, *, uses_deepspeed: bool) -> str:
    """What will train, in the words of the line with which a run starts."""
    engine = config.engine
    named = name_of(engine.zero_stage, engine.offload_optimizer_device, engine.offload_param_device)
    if ranks > 1:
        return f"{named if uses_deepspeed else 'DDP'} on {ranks:,} ranks"
    return f"{named} on one rank" if uses_deepspeed else "one device"


def _missing(config: Config, *, uses_deepspeed: bool) -> Iterator[str]:
    """Lines on the packages that the config asks for and that this machine does not have."""
    asked = [*(["deepspeed"] if uses_deepspeed else []), *config.log.trackers]
    for name in [*asked, config.speed.attention]:
        if name in _PACKAGES and find_spec(_PACKAGES[name]) is None:
            yield f"{name} is not installed here; the machine that trains needs it."


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


def _memory(
    config: Config, datasets: Sequence[DataSet], model: Model, ranks: int, *, uses_deepspeed: bool
) -> Iterator[str]:
    """Lines with the estimated memory, for the data and for the usual pictures of the family."""
    kind = "deepspeed" if uses_deepspeed else "ddp"
    config = config.model_copy(update={"engine": config.engine.model_copy(update={"kind": kind})})
    shape = largest_shape(config, datasets)
    yield from memory_lines(estimate_memory(config, model, ranks, shape), config, ranks, shape)
    side = family_of(config.model).side_px
    usual = shape._replace(width=side, height=side)
    if side * side > shape.width * shape.height:
        total = estimate_memory(config, model, ranks, usual).total()
        yield (
            f"with pictures of {side:,} x {side:,} px, which are usual for "
            f"{config.model.family}, it would be {total / GIB:.1f} GiB"
        )


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
