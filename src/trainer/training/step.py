"""One optimizer step, from micro-batches to numbers; it can be tested without a run around it."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from traceback import clear_frames
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from trainer.config.settings import Config, family_of
from trainer.data.batch import Batch
from trainer.model.build import build_model
from trainer.model.device_copy import copy_to
from trainer.model.model import Model
from trainer.model.noise_schedule import Schedule
from trainer.training.ema import Ema
from trainer.training.engines.accelerator import problem_of_lost_rank, sum_over_ranks
from trainer.training.engines.loss_scaling import LossScaling
from trainer.training.engines.masters import Masters
from trainer.training.engines.torch_step import EngineStep
from trainer.training.loss import Loss, batch_loss
from trainer.training.optimizer.rates import RateSchedule
from trainer.training.optimizer.stepping import begin_step
from trainer.training.speed.prefetch import BatchesAhead
from trainer.training.step_clock import RankTimes, StepClock


@dataclass(frozen=True, slots=True)
class TrainState:
    """Everything that a step trains with; the engine has prepared `model` and `optimizer`."""

    engine: Accelerator
    config: Config
    model: torch.nn.Module
    bare_model: Model
    """The model without the engine's wrapper.

    It is kept because asking accelerate for it imports DeepSpeed where that is installed (2 s).
    """
    optimizer: Any
    rates: RateSchedule
    schedule: Schedule
    scaling: LossScaling
    engine_step: EngineStep
    masters: Masters
    clock: StepClock
    ema: Ema | None = None
    speed: str = ""
    """What `[speed]` has chosen, in words."""

    def shapes(self) -> Model:
        """A model with the shapes of whole weights.

        `bare_model` lacks them where the ranks divide its weights.
        """
        return (
            build_model(self.config, weights=False) if self.masters.is_divided else self.bare_model
        )


class Requests(NamedTuple):
    """A rank's requests for the time after the current step; one rank's request is enough."""

    stop: bool = False
    save: bool = False


@dataclass(frozen=True, slots=True)
class StepResult:
    """The numbers of one optimizer step."""

    loss: float
    """Mean over the real samples of the global batch."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    rates: dict[str, float]
    """The learning rates of this step, by the names of their groups."""
    taken: bool
    """False if the gradient was not finite: weights and optimizer state are as before the step.

    If the backward pass steps the parameters, they are broken then.
    """
    stop_requested: bool
    """True if any rank asked to stop after this step."""
    save_requested: bool
    """True if any rank asked to save the state after this step."""
    failed: bool
    """True if any rank met an error: then the step was not taken, and only `failure` counts."""
    failure: Exception | None
    """The error of this rank, which the other ranks do not know."""
    replaced: int
    """Samples of all ranks that replace others whose latents are missing or broken."""
    loss_scale: float | None
    """The factor by which the loss of this step was scaled for fp16; None in other precisions."""
    counts: Counter[str]
    """Events in this rank's samples, by the names of `Batch.counts`."""
    keys: tuple[str, ...]
    """Keys of this rank's samples."""
    captions: tuple[str, ...]
    """Captions of this rank's samples."""
    seconds: float
    """Duration of the whole step."""
    waited_seconds: float
    """The part of `seconds` that was spent waiting for the loader."""
    rank_times: tuple[RankTimes, ...]
    """The times of the step before on each rank; none on a single rank, and for the first step."""

    @property
    def may_scale_less(self) -> bool:
        """True if a gradient that is not finite may come from a loss that was scaled too much."""
        return self.loss_scale is not None and self.loss_scale > 1


def train_step(
    state: TrainState,
    loader: Iterator[Batch],
    step: int,
    requests: Callable[[], Requests] = Requests,
    failure: Exception | None = None,
) -> StepResult:
    """Train the micro-batches of `step` (from 0), the next of `loader`, and return its numbers.

    The loss of a micro-batch is its samples' share of the step's mean, so how the global batch is
    divided into ranks and micro-batches changes nothing but rounding, unless they differ in their
    chunks of padding (`text.max_tokens`). The loss, the gradient norm and what the ranks must agree
    on - their `requests`, asked for when the gradient is ready - cross in one collective and are
    read back together: each step waits for the device once.

    On one of several ranks, an error of the loader or of a forward pass is not raised: the others
    would wait for this rank for ever. It takes part with a batch that weighs nothing, and no rank
    steps. `failure` is such an error from before the step. Only where ranks exchange weights in the
    forward pass itself (ZeRO-3) is its error raised: the others notice by the heartbeat.
    """
    engine, config = state.engine, state.config
    clock = state.clock
    clock.start()
    counts: Counter[str] = Counter()
    keys: list[str] = []
    captions: list[str] = []
    rates = state.rates.set_rates(step)
    begin_step(state.optimizer, step)
    loss_sum = torch.zeros((), device=engine.device)

    def loss_of(batch: Batch) -> Loss:
        with state.scaling.autocast():
            return batch_loss(
                state.model, batch.to(engine.device), state.schedule, config.noise, config.loss
            )

    # Accumulate the gradients of all micro-batches.
    for micro in range(config.train.accumulation):
        last = micro == config.train.accumulation - 1
        with state.engine_step.passes(last=last):
            if failure is None:
                is_passing = False
                try:
                    asked = time.perf_counter()
                    batch = next(loader)
                    clock.add_data_wait(time.perf_counter() - asked)
                    is_passing = True
                    counts.update(batch.counts)
                    keys += batch.keys
                    captions += batch.captions
                    loss = loss_of(batch)
                except Exception as error:
                    if (
                        engine.num_processes == 1
                        or problem_of_lost_rank(error)
                        or (is_passing and not state.engine_step.can_repeat_pass)
                    ):
                        raise
                    clear_frames(error.__traceback__)  # they hold the tensors of the pass
                    failure = error
            if failure is not None:
                loss = loss_of(Batch.stand_in(family_of(config.model)))
            if last:
                clock.arrive()
            # The engine averages gradients over ranks, but shares of a mean have to be added up.
            state.engine_step.backward(loss.value * engine.num_processes)
            # While the device computes.
            if isinstance(loader, BatchesAhead) and failure is None:
                asked = time.perf_counter()
                loader.fetch()
                clock.add_data_wait(time.perf_counter() - asked)
        loss_sum += loss.value.detach()

    # Sum over the ranks what they must agree on: the only collective besides the gradients'.
    times = clock.to_be_summed()
    of_this_rank = [*times, counts["replaced"], *requests(), failure is not None]
    local_sums = copy_to(engine.device, torch.tensor(of_this_rank, dtype=torch.float32))
    global_sums = sum_over_ranks(engine, torch.cat((loss_sum[None], local_sums)))

    # Step, unless a rank has failed or the gradient is broken.
    stepped = state.engine_step.step(global_sums)
    mean_loss, *others = stepped.sums
    replaced, stops, saves, failed = others[len(times) :]
    if state.ema and stepped.taken:
        state.ema.update(step)
    seconds, waited_seconds = clock.end()
    return StepResult(
        loss=mean_loss,
        grad_norm=stepped.grad_norm,
        rates=rates,
        taken=stepped.taken,
        stop_requested=stops > 0,
        save_requested=saves > 0,
        failed=failed > 0,
        failure=failure,
        replaced=int(replaced),
        loss_scale=stepped.loss_scale,
        counts=counts,
        keys=tuple(keys),
        captions=tuple(captions),
        seconds=seconds,
        waited_seconds=waited_seconds,
        rank_times=clock.of_all_ranks(others[: len(times)]),
    )
