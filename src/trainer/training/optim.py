"""Optimizer and learning rates from config, clipping, and the step that a broken gradient does not take. Knows no model and no ranks."""

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from diffusers.optimization import TYPE_TO_SCHEDULER_FUNCTION, SchedulerType
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from trainer.config.settings import OptimizerSettings
from trainer.errors import ConfigError

_OF_BITSANDBYTES = re.compile(r"Paged\w+|\w+(8|32)bit")
_ADAFACTOR_DEFAULTS = {"relative_step": False, "scale_parameter": False}
"""Where the class's own would leave `optimizer.learning_rate` without effect, or all but: `relative_step` makes a rate of its own,
`scale_parameter` multiplies the rate by the size of the weights, which is about 0.02, so that 1e-5 would train as 2e-7."""


def build_optimizer(
    groups: list[dict[str, Any]], settings: OptimizerSettings, device: torch.device
) -> Optimizer:
    """The optimizer that `[optimizer]` names, over parameter groups with `params`, `lr` and `name`.

    `Adafactor` is transformers', a name such as AdamW8bit or PagedAdamW bitsandbytes'; of the
    others torch.optim's come before pytorch-optimizer's. One step on three small weights on
    `device` comes first: what cannot train here (it needs a GPU, a closure, weights of two
    dimensions) is known before a run starts, not at its first step. Raises `ConfigError` for an
    unknown name or argument, a package that is not installed, and whatever the class itself
    refuses.
    """
    optimizer_class = _find_class(settings.name)
    arguments = _checked_arguments(optimizer_class, settings)
    trial = [Parameter(torch.ones(shape, device=device)) for shape in ((2,), (2, 2), (2, 2, 3, 3))]
    for parameter in trial:
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer_class([{**groups[0], "params": trial}], lr=groups[0]["lr"], **arguments).step()
        optimizer = optimizer_class(groups, lr=groups[0]["lr"], **arguments)
    except Exception as error:  # whatever a class of another package says to its arguments
        raise ConfigError(
            f"optimizer.name: {settings.name} ({optimizer_class.__module__}) cannot train here, on {device.type} with "
            f"optimizer.arguments = {settings.arguments}: {_said(error)}. Change the arguments, or choose another optimizer."
        ) from error
    assert isinstance(optimizer, Optimizer)
    return optimizer


def check_optimizer(
    groups: list[dict[str, Any]], settings: OptimizerSettings, max_steps: int
) -> None:
    """Raise the `ConfigError` of `build_optimizer` and `build_schedule`, as far as it can be told without the device and its weights."""
    _checked_arguments(_find_class(settings.name), settings)
    build_schedule(torch.optim.SGD(groups, lr=groups[0]["lr"]), settings, max_steps)


def _find_class(name: str) -> type[Any]:
    if name == "Adafactor":
        found: type[Any] = import_module("transformers.optimization").Adafactor
        return found
    if _OF_BITSANDBYTES.fullmatch(name):
        try:
            of_bitsandbytes = _classes(import_module("bitsandbytes.optim"))
        except ImportError as error:
            raise ConfigError(
                f"optimizer.name: {name} is bitsandbytes', which cannot be imported ({error}). Install it (pip install bitsandbytes), "
                "or choose another optimizer, such as AdamW."
            ) from error
        return _named(
            name,
            {
                known: found
                for known, found in of_bitsandbytes.items()
                if _OF_BITSANDBYTES.fullmatch(known)
            },
        )
    known, more = _classes(torch.optim), ""
    if name not in known:
        try:
            known = {**_classes(import_module("pytorch_optimizer")), **known}
        except ImportError as error:
            more = f" pytorch-optimizer has more, and cannot be imported ({error}). For one of its own: pip install pytorch-optimizer."
    return _named(name, known, more)


def _classes(module: ModuleType) -> dict[str, type[Any]]:
    """The optimizers in a module, by name."""
    found = {name: value for name, value in vars(module).items() if inspect.isclass(value)}
    return {
        name: value
        for name, value in found.items()
        if issubclass(value, Optimizer) and value is not Optimizer
    }


def _named(name: str, known: dict[str, type[Any]], more: str = "") -> type[Any]:
    if name in known:
        return known[name]
    by_lower = {name.lower(): name for name in known}
    near = " or ".join(
        f"`{by_lower[lower]}`" for lower in difflib.get_close_matches(name.lower(), by_lower)
    )
    all_of_them = "Expected a class of torch.optim or pytorch-optimizer, or an 8-bit, 32-bit or paged one of bitsandbytes."
    raise ConfigError(
        f"optimizer.name: unknown optimizer `{name}`. {f'Did you mean {near}?' if near else all_of_them}{more}"
    )


def _checked_arguments(optimizer_class: type[Any], settings: OptimizerSettings) -> dict[str, Any]:
    """The arguments for the class, lists as the tuples that it expects.

    Names alone count as known: a class of pytorch-optimizer also swallows names that mean nothing.
    """
    accepted = _parameters(optimizer_class) - {"params", "lr"}
    defaults = _ADAFACTOR_DEFAULTS if settings.name == "Adafactor" else {}
    if defaults:
        accepted -= {"relative_step", "warmup_init"}  # rates of its own
    unknown = ", ".join(f"`{name}`" for name in settings.arguments if name not in accepted)
    if unknown:
        raise ConfigError(
            f"optimizer.arguments: unknown argument {unknown} for optimizer.name = {settings.name}, expected {', '.join(sorted(accepted))}."
        )
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.arguments.items()
    }
    return {**defaults, **given}


