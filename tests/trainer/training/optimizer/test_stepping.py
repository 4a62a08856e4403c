import math

import pytest
import torch
from accelerate import Accelerator
from builders.optimizers import CPU, build, groups, parameters, same, weights, weights_in
from torch.nn import Parameter

from trainer.config.settings import OptimizerSettings
from trainer.training.optimizer.build import build_optimizer
from trainer.training.optimizer.stepping import clip_gradients, guarded_step, weights_for_use


def test_a_step_that_was_swallowed_is_no_step():
    """A wrapper that does not hand the step on is an error, not a step that is logged as taken."""
    optimizer = build("AdamW")
    prepared = Accelerator(cpu=True).prepare(optimizer)
    norm = clip_gradients(
        [parameter for group in optimizer.param_groups for parameter in group["params"]], 1.0
    )
    assert guarded_step(prepared, norm).taken
    # `Accelerator.accumulate` does this between its own steps.
    prepared.gradient_state._set_sync_gradients(False)
    try:
        with pytest.raises(RuntimeError, match="did not pass a step on"):
            guarded_step(prepared, norm)
    finally:
        prepared.gradient_state._set_sync_gradients(True)


def test_clipping_scales_all_gradients_together():
    """The norm is that of all gradients before clipping, which scales them without turning them."""
    clipped, plain = parameters(), parameters()
    norm = clip_gradients(clipped, 1.0)
    flat = torch.cat([parameter.grad.flatten() for parameter in plain])
    torch.testing.assert_close(norm, flat.norm())
    torch.testing.assert_close(
        torch.cat([parameter.grad.flatten() for parameter in clipped]), flat / flat.norm()
    )


def test_zero_only_measures():
    """With max_norm 0, or one above the norm, gradients stay the same bit for bit."""
    plain = [parameter.grad for parameter in parameters()]
    for max_norm in (0.0, 1e6):
        clipped = [*parameters(), Parameter(torch.ones(3))]
        assert clip_gradients(clipped, max_norm) > 0
        assert same([parameter.grad for parameter in clipped[:3]], plain)


def test_a_finite_norm_is_a_step():
    """The optimizer takes its own step, norm and scalars come back, and gradients are cleared."""
    optimizer, reference = build(), build()
    weights_of_both = [
        parameter for group in optimizer.param_groups for parameter in group["params"]
    ]
    stepped = guarded_step(optimizer, clip_gradients(weights_of_both, 0), torch.tensor(0.25))
    reference.step()
    assert (stepped.taken, stepped.scalars) == (True, (0.25,))
    assert stepped.grad_norm == pytest.approx(
        math.sqrt(sum(p.grad.square().sum() for g in groups() for p in g["params"]))
    )
    assert same(weights(optimizer), weights(reference))
    assert all(parameter.grad is None for parameter in weights_of_both)


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("max_norm", [0.0, 1.0])
def test_a_broken_gradient_is_no_step(broken, max_norm):
    """A single NaN or infinity leaves weights and optimizer state as they were."""
    optimizer, reference = build(), build()
    for each in (optimizer, reference):
        each.step()
    state = {
        key: value.clone()
        for key, value in optimizer.state[optimizer.param_groups[0]["params"][0]].items()
    }
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    trained[1].grad[2] = broken
    stepped = guarded_step(optimizer, clip_gradients(trained, max_norm))
    assert not stepped.taken
    assert not math.isfinite(stepped.grad_norm)
    assert same(weights(optimizer), weights(reference))
    assert same(optimizer.state[trained[0]].values(), state.values())
    for each in (optimizer, reference):
        for parameter, source in zip(
            weights_in(each), (p for g in groups() for p in g["params"]), strict=True
        ):
            parameter.grad = source.grad
        guarded_step(each, clip_gradients(weights_in(each), max_norm))
    assert same(weights(optimizer), weights(reference))


def test_a_step_is_read_back_once(monkeypatch):
    """Clipping and stepping read values back from the device once, whatever the scalars."""
    reads = []
    for name in ("item", "tolist", "__bool__", "__float__", "__int__", "__index__"):
        original = getattr(torch.Tensor, name)
        monkeypatch.setattr(
            torch.Tensor, name, lambda self, *a, f=original, n=name: reads.append(n) or f(self, *a)
        )
    optimizer = build_optimizer(groups(), OptimizerSettings(name="SGD"), CPU)
    reads.clear()
    guarded_step(
        optimizer, clip_gradients(weights_in(optimizer), 1.0), torch.tensor(1.0), torch.tensor(2.0)
    )
    assert reads == ["tolist"]


def test_weights_for_use_are_the_averages():
    """A schedule-free optimizer has its averages inside the context, and its weights afterwards."""
    pytest.importorskip("pytorch_optimizer")
    optimizer = Accelerator(cpu=True).prepare(build("ScheduleFreeAdamW"))
    for _ in range(5):
        optimizer.step()
    before = weights(optimizer)
    with weights_for_use(optimizer):
        assert not same(weights(optimizer), before)
    assert same(weights(optimizer), before)
    assert optimizer.param_groups[0]["train_mode"]


class Averaging(torch.optim.SGD):
    """An optimizer whose weights to use are half of those it trains."""

    def eval(self):
        """Put the weights to use in place."""
        for parameter in weights_in(self):
            parameter.data.mul_(0.5)

    def train(self):
        """Put the trained weights in place, rounded."""
        for parameter in weights_in(self):
            parameter.data.mul_(2.1)


@pytest.mark.parametrize("optimizer_class", [Averaging, torch.optim.SGD])
def test_weights_for_use_come_back_exactly(optimizer_class):
    """Trained weights come back bit for bit, also after an error inside."""
    optimizer = optimizer_class(groups())
    before = weights(optimizer)
    with pytest.raises(AssertionError, match="inside"), weights_for_use(optimizer):
        assert same(weights(optimizer), before) == (optimizer_class is Averaging), "inside"
    assert same(weights(optimizer), before)
