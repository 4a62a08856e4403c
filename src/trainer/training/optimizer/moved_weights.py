"""The share of the weights that the first steps moved, which is small when bf16 loses updates.

With stochastic rounding it is small too at first: fewer weights move, each by more.
"""

from collections.abc import Iterable

from torch import Tensor
from torch.nn import Parameter

FIRST_STEPS = 10
"""The optimizer steps after which the share is told."""
_SAMPLED = 4096
"""Weights of a parameter that are compared: 14 MB of bf16 for the U-Net of SDXL, not 5 GB."""

WARNING = (
    'WARNING: train.precision = "full_bf16": bf16 weights keep 8 bits, so an update below about '
    "0.2 % of a weight is lost. With small learning rates nearly all of them are: 4.5 % of the "
    'weights moved at 1e-5, 0.8 % at 1e-6, all with "bf16" or "fp32", which keep fp32 weights. '
    "optimizer.stochastic_rounding = true keeps them on average; it does not work with DeepSpeed, "
    'where train.precision = "bf16" keeps them.'
)
"""The line for the start of a run that rounds bf16 weights to the nearest number; measured."""
NOTE = (
    'train.precision = "full_bf16": bf16 weights are rounded up or down by chance '
    "(optimizer.stochastic_rounding), so small updates are kept on average."
)
"""The line for the start of a run that rounds them stochastically."""


class MovedWeights:
    """A sample of the weights as they are now, to compare later ones with."""

    def __init__(self, parameters: Iterable[Parameter]) -> None:
        self._parameters = list(parameters)
        self._before = [_sample(parameter).clone() for parameter in self._parameters]

    def share(self) -> float:
        """The share of the weights that differ by now, estimated from the sample."""
        moved = total = 0.0
        for parameter, before in zip(self._parameters, self._before, strict=True):
            differ = (_sample(parameter) != before).float().mean().item()
            moved += differ * parameter.numel()
            total += parameter.numel()
        return moved / total


def _sample(parameter: Parameter) -> Tensor:
    """Weights of a parameter at equal distances."""
    flat = parameter.detach().flatten()
    return flat[:: -(-flat.numel() // _SAMPLED)]
