import copy
import logging
import re
import tomllib

import pytest
import torch
from builders.paths import ROOT
from torch.nn import Parameter

from trainer.config.settings import OptimizerSettings
from trainer.errors import ConfigError
from trainer.training.optimizer import portions
from trainer.training.optimizer.build import build_optimizer, notes_on_optimizer
from trainer.training.optimizer.portions import InPortions, in_portions
from trainer.training.optimizer.stepping import begin_step, weights_for_use
from trainer.training.optimizer.stochastic_rounding import StochasticRounding

CPU = torch.device("cpu")
LEAN = {
    "AdamW": {},
    "AdamW8bit": {},
    "Lion8bit": {},
    "Adafactor": {},
    "Lion": {},
    "CAME": {},
    "StableAdamW": {},
    "SGD": {"momentum": 0.9},
    "ScheduleFreeAdamW": {},
}
"""Optimizers and arguments with which every promise is tested."""
KAHAN = {"StableAdamW": {"kahan_sum": True}}
BITSANDBYTES = ("AdamW8bit", "Lion8bit")


@pytest.fixture(autouse=True)
def packages(request):
    """Skip a test whose optimizer needs a package that is not installed."""
    # Without `trainer` in front, as in these tests, bitsandbytes would advise about models.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    name = request.node.callspec.params.get("name") if hasattr(request.node, "callspec") else None
    if name in BITSANDBYTES:
        pytest.importorskip("bitsandbytes")
    elif name in ("Lion", "CAME", "StableAdamW", "ScheduleFreeAdamW"):
        pytest.importorskip("pytorch_optimizer")


PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| (`name = .*`) \|(.*)\|(.*)\| .* \|$", PAGE, re.MULTILINE)


@pytest.mark.parametrize(("lines", "fp32", "bf16"), ROWS)
@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
def test_every_line_of_the_page_steps_and_keeps_what_it_says(lines, fp32, bf16):
    """Each line of the table in docs/training.md trains, and its sums are those of its tensors.

    But for the factors of Adafactor and CAME, which the page gives for SDXL and a matrix hardly
    needs.
    """
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("pytorch_optimizer")
    settings = OptimizerSettings(**tomllib.loads("\n".join(re.findall("`(.*?)`", lines))))
    for dtype, told in ((torch.float32, fp32), (torch.bfloat16, bf16)):
        if not told.strip():
            continue
        weight = Parameter((torch.randn(256, 256) / 20).to(dtype))
        start = weight.detach().clone()
        rounds = dtype == torch.bfloat16 and settings.stochastic_rounding is not False
        rounding = StochasticRounding(1, {weight: "weight"}) if rounds else None
        group = {"params": [weight], "lr": 1e-4, "name": "unet"}
        optimizer = build_optimizer([group], settings, CPU, rounding)
        weight.grad = torch.randn_like(weight)
        optimizer.step()
        assert not torch.equal(weight, start)
        kept = [each for each in optimizer.state[weight].values() if torch.is_tensor(each)]
        found = [
            sum(each.numel() * each.element_size() for each in tensors) / weight.numel()
            for tensors in ([weight], [weight.grad], kept)
        ]
        *parts, total = map(float, re.findall(r"[0-9.]+", told))
        assert total == pytest.approx(sum(parts))
        factors = {"Adafactor": 0.4, "CAME": 0.8}.get(settings.name, 0.0)
        expected = [*parts[:2], pytest.approx(parts[2] - factors, abs=0.1)]
        assert found == expected


def made(dtype=torch.float32):
    """Weights of two parts, one large enough for a state in 8 bits."""
    draw = torch.Generator().manual_seed(1)
    shapes = ((70, 64), (64,), (8, 4, 3, 3), (16, 8))
    return [Parameter((torch.randn(shape, generator=draw) / 20).to(dtype)) for shape in shapes]


def build(weights, name, seed=None, *, fused=False, **arguments):
    """The optimizer of that name over two groups of `weights`, without weight decay."""
    settings = OptimizerSettings(
        name=name, arguments={"weight_decay": 0.0, **arguments}, fused_backward=fused
    )
    names = {weight: f"weight.{number}" for number, weight in enumerate(weights)}
    rounding = None if seed is None else StochasticRounding(seed, names)
    groups = [
        {"params": weights[:3], "lr": 1e-3, "name": "unet"},
        {"params": weights[3:], "lr": 1e-4, "name": "text_encoder"},
    ]
    return build_optimizer(groups, settings, CPU, rounding)


