"""Steps that are taken inside the backward pass: one parameter after the other, as gradients come.

Each gradient is freed as soon as its parameter has stepped, so they never lie in memory together.
The weights are those of an ordinary step, because an optimizer for which that is not so is refused
by its trial. What needs the whole gradient before the first step is refused too: clipping, skipping
a broken step, and sums over micro-batches or ranks.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from trainer.config.settings import Config
from trainer.errors import ConfigError
from trainer.training.engines.torch_step import Taken
from trainer.training.optimizer.portions import InPortions
from trainer.training.optimizer.stepping import guarded_step


class FusedStep:
    """The step of a single device whose backward pass steps the parameters.

    `optimizer` steps in portions; `wrapped` is the same in the wrapper of the engine.
    """

    can_repeat_pass = True

    def __init__(self, engine: Accelerator, optimizer: Optimizer, wrapped: Any) -> None:
        assert isinstance(optimizer, InPortions)
        optimizer.is_fused = True
        self._engine, self._optimizer, self._wrapped = engine, optimizer, wrapped
        self._norms: dict[Parameter, Tensor] = {}
        self._numbers = {
            parameter: number
            for number, group in enumerate(optimizer.param_groups)
            for parameter in group["params"]
        }
        for parameter in self._numbers:
            parameter.register_post_accumulate_grad_hook(self._step_one)

    @property
    def has_begun(self) -> bool:
        """True if parameters have stepped in a step that is not ended."""
        return bool(self._norms)

    def passes(self, *, last: bool) -> AbstractContextManager[Any]:
        """A context for the two passes of the only micro-batch of a step."""
        assert last, "several micro-batches are refused"
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Step each parameter with its gradient of the loss."""
        self._engine.backward(loss)

    def step(self, sums: Tensor) -> Taken:
        """End the step: its numbers, read back in one transfer, `sums` among them.

        If the gradient was not finite, the weights are broken, and the step counts as not taken.
        """
        # The norm that `clip_gradients` would return.
        norms = [self._norms[parameter] for parameter in self._numbers if parameter in self._norms]
        norm = torch.where(sums[-1] > 0, math.nan, get_total_norm(norms))
        stepped = guarded_step(self._wrapped, norm, *sums)
        if stepped.taken:
            self._norms.clear()
        return Taken(stepped.taken, stepped.grad_norm, stepped.scalars, loss_scale=None)

    def _step_one(self, parameter: Tensor) -> None:
        """Step a parameter whose gradient is there, and free the gradient."""
        assert isinstance(parameter, Parameter)
        assert parameter.grad is not None
        if parameter in self._norms:
            raise RuntimeError(
                "a parameter has got a second gradient in one step, after its step was taken. "
                "This is a bug."
            )
        self._norms[parameter] = torch.linalg.vector_norm(parameter.grad)
        self._optimizer.step_one(self._numbers[parameter], parameter)
        parameter.grad = None


def check_fused_backward(config: Config, ranks: int) -> None:
    """Raise `ConfigError` if a run of that many ranks cannot step inside the backward pass."""
    if config.optimizer.fused_backward and ranks > 1:
        raise ConfigError(
            f"optimizer.fused_backward: found {ranks} processes, expected one: a parameter would "
            "step before its gradient is summed over them. Set optimizer.fused_backward = false."
        )
