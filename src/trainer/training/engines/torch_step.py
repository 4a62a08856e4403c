"""The passes and the step of a run whose engine leaves them to torch: DDP, or a single device."""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.training.engines.loss_scaling import LossScaling
from trainer.training.optimizer.stepping import clip_gradients, guarded_step


class Taken(NamedTuple):
    """The result of a step, the same on every rank."""

    taken: bool
    """False if a rank has failed or the gradient was not finite: nothing has changed."""
    grad_norm: float
    """Norm of the whole gradient before clipping."""
    sums: tuple[float, ...]
    """The values of the scalars that were passed in."""
    loss_scale: float | None
    """The factor by which the loss was scaled for fp16; None in other precisions."""


class EngineStep(Protocol):
    """What differs between engines in a step."""

    can_repeat_pass: bool
    """True if a rank whose forward pass has failed may begin another one in its place.

    False for an engine whose ranks exchange something in that pass: the others would wait.
    """

    @property
    def has_begun(self) -> bool:
        """True if a part of the weights has stepped, and the others have not."""

    def passes(self, *, last: bool) -> AbstractContextManager[Any]:
        """A context for the two passes of a micro-batch; `last` is the last one of its step."""

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss, averaged over the ranks after the last pass of a step."""

    def step(self, sums: Tensor) -> Taken:
        """Clip the gradient and take the step, and clear the gradient.

        `sums` are scalars to be read back, the same on every rank; the last is above 0 if a rank
        has failed. Then no step is taken, nor if the gradient is not finite.
        """


class TorchStep:
    """The step of DDP and of a single device."""

    can_repeat_pass = True
    has_begun = False

    def __init__(
        self,
        engine: Accelerator,
        model: nn.Module,
        optimizer: Any,
        scaling: LossScaling,
        max_norm: float,
    ) -> None:
        self._engine, self._model, self._optimizer = engine, model, optimizer
        self._scaling, self._max_norm = scaling, max_norm
        self._trained = [parameter for parameter in model.parameters() if parameter.requires_grad]

    def passes(self, *, last: bool) -> AbstractContextManager[Any]:
        """A context for the two passes of a micro-batch; `last` is the last one of its step."""
        # Ranks add up their gradients at the last micro-batch. Not by `engine.accumulate`: it
        # counts micro-batches over the whole run and saves its count, so a run that is resumed with
        # another accumulation would step in the middle of a batch, or never.
        return nullcontext() if last else self._engine.no_sync(self._model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of the loss, averaged over the ranks after the last pass of a step."""
        self._engine.backward(self._scaling.scaled(loss))

    def step(self, sums: Tensor) -> Taken:
        """Clip the gradient and step; the numbers are read back in one transfer."""
        self._scaling.unscale(self._optimizer)
        norm = clip_gradients(self._trained, self._max_norm)
        norm = torch.where(sums[-1] > 0, math.nan, norm)
        stepped = guarded_step(self._optimizer, norm, *sums, self._scaling.scale())
        *values, loss_scale = stepped.scalars
        if not values[-1]:
            self._scaling.update()
        return Taken(
            stepped.taken,
            stepped.grad_norm,
            tuple(values),
            loss_scale if self._scaling.is_on else None,
        )