def step(optimizer, weights, number, scale=1.0):
    """Take the step of that number; its gradients depend on the number alone."""
    draw = torch.Generator().manual_seed(100 + number)
    begin_step(optimizer, number)
    for weight in weights:
        gradient = torch.randn(weight.shape, generator=draw) * scale
        weight.grad = gradient.bfloat16().to(weight.dtype)
    optimizer.step()


def copies(weights):
    """The weights as they are now."""
    return [weight.detach().clone() for weight in weights]


def assert_same(ones, others):
    """Fail unless all tensors are equal bit for bit."""
    for one, other in zip(ones, others, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("name", "arguments"), LEAN.items())
def test_portions_step_as_one(name, arguments, monkeypatch):
    """Stepped in portions, weights and the options of groups are those of a step of all at once."""
    monkeypatch.setattr(portions, "PORTION", 4544)
    whole, parts = made(), made()
    one = build(whole, name, **arguments)
    other = in_portions(type(one))(
        [
            {"params": parts[:3], "lr": 1e-3, "name": "unet"},
            {"params": parts[3:], "lr": 1e-4, "name": "text_encoder"},
        ],
        **{k: v for k, v in one.defaults.items() if k in ("weight_decay", *arguments)},
        **({"relative_step": False, "scale_parameter": False} if name == "Adafactor" else {}),
    )
    assert len(list(portions.iter_portions(parts[:3]))) == 2
    for number in range(5):
        step(one, whole, number)
        step(other, parts, number)
    assert_same(whole, parts)
    for group, expected in zip(other.param_groups, one.param_groups, strict=True):
        assert {**group, "params": 0} == {**expected, "params": 0}


@pytest.mark.parametrize("kind", ["fp32", "bf16", "bf16 rounded", "kahan"])
@pytest.mark.parametrize("name", LEAN)
def test_a_gradient_of_zero_moves_nothing(name, kind):
    """With a gradient of 0 and no weight decay, weights stay bit for bit in every type."""
    arguments = LEAN[name]
    if kind == "kahan":
        arguments = KAHAN.get(name)
        if arguments is None:
            pytest.skip("keeps nothing for what bf16 loses")
    weights = made(torch.float32 if kind == "fp32" else torch.bfloat16)
    start = copies(weights)
    optimizer = build(weights, name, 3 if kind == "bf16 rounded" else None, **arguments)
    for number in range(4):
        step(optimizer, weights, number, scale=0.0)
    assert_same(weights, start)
    if name in BITSANDBYTES:
        assert optimizer.state[weights[0]]["state1"].dtype == torch.uint8
    # And it is the gradient that was missing.
    step(optimizer, weights, 9)
    assert not torch.equal(weights[0], start[0])
    assert notes_on_optimizer(OptimizerSettings(name=name), CPU) == []


@pytest.mark.parametrize("name", [name for name in LEAN if name not in BITSANDBYTES])
def test_a_row_without_gradient_is_not_moved(name):
    """Weights with a gradient of 0 among others, such as words that no caption has, stay too."""
    weights = made(torch.bfloat16)
    start = copies(weights)
    optimizer = build(weights, name, 3, **LEAN[name])
    for number in range(3):
        draw = torch.Generator().manual_seed(number)
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=draw).bfloat16()
            weight.grad[2] = 0
        begin_step(optimizer, number)
        optimizer.step()
    for weight, before in zip(weights, start, strict=True):
        assert torch.equal(weight[2], before[2])
    assert not torch.equal(weights[0], start[0])


@pytest.mark.parametrize("name", LEAN)
def test_rounded_steps_follow_those_of_fp32(name):
    """With stochastic rounding, bf16 weights stay as near to those of fp32 as a random walk may.

    The state is the one of fp32 weights: the same types, and 8 bits where the class keeps them.
    """
    rounded, exact = made(torch.bfloat16), made(torch.bfloat16)
    exact = [Parameter(weight.detach().float()) for weight in exact]
    one, other = build(rounded, name, 3, **LEAN[name]), build(exact, name, **LEAN[name])
    start = copies(exact)
    for number in range(10):
        step(one, rounded, number)
        step(other, exact, number)
    moved = torch.cat([(a.float() - b).flatten() for a, b in zip(rounded, start, strict=True)])
    meant = torch.cat([(a - b).detach().flatten() for a, b in zip(exact, start, strict=True)])
    likeness = torch.nn.functional.cosine_similarity(moved, meant, dim=0)
    assert likeness > 0.9
    for weight, twin in zip(rounded, exact, strict=True):
        kept, expected = one.state[weight], other.state[twin]
        assert {k: getattr(v, "dtype", None) for k, v in kept.items()} == {
            k: getattr(v, "dtype", None) for k, v in expected.items()
        }


