import math

import pytest
import torch
from torch.nn import Parameter

from trainer.config.settings import OptimizerSettings
from trainer.training.optimizer.build import build_optimizer
from trainer.training.optimizer.stepping import begin_step
from trainer.training.optimizer.stochastic_rounding import StochasticRounding, random_bits, round_by

CPU = torch.device("cpu")
MASK = (1 << 64) - 1


def splitmix(number):
    """The output of SplitMix64 for a state, with the integers of Python."""
    number = (number ^ number >> 30) * 0xBF58476D1CE4E5B9 & MASK
    number = (number ^ number >> 27) * 0x94D049BB133111EB & MASK
    return number ^ number >> 31


@pytest.mark.parametrize("key", [0, 12345678901234567890, MASK])
def test_the_noise_is_that_of_splitmix(key):
    """The integers of torch, which have signs and 64 bits, give the numbers of the definition."""
    numbers = [splitmix(key + place * 0x9E3779B97F4A7C15 & MASK) for place in range(3)]
    expected = [number >> shift & 0xFFFF for number in numbers for shift in (0, 16, 32, 48)]
    assert random_bits(key, 11, torch.zeros(1)).tolist() == expected[:11]


def test_a_number_that_bf16_has_is_kept_whatever_the_noise():
    """All values that bf16 has, both zeros, both infinities and NaN among them, stay as they are.

    A NaN stays one, of whatever bits; a GPU makes those of ones only.
    """
    every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(torch.bfloat16)
    for noise in (0, 1, 0x8000, 0xFFFF):
        rounded = round_by(every.float(), torch.full(every.shape, noise, dtype=torch.int32))
        same = rounded.bfloat16().view(torch.int16) == every.view(torch.int16)
        assert (same | (rounded.isnan() & every.isnan())).all()
    ones = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    assert round_by(ones, torch.full((2,), 0xFFFF, dtype=torch.int32)).isnan().all()


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.97])
def test_the_chance_to_go_up_is_the_part_that_is_lost(sign, share):
    """Of a value between two of bf16, that share goes up in magnitude, and the mean is the value.

    All 65,536 noises are tried, so the share is exact, up to one of them.
    """
    low, high = 1.0, 1.0 + 2**-7
    exact = torch.full((1 << 16,), sign * (low + share * (high - low)))
    rounded = round_by(exact.clone(), torch.arange(1 << 16, dtype=torch.int32))
    assert set(rounded.tolist()) == {sign * low, sign * high}
    assert (rounded == sign * high).double().mean() == pytest.approx(share, abs=2**-16)
    assert rounded.double().mean() == pytest.approx(exact[0].item(), rel=2**-22)


def test_the_noise_depends_on_seed_step_and_name_alone():
    """The same three give the same weights, in any memory layout; another one gives others."""

    def written(seed, step, name, layout=torch.contiguous_format):
        parameter = Parameter(torch.zeros(4, 8, 3, 3, dtype=torch.bfloat16))
        parameter.data = parameter.data.to(memory_format=layout)
        rounding = StochasticRounding(seed, {parameter: name})
        rounding.step = step
        exact = torch.full(parameter.shape, 1.003).to(memory_format=layout)
        with torch.no_grad():
            rounding.write(parameter, exact)
        return parameter.detach()

    first = written(7, 3, "unet.a")
    assert torch.equal(first, written(7, 3, "unet.a"))
    assert torch.equal(first, written(7, 3, "unet.a", torch.channels_last))
    for other in ((8, 3, "unet.a"), (7, 4, "unet.a"), (7, 3, "unet.b")):
        assert not torch.equal(first, written(*other))


RATE = 1e-5
WIDTH = 0.067
STEPS = 10
COPIES = 100


def trained(dtype, *, rounds=False, drift=False):
    """The same weights `COPIES` times, before and after some steps of AdamW; one copy in fp32.

    They have a standard deviation of `WIDTH`. With `drift` each gradient points the same way, else
    in any. The copies differ in their names alone, and thus in the noise of their rounding.
    """
    draw = torch.Generator().manual_seed(5)
    start = (torch.randn(50, 80, generator=draw) * WIDTH).bfloat16()
    weights = [Parameter(start.clone().to(dtype)) for _ in range(COPIES if rounds else 1)]
    settings = OptimizerSettings(learning_rate=RATE, arguments={"weight_decay": 0.0})
    names = {weight: f"copy {number}" for number, weight in enumerate(weights)}
    rounding = StochasticRounding(3, names) if rounds else None
    group = {"params": weights, "lr": RATE, "name": "unet"}
    optimizer = build_optimizer([group], settings, CPU, rounding)
    for step in range(STEPS):
        gradient = torch.randn(start.shape, generator=draw)
        for weight in weights:
            weight.grad = (gradient.abs() if drift else gradient).bfloat16().to(dtype)
        begin_step(optimizer, step)
        optimizer.step()
    return torch.stack([weight.detach().double() for weight in weights]) - start.double()


def test_without_it_bf16_loses_nearly_all_updates():
    """At a rate of 1e-5, 4.5 % of the weights move in bf16, and all of them in fp32."""
    assert (trained(torch.bfloat16) != 0).double().mean() == pytest.approx(0.045, abs=0.005)
    assert (trained(torch.float32) != 0).double().mean() > 0.999


def test_with_it_every_weight_moves_as_in_fp32_on_average():
    """Over many roundings, all weights move, each by as much as in fp32 on average."""
    (exact,) = trained(torch.float32, drift=True)
    moves = trained(torch.bfloat16, rounds=True, drift=True)
    assert (moves != 0).any(0).double().mean() > 0.99
    # Rounded once, some weights move, each by more than in fp32.
    assert 0.2 < (moves[0] != 0).double().mean() < 0.8
    # The mean of all has a standard error of 0.2 %, that of one rounding 2 %.
    assert moves.mean().item() == pytest.approx(exact.mean().item(), rel=0.01)
    assert moves[0].mean().item() == pytest.approx(exact.mean().item(), rel=0.1)
    # No weight is favoured: in units of its own standard error, each mean is like a normal number.
    error = moves.std(0) / math.sqrt(COPIES)
    told = error > 0
    scores = ((moves.mean(0) - exact) / error)[told]
    assert scores.mean().abs() < 0.2
    assert scores.square().mean() == pytest.approx(1, abs=0.3)
