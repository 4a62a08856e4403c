"""The check that an optimizer trains the same on divided weights as on whole ones.

From stage 1 on, ZeRO lays all weights of a group end to end and hands each rank a piece of that
row. An optimizer that steps each number by itself does not notice. One that looks at the shape or
the norm of a weight (Adafactor, LAMB, CAME, Muon) would train something else, and something else
again on another number of ranks.
"""

from typing import Any

import torch
from torch import Tensor

from trainer.config.settings import OptimizerSettings
from trainer.errors import ConfigError
from trainer.training.optimizer.classes import checked_arguments, find_class

_STEPS = 10
"""Steps after which an optimizer that finds its own rate has moved it (Prodigy)."""
_SHAPES = ((8, 6), (16,))
_CUT = 40
"""Where the row of 64 numbers is divided: within the first weight."""


def check_divided(
    settings: OptimizerSettings, groups: list[dict[str, Any]], device: torch.device, stage: int
) -> None:
    """Raise `ConfigError` for an optimizer that DeepSpeed's `stage` would let train otherwise.

    It is found by steps on small weights on `device`, whole and divided.
    """
    optimizer_class = find_class(settings.name)
    if hasattr(optimizer_class, "eval"):
        raise ConfigError(
            f"optimizer.name = {settings.name}: it trains other weights than those that are meant "
            "for use, and DeepSpeed keeps no way from the ones to the others. Expected an "
            "optimizer without such averages. Choose another one, or set engine.kind = ddp."
        )
    if stage == 0:
        return
    generator = torch.Generator().manual_seed(0)
    whole = [torch.randn(shape, generator=generator) for shape in _SHAPES]
    gradients = [
        [weight + 0.3 * torch.randn(weight.shape, generator=generator) for weight in whole]
        for _ in range(_STEPS)
    ]

    def pieces(tensors: list[Tensor]) -> list[Tensor]:
        row = torch.cat([tensor.flatten() for tensor in tensors])
        return [row[:_CUT].clone(), row[_CUT:].clone()]

    arguments = checked_arguments(optimizer_class, settings)

    def trained(weights: list[Tensor], gradients: list[list[Tensor]]) -> Tensor:
        """The numbers in one row after all steps of one optimizer."""
        parameters = [torch.nn.Parameter(weight.to(device, copy=True)) for weight in weights]
        group = {**groups[0], "params": parameters}
        optimizer = optimizer_class([group], lr=group["lr"], **arguments)
        for step in gradients:
            for parameter, gradient in zip(parameters, step, strict=True):
                parameter.grad = gradient.to(device, copy=True)
            optimizer.step()
        return torch.cat([parameter.detach().flatten() for parameter in parameters]).cpu()

    # Each rank has an optimizer of its own, which sees its piece alone.
    before = torch.cat([weight.flatten() for weight in whole])
    pieces_of_steps = [pieces(step) for step in gradients]
    try:
        moved = trained(whole, gradients) - before
        found = [
            trained([piece], [[step[number]] for step in pieces_of_steps])
            for number, piece in enumerate(pieces(whole))
        ]
        is_same = torch.allclose(
            torch.cat(found) - before, moved, rtol=1e-2, atol=1e-2 * float(moved.abs().mean())
        )
    except Exception as error:  # another package's class may raise anything about a shape
        raise ConfigError(
            f"optimizer.name = {settings.name}: it cannot step the pieces of weights that "
            f"DeepSpeed hands each rank with engine.zero_stage = {stage} "
            f"({type(error).__name__}: {error}). "
            "Choose an optimizer that steps each number by itself, such as AdamW, or set "
            "engine.zero_stage = 0 or engine.kind = ddp."
        ) from error
    if not is_same:
        raise ConfigError(
            f"optimizer.name = {settings.name}: it looks at whole weights, but with "
            f"engine.zero_stage = {stage} DeepSpeed hands each rank a piece of all weights in one "
            "row, with which it would train something else. Choose an optimizer that steps each "
            "number by itself, such as AdamW, or set engine.zero_stage = 0 or engine.kind = ddp."
        )