@pytest.mark.parametrize("name", LEAN)
def test_a_loaded_state_goes_on_bit_for_bit(name):
    """Saved and loaded after some steps, a rounded run ends at the weights of an unbroken one."""
    unbroken, resumed = made(torch.bfloat16), made(torch.bfloat16)
    one, first = build(unbroken, name, 3, **LEAN[name]), build(resumed, name, 3, **LEAN[name])
    for number in range(6):
        step(one, unbroken, number)
    for number in range(3):
        step(first, resumed, number)
    saved = copy.deepcopy(first.state_dict())
    again = build(resumed, name, 3, **LEAN[name])
    again.load_state_dict(saved)
    assert [group["params"] for group in again.param_groups] == [resumed[:3], resumed[3:]]
    for number in range(3, 6):
        step(again, resumed, number)
    assert_same(resumed, unbroken)


def test_a_state_that_does_not_fit_leaves_the_weights_in_place():
    """After an error of the load, the optimizer still holds the real parameters."""
    weights = made(torch.bfloat16)
    optimizer = build(weights, "AdamW", 3)
    with pytest.raises(ValueError, match="parameter group"):
        optimizer.load_state_dict({"state": {}, "param_groups": []})
    assert [group["params"] for group in optimizer.param_groups] == [weights[:3], weights[3:]]


def test_schedule_free_averages_are_those_of_fp32():
    """Inside `weights_for_use` are the averages, rounded to bf16, and afterwards the old bits."""
    pytest.importorskip("pytorch_optimizer")
    rounded = made(torch.bfloat16)
    optimizer = build(rounded, "ScheduleFreeAdamW", 3)
    for number in range(5):
        step(optimizer, rounded, number)
    before = copies(rounded)
    group = optimizer.param_groups[0]
    momentum = group["betas"][0]
    with weights_for_use(optimizer):
        assert not group["train_mode"]
        for weight, trained in zip(rounded, before, strict=True):
            # Source: Defazio et al., The Road Less Scheduled (2024): y = (1 - beta) z + beta x.
            z = optimizer.state[weight]["z"]
            average = (trained.float() - (1 - momentum) * z) / momentum
            torch.testing.assert_close(weight.float(), average, rtol=2**-7, atol=1e-6)
            assert not torch.equal(weight, trained)
    assert_same(rounded, before)
    assert group["train_mode"]


@pytest.mark.parametrize("asked", ["fused_backward", "stochastic_rounding"])
@pytest.mark.parametrize("name", ["Prodigy", "DAdaptSGD", "MADGRAD", "AvaGrad"])
def test_an_optimizer_that_looks_at_all_weights_is_refused(name, asked):
    """Where a step of each parameter by itself trains otherwise, the setting is refused by name."""
    pytest.importorskip("pytorch_optimizer")
    weights = made()
    groups = [{"params": weights, "lr": 1.0, "name": "unet"}]
    settings = OptimizerSettings(name=name, fused_backward=asked == "fused_backward")
    rounding = StochasticRounding(1, {}) if asked == "stochastic_rounding" else None
    with pytest.raises(ConfigError, match=rf"optimizer.{asked}: {name} .*Set optimizer.{asked} ="):
        build_optimizer(groups, settings, CPU, rounding)
    plain = build_optimizer(groups, OptimizerSettings(name=name), CPU)
    assert not isinstance(plain, InPortions)


@pytest.mark.parametrize("name", ["FTRL", "SRMM", "Nero", "Gravity"])
def test_an_optimizer_that_forgets_the_model_is_refused(name):
    """Optimizers that set weights anew at a gradient of 0 cannot fine-tune."""
    pytest.importorskip("pytorch_optimizer")
    with pytest.raises(ConfigError, match=f"{name} .* moves weights whose gradient is 0 by up to"):
        build_optimizer(
            [{"params": made(), "lr": 1e-3, "name": "unet"}], OptimizerSettings(name=name), CPU
        )


@pytest.mark.parametrize("name", ["Yogi", "ASGD"])
def test_an_optimizer_that_moves_by_itself_is_told(name):
    """Next to nothing is no refusal, but a line at the start; weight decay is not told."""
    pytest.importorskip("pytorch_optimizer")
    (note,) = notes_on_optimizer(OptimizerSettings(name=name), CPU)
    assert note.startswith(f"{name} also moves weights whose gradient is 0")
    decay = OptimizerSettings(name="AdamW", arguments={"weight_decay": 0.5})
    assert notes_on_optimizer(decay, CPU) == []
