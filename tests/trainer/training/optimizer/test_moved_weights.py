import pytest
import torch
from torch.nn import Parameter

from trainer.training.optimizer.moved_weights import MovedWeights


def test_the_share_counts_weights_not_parameters():
    """A parameter that moves counts by its size; one that is larger than the sample is sampled."""
    large, small = Parameter(torch.zeros(30_000)), Parameter(torch.zeros(10, 1000))
    watched = MovedWeights([large, small])
    assert watched.share() == 0
    small.data += 1
    assert watched.share() == pytest.approx(0.25)
    large.data[:15_000] += 1
    assert watched.share() == pytest.approx(0.625, abs=1e-3)


@pytest.mark.parametrize(("dtype", "least", "most"), [("bfloat16", 0.1, 0.3), ("float32", 0.9, 1)])
def test_bf16_loses_small_updates(dtype, least, most):
    """An update of 1e-5 moves a fifth of weights around 0.02 in bf16, and all of them in fp32."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(4000, generator=generator) * 0.02
    weights = Parameter(drawn.to(getattr(torch, dtype)))
    watched = MovedWeights([weights])
    weights.data += 1e-5
    assert least <= watched.share() <= most
