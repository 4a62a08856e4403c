"""The trial of an optimizer: steps on small weights that show whether it can train, and how.

An optimizer that cannot train here, or on which the learning rates have no effect, is refused
before the run starts, not noticed after days. Knows no model.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from trainer.config.settings import OptimizerSettings
from trainer.errors import ConfigError
from trainer.training.optimizer.classes import parameter_names
from trainer.training.optimizer.portions import in_portions

_SHAPES = ((2,), (2, 2), (2, 2, 3, 3))
_8_BIT_SHAPE = (64, 64)
"""The smallest size from which bitsandbytes keeps a state in 8 bits."""
_RATES = (1e-2, 5e-3)
_MOST_STEPS = 20
"""The steps after which two rates count as one.

AdaShift moves nothing for 10 steps, ScheduleFreeRAdam for 5. Nearly all others differ at the first.
"""
_STEPS_AT_REST = 3
"""Steps with gradients of 0: all that move weights by them do so at the first or the second."""
_DECAYS = frozenset({"weight_decay", "weight_decay_1d"})
"""The arguments that move weights by design; MARS has one of its own for biases."""
_LARGEST_SIDE = 2048
"""Largest side of a weight for the optimizers of `_WHOLE_MATRICES`.

Measured on one core for a single side: Shampoo takes 0.6 s per step at 1,024 and 5.6 s at 2,048,
growing with the third power, DASH and Alice take seconds at their first step. None of them came to
an end in 30 s at 20,000, where Shampoo also needs 6 GB; the vocabulary of CLIP is 49,408.
"""
_WHOLE_MATRICES = frozenset({"Shampoo", "Alice", "DASH"})
"""Optimizers that decompose a matrix of side x side numbers for each side of each weight.

