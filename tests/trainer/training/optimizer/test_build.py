import math
import sys
import types

import diffusers.optimization
import pytest
import torch
from accelerate import Accelerator
from torch.nn import Parameter

from trainer.config.settings import OptimizerSettings
from trainer.errors import ConfigError
from trainer.training.optimizer.build import (
    build_optimizer,
    build_schedule,
    check_optimizer,
    clip_gradients,
    guarded_step,
    weights_for_use,
)

CPU = torch.device("cpu")


def parameters():
    """Weights of the shapes that a U-Net has, with gradients."""
    generator = torch.Generator().manual_seed(0)
    made = [
        Parameter(torch.randn(shape, generator=generator)) for shape in ((4,), (4, 3), (4, 2, 3, 3))
    ]
    for parameter in made:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    return made


def groups(rates=(1e-2, 1e-3)):
    """U-Net and text encoder, with a rate each."""
    bias, linear, convolution = parameters()
    return [
        {"params": [convolution, bias], "lr": rates[0], "name": "unet"},
        {"params": [linear], "lr": rates[1], "name": "text"},
    ]


def build(name="AdamW", **arguments):
    """The optimizer of that name over `groups`."""
    return build_optimizer(groups(), OptimizerSettings(name=name, arguments=arguments), CPU)


def weights(optimizer):
    """Copies of all weights of an optimizer."""
    return [
        parameter.detach().clone()
        for group in optimizer.param_groups
        for parameter in group["params"]
    ]


def same(left, right):
    """True if two lists of tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def test_groups_keep_their_rates_and_get_the_arguments():
    """A class of torch.optim is built with each group's rate, and a TOML list is a tuple to it."""
    optimizer = build("AdamW", betas=[0.8, 0.9], weight_decay=0.5)
    assert type(optimizer) is torch.optim.AdamW
    assert [
        (group["name"], group["lr"], group["betas"], group["weight_decay"])
        for group in optimizer.param_groups
    ] == [
        ("unet", 1e-2, (0.8, 0.9), 0.5),
        ("text", 1e-3, (0.8, 0.9), 0.5),
    ]


def test_the_trial_leaves_weights_and_state_alone():
    """The optimizer that is returned has taken no step."""
    optimizer = build("AdamW")
    assert same(
        weights(optimizer), [parameter for group in groups() for parameter in group["params"]]
    )
    assert optimizer.state == {}


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


def test_adafactor_trains_with_our_rate():
    """Adafactor of transformers moves a weight by about the configured rate in its first step."""
    optimizer = build("Adafactor")
    assert type(optimizer).__module__ == "transformers.optimization"
    before = weights(optimizer)
    optimizer.step()
    moved = [
        (a - b).square().mean().sqrt().item()
        for a, b in zip(weights(optimizer), before, strict=True)
    ]
    assert moved == pytest.approx([1e-2, 1e-2, 1e-3], rel=0.3)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adamW", "optimizer.name: unknown optimizer `adamW`. Did you mean `AdamW`"),
        ("AdmaW", "unknown optimizer `AdmaW`. Did you mean `AdamW`"),
        ("Optimizer", "unknown optimizer `Optimizer`"),
        ("xyz", "unknown optimizer `xyz`. Expected "),
        ("LBFGS", "optimizer.name: LBFGS .* cannot train here, on cpu"),
        ("SparseAdam", "SparseAdam .* cannot train here, .*does not support dense gradients"),
        ("Muon", "Muon .* cannot train here, .*2D parameters"),
    ],
)
def test_a_name_that_cannot_be(name, message):
    """Unknown names get a hint; optimizers that cannot train here are refused before the run."""
    with pytest.raises(ConfigError, match=message):
        build(name)


@pytest.mark.parametrize(
    ("name", "argument", "message"),
    [
        (
            "AdamW",
            {"weight_decy": 1},
            (
                "optimizer.arguments: unknown argument `weight_decy` for optimizer.name = AdamW, "
                "expected .*weight_decay"
            ),
        ),
        ("AdamW", {"lr": 1}, "unknown argument `lr`"),
        ("Adafactor", {"relative_step": True}, "unknown argument `relative_step`"),
        ("AdamW", {"betas": [0.9, 2.0]}, "AdamW .* cannot train here, .*Invalid beta"),
        ("AdamW", {"betas": "high"}, "AdamW .* cannot train here"),
        ("AdamW", {"betas": [0.9]}, "AdamW .* cannot train here, .*index out of range"),
        ("AdamW", {"weight_decay": "abc"}, "AdamW .* cannot train here"),
        ("SGD", {"momentum": math.nan}, "optimizer.arguments: `momentum` is nan, expected a num"),
        ("AdamW", {"betas": [0.9, math.nan]}, r"`betas` is \[0.9, nan\], expected a number"),
        ("SGD", {"weight_decay": math.inf}, "SGD .*first step makes weights that are not finite"),
    ],
)
def test_arguments_that_cannot_be(name, argument, message):
    """Unknown arguments are told with the known ones, refused values with the class's message."""
    with pytest.raises(ConfigError, match=message):
        build(name, **argument)