def _parameters(function: Callable[..., Any]) -> set[str]:
    """The names of all parameters that can be given by name."""
    found = inspect.signature(function).parameters.values()
    return {
        parameter.name
        for parameter in found
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }


def _said(error: Exception) -> str:
    """The message of another package's exception, to end with a full stop of ours."""
    return str(error).rstrip(" .!")


@dataclass(frozen=True, slots=True)
class RateSchedule:
    """The learning rates of a run as a function of the optimizer step alone: nothing of it is counted, saved or restored.

    So they are the same on one rank and on four, after a skipped step and after a resume.
    """

    optimizer: Optimizer
    base_rates: tuple[float, ...]
    """Of each group, as configured."""
    share: Callable[[int], float]
    """What a rate is multiplied by at a step, from 0."""

    def set_rates(self, step: int) -> dict[str, float]:
        """Give each group its rate for `step` (from 0), before the optimizer takes it; the rates as `lr_<name of the group>`."""
        groups = self.optimizer.param_groups
        for group, base_rate in zip(groups, self.base_rates, strict=True):
            group["lr"] = base_rate * self.share(step)
        return {f"lr_{group['name']}": group["lr"] for group in groups}


def build_schedule(
    optimizer: Optimizer, settings: OptimizerSettings, max_steps: int
) -> RateSchedule:
    """The schedule of diffusers that `optimizer.schedule` names, over `max_steps` optimizer steps.

    To be built before a saved state is loaded: that brings the groups' rates of its own step. The
    rate at which the polynomial schedule ends is the first group's; the others shrink as it does.
    Raises `ConfigError` for a rate or arguments that the schedule refuses.
    """
    function: Any = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(settings.schedule)]
    steps = {"num_warmup_steps": settings.warmup_steps, "num_training_steps": max_steps}
    arguments = {
        name: value for name, value in steps.items() if name in _parameters(function)
    } | dict(settings.schedule_arguments)
    base_rates = tuple(group["lr"] for group in optimizer.param_groups)
    # diffusers makes a scheduler that counts its own calls; its function of the step, taken from
    # one over a stand-in, counts nothing.
    stand_in = torch.optim.SGD([Parameter(torch.zeros(()))], lr=base_rates[0])
    try:
        (share,) = function(stand_in, **arguments).lr_lambdas
        share(max_steps - 1)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"optimizer.schedule: {settings.schedule} cannot move a rate of {base_rates[0]} over {max_steps} steps with "
            f"optimizer.schedule_arguments = {dict(settings.schedule_arguments)}: {_said(error)}. Change them, or choose another schedule."
        ) from error
    return RateSchedule(optimizer, base_rates, share)


def clip_gradients(parameters: Iterable[Parameter], max_norm: float) -> Tensor:
    """The norm of all gradients together before clipping, a scalar on their device; they are scaled to `max_norm` unless that is 0.

    To be called once a step, on gradients that are already reduced over the ranks, so that each
    rank has the same norm. Nothing is read back here. A norm that is not finite leaves gradients of
    no use: `guarded_step` drops them. Gradients in bf16 have their norm in bf16: within 0.4 %.
    """
    parameters = list(parameters)
    norm = get_total_norm(
        [parameter.grad for parameter in parameters if parameter.grad is not None]
    )
    if max_norm:
        clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


class Stepped(NamedTuple):
    """What became of an optimizer step."""

    taken: bool
    """False: the gradient was not finite, and weights and optimizer state are as before."""
    grad_norm: float
    """Before clipping."""
    logged: tuple[float, ...]
    """The values of the scalars that were handed in."""


def guarded_step(optimizer: Optimizer, grad_norm: Tensor, *logged: Tensor) -> Stepped:
    """One step of the optimizer, or none when the norm of `clip_gradients` is not finite; the gradients are gone either way.

    The norm is of the reduced gradients, the same number on every rank, so all ranks decide alike
    without asking each other. Norm and `logged` scalars (a loss) on one device come back in one
    transfer, which is the only time a step waits for the device; scalars that differ between ranks
    may be logged, they decide nothing. Not for an engine that clips and skips by itself
    (DeepSpeed). Raises `RuntimeError` when the step was swallowed on its way to the optimizer: no
    step counts as taken that moved nothing.
    """
    norm, *values = torch.stack(
        [grad_norm.detach().float(), *(scalar.detach().float() for scalar in logged)]
    ).tolist()
    taken = math.isfinite(norm)
    if taken:
        _step(optimizer)
    optimizer.zero_grad(set_to_none=True)
    return Stepped(taken, norm, tuple(values))


def _step(optimizer: Optimizer) -> None:
    """One step, seen to happen: a wrapper of accelerate returns from `step` without one when it takes the gradient for unfinished."""
    happened: list[bool] = []
    hook = _unwrapped(optimizer).register_step_post_hook(lambda *_: happened.append(True))
    try:
        optimizer.step()
    finally:
        hook.remove()
    if not happened:
        raise RuntimeError(
            "the engine did not hand an optimizer step on to the optimizer: the weights are as before. This is a bug."
        )


def _unwrapped(optimizer: Optimizer) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


@contextmanager
def weights_for_use(optimizer: Optimizer) -> Iterator[None]:
    """Inside, the weights are those to save or sample with: schedule-free optimizers train others than their averages.

    For a trained model, not for the state of a run, which is saved as it trains. Afterwards the
    weights are bit for bit as before; meanwhile a copy of them is held in main memory. For other
    optimizers nothing happens.
    """
    inner = _unwrapped(optimizer)  # the wrapper has eval() for every optimizer
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
        for parameter, copy in trained:  # there and back again rounds
            parameter.data.copy_(copy)
