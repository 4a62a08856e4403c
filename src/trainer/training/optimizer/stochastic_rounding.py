"""Weights in bf16 that are rounded up or down by chance, so that small updates are kept on average.

A bf16 weight keeps 8 bits, so an update below about 0.2 % of it would be lost each time. Rounded up
with a probability equal to the part that bf16 cannot hold, the weight moves as far on average as
one in fp32. Source: Gupta et al., Deep Learning with Limited Numerical Precision (2015), section 3.

The noise is a function of the seed, the optimizer step and the parameter's name alone, computed
with integers: it is the same on every rank, on every device, and after a resume.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from capmerge.rng import Chance, SampleId
from trainer.config.settings import Config

_LOST_BITS = 16
"""The bits of an fp32 number that bf16 does not have."""
_WEYL = 0x9E3779B97F4A7C15
_MIXING = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_LAST_SHIFT = 31
"""The constants of SplitMix64, a generator whose n-th number follows from n alone.

Source: Steele, Lea and Flood, Fast splittable pseudorandom number generators (2014), figure 17.
"""


class StochasticRounding:
    """The rounding of the weights of a run; `names` holds the name of each trained parameter."""

    def __init__(self, seed: int, names: Mapping[Parameter, str]) -> None:
        self._seed, self._names = seed, names
        self.step = 0
        """The optimizer step (from 0) whose noise is drawn."""

    def write(self, parameter: Parameter, exact: Tensor) -> None:
        """Give a bf16 parameter the values of `exact` in fp32, rounded by chance.

        A value that bf16 can hold is kept bit for bit. `exact` is overwritten.
        """
        # The number of the step takes the place of the epoch, the parameter that of the record.
        chance = Chance(SampleId(self._seed, self.step, self._names[parameter]))
        noise = random_bits(chance.below(1 << 64, "stochastic rounding"), exact.numel(), exact)
        parameter.copy_(round_by(exact, noise.view(exact.shape)))


def stochastic_rounding(config: Config, model: nn.Module) -> StochasticRounding | None:
    """The rounding of the trained parameters of `model`, if the config asks for it."""
    if not config.optimizer.stochastic_rounding:
        return None
    assert config.train.seed is not None, "the seed of a run is known before its model"
    names = {
        parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return StochasticRounding(config.train.seed, names)


def round_by(exact: Tensor, noise: Tensor) -> Tensor:
    """fp32 values rounded to those that bf16 has, up in magnitude where `noise` is large enough.

    `noise` are integers from 0 to 65,535. With all of them equally likely, a value is rounded up
    with a probability equal to its part above the lower neighbour, counted in steps of bf16. Both
    are overwritten.
    """
    # The sum would carry a NaN of ones only into a 0.
    noise = noise.masked_fill_(exact.isnan(), 0)
    bits = exact.view(torch.int32)
    bits.add_(noise).bitwise_and_(-1 << _LOST_BITS)
    return exact


def random_bits(key: int, count: int, like: Tensor) -> Tensor:
    """`count` random integers from 0 to 65,535 as int32, on the device of `like`.

    They are the 16-bit parts of numbers key, key + 1, ... of SplitMix64, the lowest first.
    """
    numbers = torch.arange(-(-count // 4), dtype=torch.int64, device=like.device)
    numbers.mul_(_signed(_WEYL)).add_(_signed(key))
    for shift, factor in _MIXING:
        _mix(numbers, shift)
        numbers.mul_(_signed(factor))
    _mix(numbers, _LAST_SHIFT)
    return numbers.view(torch.int16)[:count].to(torch.int32).bitwise_and_(0xFFFF)


def _mix(numbers: Tensor, shift: int) -> None:
    """Each number x becomes x ^ (x >> shift), as 64 bits without a sign, in place."""
    numbers.bitwise_xor_((numbers >> shift).bitwise_and_((1 << 64 - shift) - 1))


def _signed(number: int) -> int:
    """The integer with the same 64 bits and a sign."""
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number
