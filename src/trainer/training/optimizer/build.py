"""The optimizer that the config names, built and tried before the run starts.

Knows no model and no ranks.
"""

from typing import Any

import torch
from torch.optim import Optimizer

from trainer.config.settings import OptimizerSettings
from trainer.errors import ConfigError
from trainer.training.optimizer.classes import (
    checked_arguments,
    find_class,
    is_of_bitsandbytes,
)
from trainer.training.optimizer.fused_kernel import with_fused
from trainer.training.optimizer.portions import InPortions, in_portions
from trainer.training.optimizer.rates import build_schedule
from trainer.training.optimizer.stochastic_rounding import StochasticRounding
from trainer.training.optimizer.trial import (
    check_by_trial,
    moved_at_rest,
    refusal,
)


def build_optimizer(
    groups: list[dict[str, Any]],
    settings: OptimizerSettings,
    device: torch.device,
    rounding: StochasticRounding | None = None,
) -> Optimizer:
    """The optimizer that `[optimizer]` names, over parameter groups with `params`, `lr` and `name`.

    With `rounding`, and with `optimizer.fused_backward`, it is one of `InPortions`.

    First it takes steps on small weights on `device`, so that an optimizer that cannot train here
    (because it needs a GPU, a closure, or weights of two dimensions) is refused before the run
    starts, not at its first step. Raises `ConfigError` for an unknown name or argument, a package
    that is not installed, rates without effect, and whatever the class itself refuses.
    """
    optimizer_class = find_class(settings.name)
    arguments = with_fused(optimizer_class, checked_arguments(optimizer_class, settings), device)
    rounds = rounding is not None
    check_by_trial(optimizer_class, settings, arguments, groups, device, rounds=rounds)
    if rounds or settings.fused_backward:
        optimizer_class = in_portions(optimizer_class)
    try:
        optimizer = optimizer_class(groups, lr=groups[0]["lr"], **arguments)
    except Exception as error:  # another package's class may raise anything about its arguments
        raise refusal(optimizer_class, settings, device, str(error)) from error
    assert isinstance(optimizer, Optimizer)
    if isinstance(optimizer, InPortions):
        optimizer.rounding = rounding
    return optimizer


def check_optimizer(
    groups: list[dict[str, Any]], settings: OptimizerSettings, max_steps: int
) -> list[str]:
    """Raise the `ConfigError` that `build_optimizer` and `build_schedule` would raise.

    The trial runs on the device that would train. Some optimizers of bitsandbytes need a GPU; on a
    machine without one, such a refusal is among the lines to show that are returned.
    """
    optimizer_class = find_class(settings.name)
    arguments = checked_arguments(optimizer_class, settings)
    rounds = bool(settings.stochastic_rounding)
    build_schedule(torch.optim.SGD(groups, lr=groups[0]["lr"]), settings, max_steps)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    cpu = torch.device("cpu")
    try:
        check_by_trial(optimizer_class, settings, arguments, groups, device or cpu, rounds=rounds)
    except ConfigError as error:
        if device is not None or not is_of_bitsandbytes(settings.name):
            raise
        return [f"{error} With a GPU it may be able to: bitsandbytes is made for them."]
    return notes_on_optimizer(settings, device or cpu)


def notes_on_optimizer(settings: OptimizerSettings, device: torch.device) -> list[str]:
    """What to know about an optimizer that passed its trial, as lines to show."""
    optimizer_class = find_class(settings.name)
    moved = moved_at_rest(optimizer_class, checked_arguments(optimizer_class, settings), device)
    if not moved:
        return []
    note = (
        f"{settings.name} also moves weights whose gradient is 0, without any weight decay: by up "
        f"to {moved:.1g} in the trial of the optimizer."
    )
    return [note]