def test_a_missing_package_is_named(monkeypatch):
    """The message about a missing package has the command that installs it."""
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(
        ConfigError, match=r"AdamW8bit belongs to bitsandbytes.*pip install bitsandbytes"
    ):
        build("AdamW8bit")
    with pytest.raises(
        ConfigError, match=r"unknown optimizer `Prodigy`.*pip install pytorch-optimizer"
    ):
        build("Prodigy")
    assert build("AdamW")


@pytest.mark.parametrize("name", ["Prodigy", "Lion", "CAME", "ScheduleFreeAdamW"])
def test_optimizers_of_pytorch_optimizer(name):
    """Names that torch does not have come from pytorch-optimizer, and train."""
    pytest.importorskip("pytorch_optimizer")
    optimizer = build_optimizer(groups(rates=(1.0, 1.0)), OptimizerSettings(name=name), CPU)
    before = weights(optimizer)
    optimizer.step()
    assert type(optimizer).__module__.startswith("pytorch_optimizer")
    assert not same(weights(optimizer), before)


@pytest.mark.parametrize(
    "name",
    [
        "ApolloDQN",
        "DAdaptAdaGrad",
        "DAdaptAdam",
        "DAdaptAdan",
        "DAdaptLion",
        "DAdaptSGD",
        "Prodigy",
    ],
)
def test_rates_that_an_optimizer_makes_one_are_refused(name):
    """An optimizer that trains all parts at one rate is refused with two, and works with one."""
    pytest.importorskip("pytorch_optimizer")
    settings = OptimizerSettings(name=name)
    with pytest.raises(ConfigError, match=r"at one rate, found the rates 1 for unet, 0.25 for tex"):
        build_optimizer(groups(rates=(1.0, 0.25)), settings, CPU)
    assert build_optimizer(groups(rates=(0.5, 0.5)), settings, CPU)
    assert build_optimizer(groups(rates=(0.5, 0.5))[:1], settings, CPU)


@pytest.mark.parametrize(
    "name", ["ADOPT", "AdaShift", "CAME", "Lion", "SaRA", "ScheduleFreeRAdam", "StableAdamW"]
)
def test_rates_that_an_optimizer_reads_are_not_refused(name):
    """An optimizer that reads the rate of each group takes two, also if it starts late."""
    pytest.importorskip("pytorch_optimizer")
    assert build_optimizer(groups(rates=(1e-5, 1e-6)), OptimizerSettings(name=name), CPU)


@pytest.mark.parametrize("name", ["A2Grad", "AdaFactor"])
def test_an_optimizer_without_a_rate_is_refused(name):
    """An optimizer whose steps no learning rate changes would make the settings untrue."""
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ConfigError, match=f"{name} .*trains the same with any learning rate"):
        build(name)
    if name == "AdaFactor":
        assert build(name, relative_step=False)


@pytest.mark.parametrize("name", ["Shampoo", "Alice", "DASH"])
def test_an_optimizer_that_would_stall_is_refused(name):
    """Whole matrices of a vocabulary cannot be decomposed; those of small weights can."""
    pytest.importorskip("pytorch_optimizer")
    assert build(name)
    large = groups()
    large[1]["params"].append(Parameter(torch.empty(49408, 1)))
    with pytest.raises(ConfigError, match=r"decomposes a matrix of 49,408 x 49,408 .* of text,"):
        build_optimizer(large, OptimizerSettings(name=name), CPU)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="with a GPU it is tried")
