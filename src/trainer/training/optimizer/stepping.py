"""A step of the optimizer: its gradients clipped, guarded against those that are not finite.

Knows no model and no ranks.
"""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from trainer.training.optimizer.options import unwrapped
from trainer.training.optimizer.portions import InPortions


def begin_step(optimizer: Optimizer, step: int) -> None:
    """Tell the optimizer the number of the step (from 0) that comes next, if it depends on it."""
    inner = unwrapped(optimizer)
    if isinstance(inner, InPortions):
        inner.begin_step(step)


def clip_gradients(parameters: Iterable[Parameter], max_norm: float) -> Tensor:
    """Scale all gradients to `max_norm` together, and return their norm from before, a scalar.

    0 for `max_norm` only measures. To be called once per step, on gradients that are already
    reduced over the ranks, so that each rank has the same norm. The norm stays on the device. If it
    is not finite, the gradients are useless and `guarded_step` drops them. Gradients in bf16 have
    their norm in bf16: within 0.4 %.
    """
    parameters = list(parameters)
    norm = get_total_norm(
        [parameter.grad for parameter in parameters if parameter.grad is not None]
    )
    if max_norm:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


class Stepped(NamedTuple):
    """The result of an optimizer step."""

    taken: bool
    """False if the gradient was not finite: weights and optimizer state are as before the step."""
    grad_norm: float
    """Norm of the gradient before clipping."""
    scalars: tuple[float, ...]
    """The values of the scalars that were passed in."""


def guarded_step(optimizer: Optimizer, grad_norm: Tensor, *scalars: Tensor) -> Stepped:
    """Take one optimizer step, or none if `grad_norm` is not finite, and clear the gradients.

    `grad_norm` comes from `clip_gradients`. It is of the reduced gradients, the same number on
    every rank, so all ranks decide alike without asking each other. The norm and the `scalars`,
    such as a loss, are read back from the device in one transfer, which is the only time a step
    waits for the device; scalars decide nothing, so they may differ between ranks. Not for an
    engine that clips and skips by itself (DeepSpeed). Raises `RuntimeError` when the step was
    swallowed on its way to the optimizer: a step that moved nothing must not count as taken.
    """
    norm, *values = torch.stack(
        [grad_norm.detach().float(), *(scalar.detach().float() for scalar in scalars)]
    ).tolist()
    taken = math.isfinite(norm)
    if taken:
        _step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    return Stepped(taken, norm, tuple(values))


def _step(optimizer: Optimizer) -> None:
    """Take one step, and raise `RuntimeError` if it did not happen.

    accelerate's wrapper returns from `step` without one when it takes the gradient for unfinished.
    """
    happened: list[bool] = []
    hook = unwrapped(optimizer).register_step_post_hook(lambda *_: happened.append(True))
    try:
        optimizer.step()
    finally:
        hook.remove()
    if not happened:
        raise RuntimeError(
            "the engine did not pass a step on to the optimizer: the weights are as before. "
            "This is a bug."
        )


@contextmanager
def weights_for_use(optimizer: Optimizer) -> Iterator[None]:
    """Inside the context, the weights are those to save or to sample with.

    Schedule-free optimizers train other weights than the averages that are meant for use. For a
    trained model, not for the state of a run, which is saved as it trains. Afterwards the weights
    are bit for bit as before; meanwhile a copy of them is held in main memory. For other optimizers
    nothing happens.
    """
    # Unwrapped, because accelerate's wrapper has eval() for every optimizer.
    inner = unwrapped(optimizer)
    if not hasattr(inner, "eval"):
        yield
        return
    trained = [
        (parameter, parameter.detach().cpu().clone())
        for group in inner.param_groups
        for parameter in group["params"]
    ]
    inner.eval()
    try:
        yield
    finally:
        inner.train()
        # Switching there and back rounds, so the exact weights are copied back.
        for parameter, copy in trained:
            parameter.data.copy_(copy)
