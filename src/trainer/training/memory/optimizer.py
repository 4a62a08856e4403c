"""What an optimizer keeps and what its step allocates, found by stepping tensors without values.

The real class steps weights of the real shapes on torch's `meta` device. A class that looks at the
values of its weights cannot do that; it steps small stand-ins on the CPU, and what it keeps for
them is taken to the sides of the real weights. Knows no model and no ranks.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._pytree import tree_leaves

from trainer.config.settings import OptimizerSettings
from trainer.training.memory.trace import META, LiveBytes, key_of
from trainer.training.optimizer.classes import checked_arguments, find_class, parameter_names

_STEPS = 2
"""Some optimizers keep more from their second step on."""
_AGAINST_FUSED = {"foreach", "capturable", "differentiable"}
"""Arguments with which an optimizer of torch is not fused."""
_SIDES, _ALONE = (131, 67, 3, 2), (8209,)
"""The largest sides of a stand-in by dimension, and of one that has a single dimension.

They are primes, so that a kept tensor tells by its shape which sides of the weight it has.
"""

Kind = tuple[tuple[int, ...], torch.dtype]
"""Shape and type of a weight."""


class OptimizerBytes(NamedTuple):
    """Bytes on the device of what an optimizer needs besides weights and gradients."""

    state: int
    """What it keeps from step to step."""
    step: int
    """The most that a step makes and drops again."""


def measure_optimizer(
    groups: Sequence[Sequence[Kind]],
    settings: OptimizerSettings,
    *,
    at_once: int | None = None,
    copies: bool = False,
) -> OptimizerBytes:
    """The bytes that the optimizer of `[optimizer]` needs for groups of weights.

    On a GPU, classes of torch that have a fused kernel use it, unless `optimizer.arguments` says
    otherwise, and make nothing in a step. Others that can step all weights of a group at once do
    so, which takes more memory than one by one. Given `at_once`, weights
    are stepped in portions of so many numbers, or one by one where they have more. With `copies`,
    what is stepped are copies of weights and gradients in float32.
    """
    optimizer_class = find_class(settings.name)
    arguments = dict(checked_arguments(optimizer_class, settings))
    known = parameter_names(optimizer_class)
    can_fuse = optimizer_class.__module__.startswith("torch.") and "fused" in known
    is_fused = bool(arguments.pop("fused", can_fuse and not arguments.keys() & _AGAINST_FUSED))
    if "foreach" in known:
        arguments.setdefault("foreach", not is_fused)
    if copies:
        groups = [[(shape, torch.float32) for shape, _ in group] for group in groups]
    of_kind = {
        kind: _measure_kind(optimizer_class, arguments, kind)
        for kind in {kind for group in groups for kind in group}
    }
    state = sum(of_kind[kind].state for group in groups for kind in group)
    passing = {kind: 0 if is_fused else found.step for kind, found in of_kind.items()}
    is_foreach = bool(arguments.get("foreach"))
    if at_once is None:
        of_group = [[passing[kind] for kind in group] for group in groups if group]
        return OptimizerBytes(
            state, max(sum(sizes) if is_foreach else max(sizes) for sizes in of_group)
        )
    most = 0
    for kind, size in passing.items():
        numbers = prod(kind[0])
        count = max(1, at_once // numbers)
        copied = count * numbers * 2 * torch.float32.itemsize if copies else 0
        most = max(most, copied + (count if is_foreach else 1) * size)
    return OptimizerBytes(state, most)


def _measure_kind(
    optimizer_class: type[Any], arguments: Mapping[str, Any], kind: Kind
) -> OptimizerBytes:
    """The bytes of an optimizer of one weight."""
    shape, dtype = kind
    try:
        values = torch.ones(shape, dtype=dtype, device=META)
        kept, passing = _kept_and_passing(optimizer_class, arguments, values)
    except (RuntimeError, NotImplementedError):  # it asks for a value, or has no such kernel
        pass
    else:
        return OptimizerBytes(sum(tensor.untyped_storage().nbytes() for tensor in kept), passing)
    small = _small(shape)
    with torch.random.fork_rng(devices=[]):
        kept, passing = _kept_and_passing(
            optimizer_class, arguments, torch.ones(small, dtype=dtype)
        )
    growth = prod(shape) / prod(small)
    sides = {1: 1} | dict(zip(small, shape, strict=True))
    state = 0.0
    for tensor in kept:
        if all(side in sides for side in tensor.shape):
            state += prod(sides[side] for side in tensor.shape) * tensor.itemsize
        else:
            state += tensor.nbytes * growth
    return OptimizerBytes(round(state), round(passing * growth))


def _small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a stand-in: large enough to be kept in 8 bits where large weights are."""
    primes = _ALONE if len(shape) == 1 else _SIDES
    return tuple(min(side, prime) for side, prime in zip(shape, primes, strict=False))


def _kept_and_passing(
    optimizer_class: type[Any], arguments: Mapping[str, Any], values: Tensor
) -> tuple[list[Tensor], int]:
    """What an optimizer keeps for a weight on the device of `values`, and what its step makes.

    A second weight shows what is kept once for all of them, which is left out.
    """
    weights = [Parameter(values), Parameter(values.clone())]
    # The rate says nothing about memory.
    groups = [{"params": [weight], "lr": 1e-4, "name": ""} for weight in weights]
    optimizer = optimizer_class(groups, lr=1e-4, **arguments)
    for _ in range(_STEPS):
        for weight in weights:
            weight.grad = torch.ones_like(weight)
        with LiveBytes() as live:
            optimizer.step()
    of_one, of_other = (
        {
            key_of(leaf.untyped_storage()): leaf
            for leaf in tree_leaves(optimizer.state[weight])
            if isinstance(leaf, Tensor) and leaf.device == values.device
        }
        for weight in weights
    )
    return [leaf for key, leaf in of_one.items() if key not in of_other], live.peak
