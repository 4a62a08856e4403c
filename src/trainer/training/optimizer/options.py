"""The options of an optimizer that was built, and what a resumed run makes of those it loaded."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

from torch.optim import Optimizer

from trainer.training.optimizer.classes import parameter_names
from trainer.training.optimizer.trial import kept_names

Options = list[dict[str, Any]]
"""All options of each parameter group of an optimizer, among them its arguments."""


def options_of(optimizer: Optimizer) -> Options:
    """The options of an optimizer's parameter groups, copied."""
    return [
        {name: deepcopy(value) for name, value in group.items() if name != "params"}
        for group in unwrapped(optimizer).param_groups
    ]


def replace_arguments(
    optimizer: Optimizer, built: Options, names: set[str] | None
) -> dict[str, tuple[Any, Any]]:
    """Give each parameter group the arguments that it was `built` with.

    Only those in `names`; None stands for all but the rate. Returns the values before and now of
    the arguments that differ, by name.
    """
    inner = unwrapped(optimizer)
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
    inner = unwrapped(optimizer)
    known = parameter_names(type(inner)) - {"params", "lr"}
    group = inner.param_groups[0]
    now = {name: group[name] for name in known & group.keys()}
    before = now | {name: value for name, (value, _) in replaced.items()}
    device = group["params"][0].device
    needed, kept = (kept_names(type(inner), one, device) for one in (now, before))
    return not needed <= kept


def begin_anew(optimizer: Optimizer, built: Options) -> None:
    """Let an optimizer go on as it was `built`, without what was loaded into it."""
    inner = unwrapped(optimizer)
    inner.state.clear()
    for group, values in zip(inner.param_groups, built, strict=True):
        parameters = group["params"]
        group.clear()
        group.update(values, params=parameters)


def unwrapped(optimizer: Optimizer) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
