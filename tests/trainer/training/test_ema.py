import shutil

import pytest
import torch
from accelerate import Accelerator
from builders.ranks import run_ranks
from builders.runs import (
    assert_equal_bits,
    rewrite_examples,
    settings_of,
    state_of,
    train_here,
    write_config,
)
from safetensors.torch import load_file
from torch import nn

from trainer.config.load import load_config
from trainer.config.settings import EmaSettings
from trainer.errors import ConfigError, ResumeError
from trainer.training.dry_run import show
from trainer.training.ema import Ema
from trainer.training.engines.masters import Masters


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The rewritten examples."""
    return rewrite_examples(tmp_path_factory.mktemp("examples"))


def write(metadata, folder, ema=None, **changes):
    """Write the config of a run in `run` of the folder that keeps an average; its path."""
    ema = {"decay": 0.9, "warmup_steps": 4} if ema is None else ema
    changes = {"checkpoint": {"every_steps": 1, "keep": 99}, "train": {"max_steps": 6}} | changes
    return write_config(
        folder / "c.toml", settings_of(metadata, folder / "run", ema=ema, **changes)
    )


def averages_of(run, step):
    """The averages in the state after `step`."""
    return load_file(run / "checkpoints" / f"step-{step:08d}" / "ema.safetensors")


@pytest.fixture(scope="module")
def averaged(metadata, tmp_path_factory):
    """The folder of a run of 6 steps with an average, and with the state after each of them."""
    folder = tmp_path_factory.mktemp("averaged")
    assert train_here(write(metadata, folder)) == 0
    return folder / "run"


def test_the_average_follows_its_formula(averaged):
    """Each state holds decay x average + (1 - decay) x weights, with a decay that warms up."""
    expected = {name: value.double() for name, value in averages_of(averaged, 1).items()}
    weights = state_of(averaged, 1)
    # The decay of the first step is 0, so the untrained weights are forgotten.
    assert all(torch.equal(averages_of(averaged, 1)[name], weights[name]) for name in expected)
    for step, decay in ((2, 0.225), (3, 0.45), (4, 0.675), (5, 0.9), (6, 0.9)):
        weights, found = state_of(averaged, step), averages_of(averaged, step)
        for name, average in expected.items():
            average.mul_(decay).add_(weights[name].double(), alpha=1 - decay)
            torch.testing.assert_close(found[name].double(), average, rtol=1e-5, atol=1e-7)
            assert not torch.equal(found[name], weights[name]), f"{name} is no average"


def test_the_averaged_model_is_written_beside_the_trained_one(averaged):
    """`model-ema` holds the averages, and is laid out as `model`, which holds the raw weights."""
    names = {path.relative_to(averaged / "model") for path in (averaged / "model").rglob("*")}
    assert names == {
        path.relative_to(averaged / "model-ema") for path in (averaged / "model-ema").rglob("*")
    }
    unet = "unet/diffusion_pytorch_model.safetensors"
    averages, weights = averages_of(averaged, 6), state_of(averaged, 6)
    for folder, expected in (("model", weights), ("model-ema", averages)):
        for name, value in load_file(averaged / folder / unet).items():
            assert torch.equal(value, expected[f"unet.{name}"]), name


@pytest.mark.parametrize(
    ("precision", "device"),
    [("bf16", "cpu"), ("fp16", "gpu"), ("full_bf16", "cpu")],
)
def test_a_resumed_average_is_the_same_bit_for_bit(metadata, tmp_path, precision, device):
    """A run that is resumed from the middle ends with the averages of an unbroken one."""
    train = {"max_steps": 4, "precision": precision}
    ema = {"decay": 0.99, "device": device}
    config = write(metadata, tmp_path, ema, train=train, optimizer={"text_learning_rate": 0})
    assert train_here(config) == 0
    expected = averages_of(tmp_path / "run", 4)
    assert not [name for name in expected if not name.startswith("unet.")]
    assert {value.dtype for value in expected.values()} == {torch.float32}
    assert train_here(config, resume=str(tmp_path / "run" / "checkpoints" / "step-00000002")) == 0
    assert_equal_bits(averages_of(tmp_path / "run", 4), expected)
    trained = load_file(tmp_path / "run/model-ema/unet/diffusion_pytorch_model.safetensors")
    weights = load_file(tmp_path / "run/model/unet/diffusion_pytorch_model.safetensors")
    for name, value in trained.items():
        assert value.dtype == weights[name].dtype
        assert torch.equal(value, expected[f"unet.{name}"].to(value.dtype))


def test_a_step_that_is_skipped_leaves_the_average(metadata, tmp_path):
    """A step whose gradient is no number changes neither weights nor averages."""
    optimizer = {"name": "SGD", "learning_rate": 1e30, "text_learning_rate": None}
    config = write(metadata, tmp_path, {"decay": 0.5}, optimizer=optimizer, train={"max_steps": 3})
    assert train_here(config) == 0
    assert_equal_bits(averages_of(tmp_path / "run", 3), averages_of(tmp_path / "run", 1))


def masters_of(model):
    """The trained weights of a model that one process trains."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    return Masters(Accelerator(cpu=True), model, model, torch.optim.SGD(trained))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_and_averages_change_places_and_back(dtype):
    """In use, the model has the averages; afterwards both are bit for bit as they were."""
    model = nn.Linear(3, 2).to(dtype)
    model.bias.requires_grad_(requires_grad=False)
    ema = Ema(masters_of(model), EmaSettings(decay=0.9))
    with torch.no_grad():
        model.weight.add_(torch.randn(2, 3).to(dtype))
    ema.update(0)
    weights, averages = model.weight.detach().clone(), ema.whole("weight").to(dtype, copy=True)
    (exact,) = (value.clone() for value in ema._averages.values())
    assert not torch.equal(weights, averages)
    with ema.in_use():
        assert torch.equal(model.weight, averages)
    assert torch.equal(model.weight, weights)
    assert torch.equal(ema._averages["weight"], exact)
    assert ema.names() == ["weight"]


