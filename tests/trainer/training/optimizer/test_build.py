import math
import sys
import types

import pytest
import torch
from builders.optimizers import CPU, build, groups, same, weights
from torch.nn import Parameter

from trainer.config.settings import OptimizerSettings
from trainer.errors import ConfigError
from trainer.training.optimizer.build import build_optimizer, check_optimizer


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