SOAP, Kron and ScalableShampoo do so too, but leave large sides out or cut them into blocks.
"""


def check_by_trial(
    optimizer_class: type[Any],
    settings: OptimizerSettings,
    arguments: Mapping[str, Any],
    groups: Sequence[Mapping[str, Any]],
    device: torch.device,
    *,
    rounds: bool = False,
) -> None:
    """Raise `ConfigError` if the optimizer cannot train `groups` on `device` as the settings say.

    `rounds` tells that weights are rounded stochastically. It takes steps on small weights of its
    own, and leaves the random state of the CPU as it was.
    """
    _check_sides(settings, groups)
    with torch.random.fork_rng(devices=[]):
        try:
            _Trial(optimizer_class, arguments, device, (groups[0]["lr"],)).step(0)
            # At a usual rate: one that is far too high is for the run to notice.
            trial = _Trial(optimizer_class, arguments, device, _RATES[:1])
            trial.step(0)
            ignores_all = _move_alike(optimizer_class, arguments, device, _RATES[:1], _RATES[1:])
            ignores_groups = len({group["lr"] for group in groups}) > 1 and _move_alike(
                optimizer_class, arguments, device, (_RATES[0], _RATES[0]), _RATES
            )
            mixes = (rounds or settings.fused_backward) and _mixes_weights(
                optimizer_class, arguments, device, backwards=settings.fused_backward
            )
            moved = moved_at_rest(optimizer_class, arguments, device)
        except Exception as error:  # another package's class may raise anything about its arguments
            raise refusal(optimizer_class, settings, device, str(error)) from error
    if not trial.is_finite():
        text = "its first step makes weights that are not finite"
        raise refusal(optimizer_class, settings, device, text)
    if ignores_all:
        raise ConfigError(
            f"optimizer.name: {settings.name} ({optimizer_class.__module__}) trains the same with "
            f"any learning rate, found optimizer.arguments = {settings.arguments}. Change the "
            "arguments (AdaFactor needs relative_step = false), or choose another optimizer."
        )
    if ignores_groups:
        found = ", ".join(f"{group['lr']:g} for {group['name']}" for group in groups)
        raise ConfigError(
            f"optimizer.name: {settings.name} ({optimizer_class.__module__}) trains all parts at "
            f"one rate, found the rates {found}, expected one number. Set them to the same number "
            "(0 freezes a part), or choose another optimizer."
        )
    if moved > _RATES[0]:
        raise ConfigError(
            f"optimizer.name: {settings.name} ({optimizer_class.__module__}) moves weights whose "
            f"gradient is 0 by up to {moved:.2g} with a rate of {_RATES[0]:g}, so it would undo "
            "what the model has learned, expected next to nothing. Choose another optimizer."
        )
    if mixes:
        name = "fused_backward" if settings.fused_backward else "stochastic_rounding"
        raise ConfigError(
            f"optimizer.{name}: {settings.name} ({optimizer_class.__module__}) trains otherwise "
            "when it steps each parameter by itself, expected an optimizer that looks at one "
            f"parameter at a time. Set optimizer.{name} = false, or choose another optimizer."
        )


def moved_at_rest(
    optimizer_class: type[Any], arguments: Mapping[str, Any], device: torch.device
) -> float:
    """How far weights are moved at most by some steps with gradients of 0 and no weight decay.

    Infinite if they are not finite then. The rate is that of the other trials.
    """
    no_decay = dict.fromkeys(_DECAYS & parameter_names(optimizer_class), 0.0)
    trial = _Trial(optimizer_class, {**arguments, **no_decay}, device, _RATES[:1])
    start = trial.last_group()
    for _ in range(_STEPS_AT_REST):
        trial.rest()
    moved = (trial.last_group() - start).abs().max().item()
    return moved if math.isfinite(moved) else math.inf


def kept_names(
    optimizer_class: type[Any], arguments: Mapping[str, Any], device: torch.device
) -> set[str]:
    """The names of what the optimizer keeps for its weights from step to step.

    Some arguments add to it, such as a momentum. Leaves the random state of the CPU as it was.
    """
    with torch.random.fork_rng(devices=[]):
        trial = _Trial(optimizer_class, arguments, device, _RATES[:1])
        trial.step(0)
    return trial.kept_names()


def refusal(
    optimizer_class: type[Any], settings: OptimizerSettings, device: torch.device, reason: str
) -> ConfigError:
    """The error about an optimizer that cannot train, with its own message as the reason."""
    return ConfigError(
        f"optimizer.name: {settings.name} ({optimizer_class.__module__}) cannot train here, on "
        f"{device.type} with optimizer.arguments = {settings.arguments}: {reason.rstrip(' .!')}. "
        "Change the arguments, or choose another optimizer."
    )


def _check_sides(settings: OptimizerSettings, groups: Sequence[Mapping[str, Any]]) -> None:
    """Raise `ConfigError` if the optimizer would never come to the end of its first step."""
    if settings.name not in _WHOLE_MATRICES:
        return
    side, part = max(
        (max(parameter.shape, default=1), group["name"])
        for group in groups
        for parameter in group["params"]
    )
    if side > _LARGEST_SIDE:
        raise ConfigError(
            f"optimizer.name: {settings.name} decomposes a matrix of {side:,} x {side:,} numbers "
            f"for a weight of {part}, which would take hours per step, expected at most "
            f"{_LARGEST_SIDE:,}. Choose ScalableShampoo or SOAP, which leave such sides out, or "
            "freeze that part with a learning rate of 0."
        )


class _Trial:
    """An optimizer over small weights, with a group of the same weights for each rate."""

    def __init__(
        self,
        optimizer_class: type[Any],
        arguments: Mapping[str, Any],
        device: torch.device,
        rates: Sequence[float],
    ) -> None:
        self._device = device
        shapes: Sequence[tuple[int, ...]] = _SHAPES
        if optimizer_class.__module__.startswith("bitsandbytes"):
            shapes = (*_SHAPES, _8_BIT_SHAPE)
        self._groups = [
            [Parameter(_numbers(shape, seed, device) / 10) for seed, shape in enumerate(shapes)]
            for _ in rates
        ]
        groups = [
            {"params": parameters, "lr": rate, "name": str(number)}
            for number, (parameters, rate) in enumerate(zip(self._groups, rates, strict=True))
        ]
        self._optimizer = optimizer_class(groups, lr=rates[0], **arguments)

    def step(self, number: int) -> None:
        """Take a step; its gradients and the random state depend on the number alone."""
        self._set_gradients(number)
        self._optimizer.step()

    def _set_gradients(self, number: int) -> None:
        for parameters in self._groups:
            for place, parameter in enumerate(parameters):
                seed = len(parameters) * (number + 1) + place
                parameter.grad = _numbers(tuple(parameter.shape), seed, self._device)
        torch.default_generator.manual_seed(number)

    def rest(self) -> None:
        """Take a step with gradients of 0."""
        for parameters in self._groups:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        self._optimizer.step()

    def step_one_by_one(self, number: int, *, backwards: bool) -> None:
        """The same, with an optimizer that steps in portions: each parameter by itself."""
        self._optimizer.is_fused = True
        self._set_gradients(number)
        turn = reversed if backwards else iter
        for place, parameters in turn([*enumerate(self._groups)]):
            for parameter in turn(parameters):
                self._optimizer.step_one(place, parameter)
        self._optimizer.step()

    def options(self) -> list[dict[str, Any]]:
        """What the optimizer keeps for its groups, such as counts of steps."""
        return [
            {
                name: value.tolist() if isinstance(value, Tensor) else value
                for name, value in group.items()
                if name != "params"
            }
            for group in self._optimizer.param_groups
        ]

    def last_group(self) -> Tensor:
        """A copy of the weights of the last group, in one vector."""
        return torch.cat([parameter.detach().flatten() for parameter in self._groups[-1]]).clone()

    def kept_names(self) -> set[str]:
        """The names in the optimizer's state of any weight."""
        return {str(name) for kept in self._optimizer.state.values() for name in kept}

    def is_finite(self) -> bool:
        """True if all weights are finite."""
        return bool(self.last_group().isfinite().all())


def _numbers(shape: tuple[int, ...], seed: int, device: torch.device) -> Tensor:
    """Random numbers that depend on shape and seed alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _move_alike(
    optimizer_class: type[Any],
    arguments: Mapping[str, Any],
    device: torch.device,
    first: Sequence[float],
    second: Sequence[float],
) -> bool:
    """True if the last group moves, and does so bit for bit alike with either list of rates."""
    one, other = (_Trial(optimizer_class, arguments, device, rates) for rates in (first, second))
    start = one.last_group()
    for number in range(_MOST_STEPS):
        one.step(number)
        other.step(number)
        if not torch.equal(one.last_group(), other.last_group()):
            return False
    return not torch.equal(one.last_group(), start)


def _mixes_weights(
    optimizer_class: type[Any],
    arguments: Mapping[str, Any],
    device: torch.device,
    *,
    backwards: bool,
) -> bool:
    """True if weights move otherwise when each parameter is stepped by itself.

    Or if the optimizer keeps other options, from which later steps would follow, or has one rate
    for all groups, so that it looks at all of them.
    """
    equal_rates = (_RATES[0], _RATES[0])
    if _move_alike(optimizer_class, arguments, device, equal_rates, _RATES):
        return True
    one, other = (
        _Trial(each, arguments, device, _RATES)
        for each in (optimizer_class, in_portions(optimizer_class))
    )
    for number in range(_MOST_STEPS):
        one.step(number)
        other.step_one_by_one(number, backwards=backwards)
        if not torch.allclose(one.last_group(), other.last_group(), rtol=1e-5, atol=0):
            return True
    return one.options() != other.options()
