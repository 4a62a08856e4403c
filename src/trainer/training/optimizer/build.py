"""Optimizer and learning rates from the config, gradient clipping, and the guarded step.

Knows no model and no ranks.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from trainer.config.settings import OptimizerSettings
from trainer.errors import ConfigError
from trainer.training.optimizer.classes import (
    checked_arguments,
    find_class,
    is_of_bitsandbytes,
    parameter_names,
)
from trainer.training.optimizer.fused_kernel import with_fused
from trainer.training.optimizer.portions import InPortions, in_portions
from trainer.training.optimizer.stochastic_rounding import StochasticRounding
from trainer.training.optimizer.trial import (
    check_by_trial,
    kept_names,
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


Options = list[dict[str, Any]]
"""All options of each parameter group of an optimizer, among them its arguments."""


def options_of(optimizer: Optimizer) -> Options:
    """The options of an optimizer's parameter groups, copied."""
    return [
        {name: deepcopy(value) for name, value in group.items() if name != "params"}
        for group in _unwrapped(optimizer).param_groups
    ]


def replace_arguments(
    optimizer: Optimizer, built: Options, names: set[str] | None
) -> dict[str, tuple[Any, Any]]:
    """Give each parameter group the arguments that it was `built` with.

    Only those in `names`; None stands for all but the rate. Returns the values before and now of
    the arguments that differ, by name.
    """
    inner = _unwrapped(optimizer)
    known = parameter_names(type(inner)) - {"params", "lr"}
    replaced = {}
    for group, values in zip(inner.param_groups, built, strict=True):
        for name in known & values.keys() & group.keys() if names is None else known & names:
            if name in values and group.get(name) != values[name]:
                replaced[name] = group.get(name), values[name]
                group[name] = values[name]
    return replaced


def lacks_state(optimizer: Optimizer, replaced: Mapping[str, tuple[Any, Any]]) -> bool:
    """True if the optimizer needs more than it has kept, since arguments of it were replaced."""
    inner = _unwrapped(optimizer)
    known = parameter_names(type(inner)) - {"params", "lr"}
    group = inner.param_groups[0]
    now = {name: group[name] for name in known & group.keys()}
    before = now | {name: value for name, (value, _) in replaced.items()}
    device = group["params"][0].device
    needed, kept = (kept_names(type(inner), one, device) for one in (now, before))
    return not needed <= kept


def begin_anew(optimizer: Optimizer, built: Options) -> None:
    """Let an optimizer go on as it was `built`, without what was loaded into it."""
    inner = _unwrapped(optimizer)
    inner.state.clear()
    for group, values in zip(inner.param_groups, built, strict=True):
        parameters = group["params"]
        group.clear()
        group.update(values, params=parameters)


def begin_step(optimizer: Optimizer, step: int) -> None:
    """Tell the optimizer the number of the step (from 0) that comes next, if it depends on it."""
    inner = _unwrapped(optimizer)
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
    hook = _unwrapped(optimizer).register_step_post_hook(lambda *_: happened.append(True))
    try:
        optimizer.step()
    finally:
        hook.remove()
    if not happened:
        raise RuntimeError(
            "the engine did not pass a step on to the optimizer: the weights are as before. "
            "This is a bug."
        )


def _unwrapped(optimizer: Optimizer) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


@contextmanager
def weights_for_use(optimizer: Optimizer) -> Iterator[None]:
    """Inside the context, the weights are those to save or to sample with.

    Schedule-free optimizers train other weights than the averages that are meant for use. For a
    trained model, not for the state of a run, which is saved as it trains. Afterwards the weights
    are bit for bit as before; meanwhile a copy of them is held in main memory. For other optimizers
    nothing happens.
    """
    # Unwrapped, because accelerate's wrapper has eval() for every optimizer.
    inner = _unwrapped(optimizer)
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
