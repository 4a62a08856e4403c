"""Torch's fused optimizers: one kernel for all weights, and states of earlier runs that fit it."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.training.optimizer.classes import parameter_names

_REASONS_AGAINST = ("fused", "foreach", "capturable", "differentiable")
"""Arguments that choose the way of computing themselves, or that a fused kernel refuses."""


def with_fused(
    optimizer_class: type[Any], arguments: Mapping[str, Any], device: torch.device
) -> dict[str, Any]:
    """The arguments with `fused = true`, for an optimizer of torch that has it on a CUDA device.

    Unless the arguments choose a way of computing themselves.
    """
    is_torchs = optimizer_class.__module__.startswith("torch.optim.")
    if (
        device.type != "cuda"
        or not is_torchs
        or "fused" not in parameter_names(optimizer_class)
        or any(name in arguments for name in _REASONS_AGAINST)
    ):
        return dict(arguments)
    return {**arguments, "fused": True}


def fit_loaded_state(optimizer: Any, built: Sequence[Mapping[str, Any]]) -> None:
    """Let a loaded optimizer compute in the way that it was `built` for, and its state fit that.

    The state may come from a run on another device, or with another `[speed]`. A fused kernel takes
    only tensors that lie as the weight does, and counts steps on the device; the other ways count
    them on the CPU. No value changes. `built` are the options of the optimizer from before the
    load.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    for group, options in zip(inner.param_groups, built, strict=True):
        for name in ("fused", "foreach"):
            if name in group and name in options:
                group[name] = options[name]
        on_device = bool(group.get("fused") or group.get("capturable"))
        for weight in group["params"]:
            kept = inner.state.get(weight, {})
            for name, value in kept.items():
                if name == "step" and isinstance(value, Tensor) and "fused" in group:
                    kept[name] = value.to(weight.device if on_device else "cpu")
                elif _lies_otherwise(value, weight):
                    kept[name] = torch.empty_like(weight, dtype=value.dtype, device=value.device)
                    kept[name].copy_(value)


def _lies_otherwise(value: Any, weight: Tensor) -> bool:
    return (
        isinstance(value, Tensor)
        and value.shape == weight.shape
        and value.stride() != weight.stride()
    )