def test_what_needs_a_gpu_is_not_refused_without_one(monkeypatch):
    """The dry run tells that bitsandbytes refused, since a machine with a GPU may train with it."""

    class AdamW8bit(torch.optim.AdamW):
        def step(self, closure=None):  # noqa: ARG002 -- the signature of torch
            raise RuntimeError("no GPU")

    package = types.ModuleType("bitsandbytes.optim")
    package.AdamW8bit = AdamW8bit
    monkeypatch.setitem(sys.modules, "bitsandbytes", types.ModuleType("bitsandbytes"))
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", package)
    settings = OptimizerSettings(name="AdamW8bit")
    (note,) = check_optimizer(groups(), settings, 10)
    assert "AdamW8bit" in note
    assert "no GPU. Change the arguments, or choose another optimizer. With a GPU it may" in note
    assert check_optimizer(groups(), OptimizerSettings(), 10) == []
    with pytest.raises(ConfigError, match=r"AdamW8bit .* cannot train here, on cpu .*no GPU"):
        build_optimizer(groups(), settings, CPU)


def test_the_trial_draws_no_random_number_of_the_run():
    """Optimizers that draw random numbers leave torch's random state as it was."""
    pytest.importorskip("pytorch_optimizer")
    before = torch.get_rng_state()
    build("Kron")
    assert torch.equal(torch.get_rng_state(), before)


def test_pytorch_optimizer_s_own_refusals():
    """Unknown arguments and classes that need a base optimizer are refused."""
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ConfigError, match="unknown argument `cautios`"):
        build("Lion", cautios=True)
    with pytest.raises(ConfigError, match=r"SAM .* cannot train here.*base_optimizer"):
        build("SAM")
    with pytest.raises(ConfigError, match="Did you mean `Prodigy`"):
        build("Prodgy")


SCHEDULES = [
    ("constant", 0, {}),
    ("constant_with_warmup", 4, {}),
    ("linear", 4, {}),
    ("cosine", 4, {}),
    ("cosine_with_restarts", 4, {"num_cycles": 3}),
    ("polynomial", 4, {"power": 2.0}),
    ("piecewise_constant", 0, {"step_rules": "1:5,0.1:12,0.01"}),
]


@pytest.mark.parametrize(("name", "warmup", "arguments"), SCHEDULES)
def test_every_schedule_is_diffusers_s(name, warmup, arguments):
    """The rates of each step, in any order, equal those of diffusers' scheduler."""
    optimizer, reference = build("SGD"), build("SGD")
    settings = OptimizerSettings(schedule=name, warmup_steps=warmup, schedule_arguments=arguments)
    schedule = build_schedule(optimizer, settings, 20)
    function = diffusers.optimization.TYPE_TO_SCHEDULER_FUNCTION[
        diffusers.optimization.SchedulerType(name)
    ]
    steps = {"num_warmup_steps": warmup} if warmup else {}
    steps |= (
        {"num_training_steps": 20}
        if name not in ("constant", "constant_with_warmup", "piecewise_constant")
        else {}
    )
    scheduler = function(reference, **steps, **arguments)
    expected = []
    for _ in range(20):
        expected.append([group["lr"] for group in reference.param_groups])
        reference.step()
        scheduler.step()
    for step in reversed(range(20)):
        rates = schedule.set_rates(step)
        assert rates == {"lr_unet": expected[step][0], "lr_text": expected[step][1]}
        assert [group["lr"] for group in optimizer.param_groups] == expected[step]
    assert name == "constant" or len({rate for rate, _ in expected}) > 2


def test_rates_need_no_state():
    """A loaded optimizer state, which has rates of its own step, does not change the schedule."""
    optimizer, saved = build("SGD"), build("SGD")
    settings = OptimizerSettings(schedule="linear")
    build_schedule(saved, settings, 10).set_rates(9)
    schedule = build_schedule(optimizer, settings, 10)
    optimizer.load_state_dict(saved.state_dict())
    assert schedule.set_rates(5) == {"lr_unet": 1e-2 * 0.5, "lr_text": 1e-3 * 0.5}


@pytest.mark.parametrize(
    ("changes", "rate", "message"),
    [
        (
            {"schedule": "polynomial"},
            1e-8,
            (
                "polynomial cannot move a rate of 1e-08 over 20 steps .*"
                "must be smaller than initial lr"
            ),
        ),
        (
            {"schedule": "piecewise_constant", "schedule_arguments": {"step_rules": "1.1.1:5,0.1"}},
            1e-4,
            "'step_rules': '1.1.1:5,0.1'.*could not",
        ),
    ],
)
def test_what_a_schedule_refuses(changes, rate, message):
    """A rate or argument that the schedule refuses is told with its message at the start."""
    optimizer = build()
    optimizer.param_groups[0]["lr"] = rate
    with pytest.raises(ConfigError, match=message):
        build_schedule(optimizer, OptimizerSettings(**changes), 20)


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


def weights_in(optimizer):
    """The weights of an optimizer themselves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


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