def test_the_average_of_bf16_weights_moves_by_less_than_they_can():
    """Averages of bf16 weights are kept in float32, so that small shares are not rounded away."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    with torch.no_grad():
        model.weight.fill_(1)
        ema = Ema(masters_of(model), EmaSettings(decay=0.999))
        model.weight.fill_(2)
    for step in range(100):
        ema.update(step)
    expected = 2 - 0.999**100
    assert ema._averages["weight"].item() == pytest.approx(expected, rel=1e-5)


def test_a_damaged_average_is_a_damaged_state(metadata, averaged, tmp_path, capsys):
    """A state with a changed average is not resumed: the run goes on from the one before it."""
    out = shutil.copytree(averaged, tmp_path / "run")
    file = out / "checkpoints" / "step-00000006" / "ema.safetensors"
    changed = bytearray(file.read_bytes())
    changed[-1] ^= 1
    file.write_bytes(changed)
    assert train_here(write(metadata, tmp_path), resume="latest") == 0
    assert "ema.safetensors is not as it was saved" in capsys.readouterr().err
    assert_equal_bits(averages_of(out, 6), averages_of(averaged, 6))


def test_an_average_begins_late_only_when_allowed(metadata, tmp_path, capsys):
    """`--allow-change` starts an average at the weights of the state, says so, and can end it."""
    without = write(metadata, tmp_path, {}, train={"max_steps": 2})
    assert train_here(without) == 0
    assert not (tmp_path / "run" / "model-ema").exists()
    config = write(metadata, tmp_path, {"decay": 0.5}, train={"max_steps": 3})
    with pytest.raises(ResumeError, match=r"ema\.decay: saved 0.0, now 0.5"):
        train_here(config, resume="latest")
    assert train_here(config, resume="latest", allow_change=True) == 0
    assert "holds no average" in capsys.readouterr().err
    before, after = state_of(tmp_path / "run", 2), state_of(tmp_path / "run", 3)
    for name, average in averages_of(tmp_path / "run", 3).items():
        torch.testing.assert_close(average, (before[name] + after[name]) / 2)
    without = write(metadata, tmp_path, {}, train={"max_steps": 4})
    assert train_here(without, resume="latest", allow_change=True) == 0
    assert not (tmp_path / "run/checkpoints/step-00000004/ema.safetensors").exists()
    # The average of step 3 is not taken for that of step 4.
    assert not (tmp_path / "run/model-ema").exists()
    assert (tmp_path / "run/model-ema.1/model_index.json").exists()
    assert "model-ema.1: an earlier end of this run wrote it" in capsys.readouterr().err


def test_averages_of_other_parts_are_refused(averaged):
    """A saved average is not loaded into a run that trains other parameters."""
    model = nn.Module()
    model.register_module("unet", nn.Linear(2, 2))
    with pytest.raises(
        ResumeError, match=r"the first is unet\.weight: found None, expected \[2, 2"
    ):
        Ema(masters_of(model), EmaSettings(decay=0.9)).load(
            averaged / "checkpoints" / "step-00000006"
        )


def test_an_optimizer_that_averages_itself_is_refused(metadata, tmp_path):
    """A schedule-free optimizer with an average of its own is an error, in the dry run too."""
    optimizer = {"name": "ScheduleFreeAdamW"}
    config = write(metadata, tmp_path, {"decay": 0.9}, optimizer=optimizer)
    for start in (train_here, lambda path: show(load_config(path))):
        with pytest.raises(ConfigError, match="keeps an average of the weights itself"):
            start(config)


@pytest.mark.ranks
@pytest.mark.slow
def test_two_ranks_keep_the_average_of_one(metadata, tmp_path):
    """Two ranks save the averages of one up to rounding, and one goes on with those of two."""
    whole, split = tmp_path / "whole", tmp_path / "split"
    for folder in (whole, split):
        folder.mkdir()
    train = {"max_steps": 4, "batch_size": 4}
    assert train_here(write(metadata, whole, train=train)) == 0
    config = write(metadata, split, train=train | {"batch_size": 2})
    for ended in run_ranks(split, config):
        assert ended.code == 0, ended.output
    found, expected = averages_of(split / "run", 4), averages_of(whole / "run", 4)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=2e-4, msg=name)
    state = str(split / "run" / "checkpoints" / "step-00000003")
    shutil.rmtree(whole / "run")
    assert train_here(write(metadata, whole, train=train), resume=state) == 0
    for name, value in averages_of(whole / "run", 4).items():
        torch.testing.assert_close(value, found[name], rtol=1e-2, atol=2e-4, msg=name)
