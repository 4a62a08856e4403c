"""One optimizer step: micro-batches in, numbers out. Small enough to be tested without a run around it."""

import math
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from trainer.batch import Batch
from trainer.engine import sum_over_ranks
from trainer.loss import batch_loss
from trainer.noise import Schedule
from trainer.optim import clip_gradients
from trainer.settings import Config


@dataclass(frozen=True, slots=True)
class Trained:
    """What a step trains with; `model` and `optimizer` are prepared by the engine."""

    engine: Accelerator
    config: Config
    model: torch.nn.Module
    optimizer: Any
    rates: torch.optim.lr_scheduler.LRScheduler
    """On the bare optimizer: the rate is a function of the optimizer step alone, on any number of ranks."""
    schedule: Schedule


@dataclass(frozen=True, slots=True)
class StepResult:
    """The numbers of one optimizer step."""

    loss: float
    """Mean over the real samples of the global batch."""
    grad_norm: float
    """Of the whole gradient, before clipping."""
    learning_rate: float
    """Of the first group, as this step used it."""
    finite: bool
    """Whether the optimizer stepped; a gradient that is no number leaves weights and optimizer as they were."""
    wishes: list[bool]
    """Which of the wishes any rank has."""
    replaced: int
    """Samples of all ranks that stand for others whose latents are missing or broken."""
    counts: Counter[str]
    """What happened in this rank's samples, as `Batch.counts` names it."""
    keys: tuple[str, ...]
    """Of this rank's samples."""
    captions: tuple[str, ...]
    seconds: float
    waited_seconds: float
    """Of those, how long the loader was waited for."""


def train_step(trained: Trained, loader: Iterator[Batch], wishes: Callable[[], Sequence[bool]] = tuple) -> StepResult:
    """Train the next step's micro-batches from `loader`.

    The loss of a micro-batch is its samples' share of the step's mean, so how the global batch is dealt over ranks and
    micro-batches changes nothing but rounding. Loss, gradient norm and what the ranks must agree on - their `wishes`, asked
    for when the gradient is there - are read back together: one collective and one wait for the device a step.
    """
    engine, config = trained.engine, trained.config
    start, waited = time.perf_counter(), 0.0
    counts: Counter[str] = Counter()
    keys: list[str] = []
    captions: list[str] = []
    total = torch.zeros((), device=engine.device)
    # The engine divides by the accumulation and averages over ranks: shares of a mean need neither.
    undo = config.train.accumulation * engine.num_processes
    for _ in range(config.train.accumulation):
        asked = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - asked
        counts.update(batch.counts)
        keys += batch.keys
        captions += batch.captions
        with engine.accumulate(trained.model):
            loss = batch_loss(trained.model, batch.to(engine.device), trained.schedule, config.noise, config.loss)
            engine.backward(loss.value * undo)
        total += loss.value.detach()
    norm = clip_gradients([p for p in trained.model.parameters() if p.requires_grad], config.optimizer.clip_grad_norm)
    own = torch.tensor([counts["replaced"], *wishes()], dtype=torch.float32, device=engine.device)
    shared = sum_over_ranks(engine, torch.cat((total[None], own)))
    loss_read, replaced, *wished, norm_read = torch.cat((shared, norm.float()[None])).tolist()
    rate = float(trained.rates.get_last_lr()[0])
    if finite := math.isfinite(norm_read):
        trained.optimizer.step()
    trained.optimizer.zero_grad(set_to_none=True)
    trained.rates.step()
    return StepResult(
        loss=loss_read,
        grad_norm=norm_read,
        learning_rate=rate,
        finite=finite,
        wishes=[bool(wish) for wish in wished],
        replaced=int(replaced),
        counts=counts,
        keys=tuple(keys),
        captions=tuple(captions),
        seconds=time.perf_counter() - start,
        waited_seconds=waited,
    )
