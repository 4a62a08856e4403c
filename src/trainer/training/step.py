"""One optimizer step: micro-batches in, numbers out. Small enough to be tested without a run around it."""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from trainer.config.settings import Config
from trainer.data.batch import Batch
from trainer.model.model import Model
from trainer.model.noise_schedule import Schedule
from trainer.training.accelerator import sum_over_ranks
from trainer.training.loss import batch_loss
from trainer.training.optim import RateSchedule, clip_gradients, guarded_step


@dataclass(frozen=True, slots=True)
class Trained:
    """What a step trains with; `model` and `optimizer` are prepared by the engine."""

    engine: Accelerator
    config: Config
    model: torch.nn.Module
    bare_model: Model
    """The model without the engine's wrapper. To ask accelerate for it would import DeepSpeed wherever that is installed (2 s)."""
    optimizer: Any
    rates: RateSchedule
    schedule: Schedule


@dataclass(frozen=True, slots=True)
class StepResult:
    """The numbers of one optimizer step."""

    loss: float
    """Mean over the real samples of the global batch."""
    grad_norm: float
    """Of the whole gradient, before clipping."""
    rates: dict[str, float]
    """The learning rates of this step, by the names of their groups."""
    taken: bool
    """False: the gradient was not finite, and weights and optimizer state are as before."""
    wishes: tuple[bool, ...]
    """Which of the wishes any rank has."""
    replaced: int
    """Samples of all ranks that stand for others whose latents are missing or broken."""
    counts: Counter[str]
    """What happened in this rank's samples, as `Batch.counts` names it."""
    keys: tuple[str, ...]
    """Of this rank's samples."""
    captions: tuple[str, ...]
    """Of this rank's samples."""
    seconds: float
    waited_seconds: float
    """Of those, how long the loader was waited for."""


def train_step(
    trained: Trained,
    loader: Iterator[Batch],
    step: int,
    wishes: Callable[[], Sequence[bool]] = tuple,
) -> StepResult:
    """Train the micro-batches of `step` (from 0), which `loader` gives next.

    The loss of a micro-batch is its samples' share of the step's mean, so how the global batch is
    dealt over ranks and micro-batches changes nothing but rounding, unless they differ in their
    chunks of padding (`text.max_tokens`). Loss, gradient norm and what the ranks must agree on -
    their `wishes`, asked for when the gradient is there - cross in one collective and are read back
    together: one wait for the device a step.
    """
    engine, config = trained.engine, trained.config
    start, waited = time.perf_counter(), 0.0
    counts: Counter[str] = Counter()
    keys: list[str] = []
    captions: list[str] = []
    total = torch.zeros((), device=engine.device)
    for micro in range(config.train.accumulation):
        asked = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - asked
        counts.update(batch.counts)
        keys += batch.keys
        captions += batch.captions
        # Ranks add up their gradients at the last micro-batch. Not by `engine.accumulate`: it
        # counts micro-batches over the whole run and saves its count, so a run that is resumed with
        # another accumulation would step in the middle of a batch, or never.
        last = micro == config.train.accumulation - 1
        with nullcontext() if last else engine.no_sync(trained.model):
            loss = batch_loss(
                trained.model, batch.to(engine.device), trained.schedule, config.noise, config.loss
            )
            engine.backward(
                loss.value * engine.num_processes
            )  # the engine averages over ranks; shares of a mean are added up
        total += loss.value.detach()
    rates = trained.rates.set_rates(step)
    norm = clip_gradients(
        [p for p in trained.model.parameters() if p.requires_grad], config.optimizer.clip_grad_norm
    )
    own = torch.tensor([counts["replaced"], *wishes()], dtype=torch.float32, device=engine.device)
    shared = sum_over_ranks(engine, torch.cat((total[None], own)))
    stepped = guarded_step(trained.optimizer, norm, *shared)
    mean_loss, replaced, *wished = stepped.logged
    return StepResult(
        loss=mean_loss,
        grad_norm=stepped.grad_norm,
        rates=rates,
        taken=stepped.taken,
        wishes=tuple(bool(wish) for wish in wished),
        replaced=int(replaced),
        counts=counts,
        keys=tuple(keys),
        captions=tuple(captions),
        seconds=time.perf_counter() - start,
        waited_seconds=waited,
    )
