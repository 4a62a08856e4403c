"""The cost of the trainer's loop besides the computation, for `bench_step --overhead`.

The run of the trainer and a bare loop take turns, a block of steps each, so that noise of the
machine reaches both.
"""

import itertools
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from measuring import ROOT, table
from step_measuring import Weights
from trainer.config.load import load_config
from trainer.config.settings import Config, family_of
from trainer.data.batch import Batch
from trainer.data.datasets import open_datasets
from trainer.data.epochs import EpochPlans, RunSize, run_size
from trainer.data.held_out import hold_out
from trainer.data.loader import build_loader
from trainer.data.micro_batches import Share
from trainer.data.samples import SampleMaker, build_chunker
from trainer.model.noise_schedule import Schedule
from trainer.model.trainable import parameter_groups
from trainer.training.active_run import ActiveRun
from trainer.training.engines.accelerator import build_engine
from trainer.training.engines.launcher import agreed
from trainer.training.loop import build_state
from trainer.training.loss import batch_loss
from trainer.training.signals import Interrupts
from trainer.training.step import StepResult

BLOCK = 10
WARM_BLOCKS = 2
MOST_MS = 5.0
"""The cost per step that the loop may have."""


@dataclass
class Blocks:
    """Milliseconds per step of each block, by the clock and of this process's processor time."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Time a block of steps."""
        started, used = time.perf_counter(), time.process_time()
        yield
        self.wall.append((time.perf_counter() - started) / BLOCK * 1e3)
        self.cpu.append((time.process_time() - used) / BLOCK * 1e3)

    def medians(self) -> tuple[float, float]:
        """The medians of the blocks after the warm ones."""
        return statistics.median(self.wall[WARM_BLOCKS:]), statistics.median(self.cpu[WARM_BLOCKS:])


def print_overhead(folder: Path, blocks: int) -> None:
    """Measure `blocks` blocks of steps of each loop, and print a table."""
    config = _config(folder, (blocks + WARM_BLOCKS) * BLOCK)
    datasets = open_datasets(config)
    split = hold_out(config, datasets)
    size = run_size(config, split.datasets, 1)
    engine = build_engine(agreed(config, "the config"))
    weights = Weights(config)
    bare_step = _bare_loop(config, weights, _batches(config, split.datasets, size))
    state = build_state(weights.model(config), config, engine, size)
    run = ActiveRun(state, datasets, split, size, {}, step=0)

    ours, bare, waited = Blocks(), Blocks(), [0.0, 0.0]
    log_step, timing = run.log.log_step, ours.timed()

    def log_and_alternate(step: int, result: StepResult) -> None:
        nonlocal timing
        log_step(step, result)
        waited[0] += result.waited_seconds
        waited[1] += result.seconds
        if step % BLOCK == 0:
            timing.__exit__(None, None, None)
            with bare.timed():
                for _ in range(BLOCK):
                    bare_step()
            timing = ours.timed()
            timing.__enter__()

    run.log.log_step = log_and_alternate  # type: ignore[method-assign]
    timing.__enter__()
    with Interrupts() as interrupts:
        run.train(interrupts)
    run.log.close()

    rows = [
        [name, *(f"{value:.2f}" for value in values)]
        for name, values in (("a bare loop", bare.medians()), ("the trainer", ours.medians()))
    ]
    both = zip(ours.medians(), bare.medians(), strict=True)
    rows.append(["difference", *(f"{one - other:.2f}" for one, other in both)])
    print(table(["loop", "ms per step", "of which processor, ms"], rows))
    print(
        f"\nwaiting for the loader: {waited[0] / waited[1]:.1%} of the trainer's time; "
        f"the loop may cost {MOST_MS:g} ms per step"
    )


def _config(folder: Path, steps: int) -> Config:
    """A run of the tiny SDXL over the example data."""
    metadata = folder / "meta.json"
    source = str(ROOT / "examples" / "meta_lat.json")
    subprocess.run(
        [sys.executable, "-m", "capmerge", "rewrite", source, "-o", str(metadata), "--quiet"],
        check=True,
    )
    path = folder / "config.toml"
    path.write_text(
        '[model]\nfamily = "sdxl"\npath = "random"\n'
        f'[[data]]\nmetadata = "{metadata}"\nlatents = "{ROOT / "examples" / "latents"}"\n'
        f'[train]\noutput_dir = "{folder / "run"}"\nmax_steps = {steps}\nseed = 1\n',
        encoding="utf-8",
    )
    (folder / "run").mkdir()
    return load_config(path, [])


def _batches(config: Config, datasets: Any, size: RunSize) -> list[Batch]:
    """The micro-batches of the run, in memory."""
    loader = build_loader(
        SampleMaker(config, datasets, size.max_steps).make,
        EpochPlans(config.train.output_dir / "plans", config, datasets, size),
        [dataset.rows for dataset in datasets],
        build_chunker(config),
        share=Share(0, 1, config.train.batch_size, 1),
        on_missing=["stop"],
        steps_per_epoch=size.steps_per_epoch,
        start_step=0,
        max_steps=size.max_steps,
        workers=0,
        channels=family_of(config.model).latent_channels,
    )
    return list(loader)


def _bare_loop(config: Config, weights: Weights, batches: list[Batch]) -> Callable[[], float]:
    """A step of the same computation and nothing else: no log, no loader, no checks."""
    model = weights.model(config)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameter_groups(model, config))
    schedule = Schedule.of(config.noise)
    endless = itertools.cycle(batches)

    def step() -> float:
        loss = batch_loss(model, next(endless), schedule, config.noise, config.loss)
        torch.autograd.backward(loss.value)
        nn.utils.clip_grad_norm_(trained, config.optimizer.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return loss.value.item()

    return step
