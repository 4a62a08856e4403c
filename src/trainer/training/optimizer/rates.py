"""The learning rates of a run: a function of the optimizer step alone, as `[optimizer]` says."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType
from torch.nn import Parameter
from torch.optim import Optimizer

from trainer.config.settings import OptimizerSettings
from trainer.errors import ConfigError
from trainer.training.optimizer.classes import parameter_names


@dataclass(frozen=True, slots=True)
class RateSchedule:
    """The learning rates of a run, which depend on the optimizer step alone.

    Nothing is counted, saved or restored, so they are the same on one rank and on four, after a
    skipped step and after a resume.
    """

    optimizer: Optimizer
    base_rates: tuple[float, ...]
    """The configured rate of each group."""
    share: Callable[[int], float]
    """The factor of all rates at a step (from 0)."""

    def set_rates(self, step: int) -> dict[str, float]:
        """Set each group's rate for `step` (from 0), and return the rates by `lr_<group name>`.

        To be called before the optimizer takes that step.
        """
        groups = self.optimizer.param_groups
        for group, base_rate in zip(groups, self.base_rates, strict=True):
            group["lr"] = base_rate * self.share(step)
        return {f"lr_{group['name']}": group["lr"] for group in groups}


def build_schedule(
    optimizer: Optimizer, settings: OptimizerSettings, max_steps: int
) -> RateSchedule:
    """The schedule of diffusers that `optimizer.schedule` names, over `max_steps` optimizer steps.

    To be built before a saved state is loaded, which overwrites the groups' rates with those of its
    own step. The rate at which the polynomial schedule ends is the first group's; the others shrink
    in proportion. Raises `ConfigError` for a rate or arguments that the schedule refuses.
    """
    function: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(settings.schedule)]
    steps = {"num_warmup_steps": settings.warmup_steps, "num_training_steps": max_steps}
    arguments = {
        name: value for name, value in steps.items() if name in parameter_names(function)
    } | dict(settings.schedule_arguments)
    base_rates = tuple(group["lr"] for group in optimizer.param_groups)
    # The schedulers of diffusers count their own calls. Their function of the step, taken from one
    # over a stand-in optimizer, counts nothing.
    stand_in = torch.optim.SGD([Parameter(torch.zeros(()))], lr=base_rates[0])
    try:
        (share,) = function(stand_in, **arguments).lr_lambdas
        share(max_steps - 1)
    except (TypeError, ValueError) as error:
        reason = str(error).rstrip(" .!")
        raise ConfigError(
            f"optimizer.schedule: {settings.schedule} cannot move a rate of {base_rates[0]} over "
            f"{max_steps} steps with optimizer.schedule_arguments = "
            f"{dict(settings.schedule_arguments)}: {reason}. Change them, or choose "
            "another schedule."
        ) from error
    return RateSchedule(optimizer, base_rates, share)


def list_moved_rates(rates: RateSchedule, step: int) -> dict[str, tuple[float, float]]:
    """The rates with which a loaded optimizer took its last step, and those of `rates` for it.

    By `lr_<group name>`; only rates that differ, and none for a state from before the first step.
    `step` counts the steps that are done.
    """
    if not step:
        return {}
    found = {
        f"lr_{group['name']}": (float(group["lr"]), base_rate * rates.share(step - 1))
        for group, base_rate in zip(rates.optimizer.param_groups, rates.base_rates, strict=True)
    }
    return {name: pair for name, pair in found.items() if not math.isclose(*pair, rel_tol=1e-6)}
