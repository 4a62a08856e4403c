"""The class of an optimizer by its name in the config, and the arguments that it takes."""

import difflib
import inspect
import math
import re
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from torch.optim import Optimizer

from trainer.config.settings import OptimizerSettings
from trainer.errors import ConfigError

_BITSANDBYTES_NAME = re.compile(r"Paged\w+|\w+(8|32)bit")
_ADAFACTOR_DEFAULTS = {"relative_step": False, "scale_parameter": False}
"""Arguments without which `optimizer.learning_rate` would have next to no effect.

With the class's own defaults, `relative_step` makes a rate of its own, and `scale_parameter`
multiplies the rate by the size of the weights, about 0.02, so that 1e-5 would train as 2e-7.
"""


def find_class(name: str) -> type[Any]:
    """The optimizer class that `optimizer.name` means.

    `Adafactor` is that of transformers, and names such as AdamW8bit or PagedAdamW are those of
    bitsandbytes. Any other name is looked up in torch.optim, then in pytorch-optimizer. Raises
    `ConfigError` for an unknown name and for a package that is not installed.
    """
    if name == "Adafactor":
        adafactor: type[Any] = import_module("transformers.optimization").Adafactor
        return adafactor
    if is_of_bitsandbytes(name):
        return _pick(name, _bitsandbytes_classes(name))
    classes = _classes_in(torch.optim)
    if name in classes:
        return classes[name]
    try:
        classes = {**_classes_in(import_module("pytorch_optimizer")), **classes}
    except ImportError as error:
        hint = (
            f" pytorch-optimizer has more optimizers, but cannot be imported ({error}). "
            "To use one of them: pip install pytorch-optimizer."
        )
        return _pick(name, classes, hint)
    return _pick(name, classes)


def is_of_bitsandbytes(name: str) -> bool:
    """True if `optimizer.name` means an optimizer of bitsandbytes."""
    return _BITSANDBYTES_NAME.fullmatch(name) is not None


def _bitsandbytes_classes(name: str) -> dict[str, type[Any]]:
    """The 8-bit, 32-bit and paged optimizers of bitsandbytes by name; `name` is for the message."""
    try:
        classes = _classes_in(import_module("bitsandbytes.optim"))
    except ImportError as error:
        raise ConfigError(
            f"optimizer.name: {name} belongs to bitsandbytes, which cannot be imported ({error}). "
            "Install it (pip install bitsandbytes), or choose another optimizer, such as AdamW."
        ) from error
    return {known: one for known, one in classes.items() if _BITSANDBYTES_NAME.fullmatch(known)}


def _classes_in(module: ModuleType) -> dict[str, type[Any]]:
    """The optimizer classes in a module by name."""
    return {
        name: value
        for name, value in vars(module).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }


def _pick(name: str, classes: dict[str, type[Any]], hint: str = "") -> type[Any]:
    """The class of that name; raises `ConfigError` with the nearest names, and `hint`, if none."""
    if name in classes:
        return classes[name]
    by_lower = {known.lower(): known for known in classes}
    near = difflib.get_close_matches(name.lower(), by_lower)
    suggestion = f"Did you mean {' or '.join(f'`{by_lower[lower]}`' for lower in near)}?"
    if not near:
        suggestion = (
            "Expected a class of torch.optim or pytorch-optimizer, or an 8-bit, 32-bit or paged "
            "one of bitsandbytes."
        )
    raise ConfigError(f"optimizer.name: unknown optimizer `{name}`. {suggestion}{hint}")


def checked_arguments(optimizer_class: type[Any], settings: OptimizerSettings) -> dict[str, Any]:
    """The arguments of `[optimizer]` for the class, with the tuples that it expects for lists.

    Only the names in the signature count as known: classes of pytorch-optimizer also swallow names
    that mean nothing. Raises `ConfigError` for any other name, and for NaN, which passes every
    comparison with which classes check their arguments.
    """
    accepted = parameter_names(optimizer_class) - {"params", "lr"}
    defaults = _ADAFACTOR_DEFAULTS if settings.name == "Adafactor" else {}
    if defaults:
        # With these it would ignore the configured learning rate.
        accepted -= {"relative_step", "warmup_init"}
    unknown = ", ".join(f"`{name}`" for name in settings.arguments if name not in accepted)
    if unknown:
        raise ConfigError(
            f"optimizer.arguments: unknown argument {unknown} for optimizer.name = "
            f"{settings.name}, expected {', '.join(sorted(accepted))}."
        )
    for name, value in settings.arguments.items():
        values = value if isinstance(value, list) else [value]
        if any(isinstance(one, float) and math.isnan(one) for one in values):
            raise ConfigError(
                f"optimizer.arguments: `{name}` is {value}, expected a number. Set another value."
            )
    given = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in settings.arguments.items()
    }
    return {**defaults, **given}


def parameter_names(function: Callable[..., Any]) -> set[str]:
    """The names of all parameters that can be given by name."""
    return {
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
    }
