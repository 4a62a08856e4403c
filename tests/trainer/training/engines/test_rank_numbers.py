"""Tests of what ranks tell each other: times, and the numbers by which weights are compared."""

import pytest
import torch

from trainer.config.settings import OptimizerSettings
from trainer.errors import ConfigError
from trainer.training.engines.divided_optimizer import check_divided
from trainer.training.engines.equal_ranks import number_of
from trainer.training.metrics import Recent
from trainer.training.step_clock import RankTimes, StepClock


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_bit_and_its_place_count(dtype):
    """The number of a tensor changes with any bit of any element, and with their order."""
    tensor = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)).to(dtype)
    expected = number_of(tensor)
    assert number_of(tensor.clone()) == expected
    bits = tensor.view({4: torch.int32, 2: torch.int16}[tensor.element_size()])
    for place in (0, 17, 34):
        changed = bits.clone()
        changed.view(-1)[place] ^= 1
        assert number_of(changed.view(dtype)) != expected
    assert number_of(tensor.flip(0)) != expected
    assert number_of(torch.zeros(3)) != number_of(-torch.zeros(3))


def test_a_large_tensor_is_read_in_pieces(monkeypatch):
    """The number does not depend on the size of the pieces."""
    tensor = torch.randn(100)
    expected = number_of(tensor)
    monkeypatch.setattr("trainer.training.engines.equal_ranks._PIECE", 7)
    assert number_of(tensor) == expected


def test_one_sum_tells_the_times_of_all_ranks():
    """The sum of what each rank gives holds the times of the step before, rank by rank."""
    clocks = [StepClock(torch.device("cpu"), rank, 3) for rank in range(3)]
    assert clocks[0].of_all_ranks([0.0] * 9) == ()
    for seconds, clock in enumerate(clocks):
        clock.start()
        clock.add_data_wait(seconds)
        clock.arrive()
        clock.end()
    sums = torch.tensor([clock.to_be_summed() for clock in clocks]).sum(0).tolist()
    found = clocks[1].of_all_ranks(sums)
    assert [times.data for times in found] == [0, 1, 2]
    assert all(0 <= times.arrival <= times.whole for times in found)
    assert StepClock(torch.device("cpu"), 0, 1).to_be_summed() == []


def test_ranks_wait_for_the_last_one():
    """Of a step, each rank waits for the others as long as it is ready before the last."""
    recent = Recent()
    recent.add_ranks(())
    assert recent.ranks() == {}
    recent.add_ranks((RankTimes(2.0, 0.0, 0.5), RankTimes(2.0, 1.0, 1.5)))
    recent.add_ranks((RankTimes(4.0, 0.6, 1.0), RankTimes(4.0, 0.0, 1.0)))
    assert recent.ranks() == {
        "seconds": [3.0, 3.0],
        "data_wait": [pytest.approx(0.1), pytest.approx(1 / 6)],
        "rank_wait": [pytest.approx(1 / 6), 0.0],
    }


GROUPS = [{"lr": 1e-3, "name": "unet"}]


@pytest.mark.parametrize("name", ["AdamW", "SGD", "Lion", "Adagrad"])
def test_optimizers_of_single_numbers_can_be_divided(name):
    """They train the same on pieces of all weights in one row."""
    check_divided(OptimizerSettings(name=name), GROUPS, torch.device("cpu"), 2)


@pytest.mark.parametrize("name", ["Adafactor", "Lamb", "CAME"])
def test_optimizers_of_whole_weights_are_not_divided(name):
    """They are refused from stage 1 on, and taken at stage 0."""
    settings = OptimizerSettings(name=name)
    check_divided(settings, GROUPS, torch.device("cpu"), 0)
    with pytest.raises(ConfigError, match=f"optimizer.name = {name}: it looks at whole weights"):
        check_divided(settings, GROUPS, torch.device("cpu"), 1)


def test_schedule_free_optimizers_are_refused():
    """DeepSpeed has no way from the weights that they train to those that are meant for use."""
    settings = OptimizerSettings(name="ScheduleFreeAdamW")
    with pytest.raises(ConfigError, match="it trains other weights than those that are meant"):
        check_divided(settings, GROUPS, torch.device("cpu"), 0)
