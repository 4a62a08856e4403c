"""Saved states, exports and averages under every engine, with two real processes."""

import json
import os
import signal
from importlib.util import find_spec
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from builders.ranks import run_ranks, started
from builders.runs import (
    assert_equal_bits,
    metrics_of,
    rewrite_examples,
    settings_of,
    train_here,
    write_config,
)
from builders.single_files import random_model, write_single
from safetensors.torch import load_file

from trainer.config.load import load_config
from trainer.model.build import build_model
from trainer.model.trainable import trained_names
from trainer.training.engines.masters import Masters
from trainer.training.states.deepspeed_files import DeepSpeedFiles
from trainer.training.states.export import export_state
from trainer.training.states.saved_tensors import saved_tensors

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.slow,
    # Not imported here: that takes seconds.
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]

ENDLESS = 100_000
"""More steps than any test trains."""
LAST = 6
ENGINES = {
    "ddp": {"kind": "ddp"},
    "zero2": {"kind": "deepspeed", "zero_stage": 2},
    "zero3": {"kind": "deepspeed", "zero_stage": 3},
}


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The rewritten examples."""
    return rewrite_examples(tmp_path_factory.mktemp("examples"), 60)


@pytest.fixture(scope="module")
def write(metadata):
    """A function that writes the config of a run with a global batch of 4 into a folder.

    The run goes to `run` in the folder and saves its state after each third step. Its parts have
    different rates, and some weights are frozen.
    """

    def write(folder, engine, *, batch_size=2, **changes):
        sections = {
            "model": {"freeze": ["time_embedding.*"]},
            "train": {"batch_size": batch_size, "max_steps": LAST},
            "optimizer": {"text_learning_rate": 5e-4},
            "engine": engine,
            "ema": {"decay": 0.5},
            "validation": {"records": 5, "every_steps": 3},
            "checkpoint": {"every_steps": 3, "keep": 9},
            "export": {"formats": ["diffusers", "single"]},
        }
        for section, values in changes.items():
            sections[section] = sections.get(section, {}) | values
        return write_config(folder / "c.toml", settings_of(metadata, folder / "run", **sections))

    return write


def train(folder, config, *arguments, ranks=2):
    """Train with several ranks, which have to end well; the output of the first."""
    ends = run_ranks(folder, config, *arguments, ranks=ranks)
    for ended in ends:
        assert ended.code == 0, ended.output
        assert "Traceback" not in ended.output
    return ends[0].output


@pytest.fixture(scope="module")
def unbroken(write, tmp_path_factory):
    """A function that gives the folder of a run of `LAST` steps on two ranks of an engine."""
    done = {}

    def run(name):
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            train(folder, write(folder, ENGINES[name]))
            done[name] = folder / "run"
        return done[name]

    return run


def state(run, step):
    """The folder of a saved state."""
    return run / "checkpoints" / f"step-{step:08d}"


def contents(run, step):
    """The weights of a state, what its optimizer keeps, and the averages, by name."""
    folder = state(run, step)
    model = build_model(load_config(folder / "config.toml", asks_model=False), weights=False)
    found = {}
    with saved_tensors(folder, trained_names(model)) as tensors:
        for name in tensors.names():
            found[name] = tensors.weight(name).clone()
            found |= {
                f"{name} {slot}": torch.as_tensor(value).clone()
                for slot, value in tensors.kept(name).items()
            }
    averages = load_file(folder / "ema.safetensors")
    return found | {f"average of {name}": value for name, value in averages.items()}


def assert_close(found, expected):
    """Fail unless two states are one up to rounding, and trained since they were begun."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        if name.endswith("step"):
            assert found[name] == value, name
        else:
            torch.testing.assert_close(found[name], value, rtol=1e-2, atol=2e-4, msg=name)


def assert_same_losses(run, expected, *, after=0):
    """Fail unless a run had the losses, gradients and samples of another one after a step."""
    for one, other in zip(metrics_of(run), metrics_of(expected)[after:], strict=True):
        assert one["step"] == other["step"]
        assert sorted(one["keys"]) == sorted(other["keys"])
        assert one["lr_unet"] == other["lr_unet"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)


def test_all_engines_train_and_save_the_same(unbroken):
    """After the same steps, the states of all engines hold the same weights, moments, averages."""
    expected, begun = contents(unbroken("ddp"), LAST), contents(unbroken("ddp"), 3)
    for name in ("zero2", "zero3"):
        assert_close(contents(unbroken(name), LAST), expected)
        assert_same_losses(unbroken(name), unbroken("ddp"))
    assert torch.equal(
        expected["unet.time_embedding.linear_1.weight"],
        begun["unet.time_embedding.linear_1.weight"],
    )
    assert not torch.equal(expected["unet.conv_in.weight"], begun["unet.conv_in.weight"])


@pytest.mark.parametrize("name", ENGINES)
def test_a_killed_rank_ends_all_and_the_run_goes_on_exactly(write, unbroken, tmp_path, name):
    """After SIGKILL the other rank ends with an error; the resumed run is the unbroken one."""
    config, run = write(tmp_path, ENGINES[name], train={"max_steps": ENDLESS}), tmp_path / "run"
    with started(tmp_path, config) as group:
        group.wait_until((state(run, 3) / "state.json").exists)
        group.send(1, signal.SIGKILL)
        (ended,) = group.wait(0, seconds=60)
    assert ended.code == 1, ended.output
    assert "lost another process of the run" in ended.output
    assert "Traceback" not in ended.output
    # The killed run may have come further.
    config = write(tmp_path, ENGINES[name])
    train(tmp_path, config, "--resume", state(run, 3))
    assert_equal_bits(contents(run, LAST), contents(unbroken(name), LAST))
    assert metrics_of(run) == metrics_of(unbroken(name))
    for file in ("model.safetensors", "model-ema.safetensors"):
        assert_equal_bits(load_file(run / file), load_file(unbroken(name) / file))


def validation_of(run):
    """The losses of a run's validations."""
    lines = (run / "validation.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        (line["step"], line[name][weights]["loss"])
        for line in map(json.loads, lines)
        for name in ("held_out", "train")
        for weights in ("raw", "ema")
    ]


def assert_goes_on(run, expected):
    """Fail unless a run that was resumed at step 3 with a change ends as an unbroken one."""
    assert_close(contents(run, LAST), contents(expected, LAST))
    assert_same_losses(run, expected, after=3)
    found = validation_of(run)
    for (step, loss), (expected_step, expected_loss) in zip(
        found, validation_of(expected)[-len(found) :], strict=True
    ):
        assert step == expected_step
        assert loss == pytest.approx(expected_loss, rel=1e-4)
    for file in ("model.safetensors", "model-ema.safetensors"):
        one, other = load_file(run / file), load_file(expected / file)
        assert {name: (value.shape, value.dtype) for name, value in one.items()} == {
            name: (value.shape, value.dtype) for name, value in other.items()
        }
        for name, value in other.items():
            torch.testing.assert_close(one[name], value, rtol=1e-2, atol=2e-4, msg=name)


@pytest.mark.parametrize(
    ("before", "engine"),
    [
        ("ddp", {"kind": "deepspeed", "zero_stage": 0}),
        ("ddp", {"kind": "deepspeed", "zero_stage": 1}),
        ("zero3", {"kind": "deepspeed", "zero_stage": 2, "offload_optimizer_device": "cpu"}),
        ("zero2", {"kind": "deepspeed", "zero_stage": 3, "offload_optimizer_device": "cpu"}),
    ],
)
def test_a_state_goes_on_with_another_engine_or_stage(write, unbroken, tmp_path, before, engine):
    """The run ends with the weights of an unbroken one, and its state exports the same model."""
    config, run = write(tmp_path, engine), tmp_path / "run"
    said = train(tmp_path, config, "--resume", state(unbroken(before), 3))
    assert "was divided anew for" in said
    assert_goes_on(run, unbroken("ddp"))
    _assert_exports(run, tmp_path)


@pytest.mark.parametrize("before", ["zero2", "zero3"])
def test_a_state_of_two_ranks_goes_on_with_one(write, unbroken, tmp_path, before):
    """One process without DeepSpeed trains the same samples from a state of two ranks of it."""
    config = write(tmp_path, {"kind": "ddp"}, batch_size=4)
    assert train_here(config, resume=str(state(unbroken(before), 3))) == 0
    assert_goes_on(tmp_path / "run", unbroken("ddp"))


def test_one_rank_of_zero_goes_on_from_two_with_accumulation(write, unbroken, tmp_path):
    """Ranks, batch and accumulation change together with the stage."""
    engine = {"kind": "deepspeed", "zero_stage": 1}
    config = write(tmp_path, engine, batch_size=1, train={"batch_size": 1, "accumulation": 4})
    train(tmp_path, config, "--resume", state(unbroken("zero3"), 3), ranks=1)
    assert_goes_on(tmp_path / "run", unbroken("ddp"))


def _assert_exports(run, folder):
    """Fail unless `trainer.export` makes the run's own files of its last state."""
    for file, ema in (("model.safetensors", False), ("model-ema.safetensors", True)):
        target = folder / "exported.safetensors"
        export_state(str(run), target, source=None, changes={}, ema=ema, force=True)
        assert_equal_bits(load_file(target), load_file(run / file))


@pytest.mark.parametrize("name", ENGINES)
def test_a_state_of_every_engine_is_exported_without_it(unbroken, tmp_path, name):
    """The file of a state is that of the run, for weights and averages."""
    _assert_exports(unbroken(name), tmp_path)


def test_validation_on_several_ranks_is_that_of_one(write, unbroken, tmp_path):
    """Each engine on two ranks validates as one process does, with weights and averages.

    Also on three, of which the last round leaves two without a record.
    """
    config = write(tmp_path, {"kind": "ddp"}, batch_size=4)
    assert train_here(config) == 0
    expected = validation_of(tmp_path / "run")
    (tmp_path / "three").mkdir()
    config = write(tmp_path / "three", ENGINES["zero3"], batch_size=1, train={"max_steps": 1})
    train(tmp_path / "three", config, ranks=3)
    found = {name: validation_of(unbroken(name)) for name in ENGINES}
    found["three"] = validation_of(tmp_path / "three/run")[:4]
    for name, losses in found.items():
        assert len(losses) == (4 if name == "three" else len(expected)), name
        for (step, loss), (same_step, same_loss) in zip(losses, expected, strict=False):
            assert step == same_step
            assert loss == pytest.approx(same_loss, rel=1e-4), name


FULL_DISK = """
import errno, os, runpy
from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine

if os.environ["RANK"] == "1":
    save, calls = TorchCheckpointEngine.save, []
    def full_at_first(*arguments, **named):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*arguments, **named)
    TorchCheckpointEngine.save = full_at_first
runpy.run_module("trainer.run", run_name="__main__", alter_sys=True)
"""


SAMPLES = """[samples]
every_steps = 3
[[samples.prompts]]
prompt = "1girl, hat"
width = 64
height = 64
steps = 1
"""


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_a_full_disk_of_one_rank_and_a_signal_to_one(write, tmp_path, name):
    """No rank publishes a state that one cannot write; SIGTERM to one rank ends and saves all.

    Stage 2 makes pictures on the way; stage 3 refuses to.
    """
    model = {"path": str(tmp_path / "source.safetensors"), "family": None}
    write_single(tmp_path / "source.safetensors", random_model("sd1"))
    changes = {"model": model, "train": {"max_steps": ENDLESS}}
    config, run = write(tmp_path, ENGINES[name], **changes), tmp_path / "run"
    text = config.read_text()
    config.write_text(text + SAMPLES)
    if name == "zero3":
        (ended,) = run_ranks(tmp_path, config, ranks=1)
        assert ended.code == 2, ended.output
        assert "`samples.prompts` does not work with `engine.zero_stage = 3`" in ended.output
        assert not run.exists()
        config.write_text(text)
    with started(tmp_path, config, python=("-c", FULL_DISK)) as group:
        group.wait_until(state(run, 6).exists)
        group.send(1, signal.SIGTERM)
        ends = group.wait()
    assert [ended.code for ended in ends] == [143, 143], ends
    assert "step 3 could not be saved (No space left on device)" in ends[0].output
    assert not state(run, 3).exists()
    last = metrics_of(run)[-1]["step"]
    assert f"stopped after step {last:,} of 100,000; its state is saved." in ends[0].output
    assert contents(run, last)
    assert not list((run / "checkpoints").glob(".unfinished*"))
    assert (run / "samples/step-00000003/00.png").exists() == (name == "zero2")


def test_weights_of_16_bits_go_on_and_are_exported_from_those_that_step(write, tmp_path):
    """With bf16, states and models hold float32 weights, unless ZeRO-3 is to write 16 bits.

    The state goes on bit for bit, and without DeepSpeed up to what 16 bits round.
    """
    write_single(tmp_path / "source.safetensors", random_model("sd1"), torch.float32)
    changes = {
        "model": {"path": str(tmp_path / "source.safetensors"), "family": None},
        "train": {"precision": "bf16", "max_steps": 4},
        "checkpoint": {"every_steps": 2},
    }
    config, run = write(tmp_path, ENGINES["zero3"], **changes), tmp_path / "run"
    train(tmp_path, config)
    whole, file = contents(run, 4), load_file(run / "model.safetensors")
    name = "model.diffusion_model.input_blocks.0.0.weight"
    assert file[name].dtype == torch.float32
    assert torch.equal(file[name], whole["unet.conv_in.weight"])
    assert not torch.equal(file[name], file[name].bfloat16().float())
    frozen = load_file(tmp_path / "source.safetensors")
    same = "model.diffusion_model.time_embed.0.weight"
    assert torch.equal(file[same], frozen[same])

    config = write(tmp_path, ENGINES["zero3"] | {"zero3_save_16bit_model": True}, **changes)
    train(tmp_path, config, "--resume", state(run, 2))
    assert_equal_bits(contents(run, 4), whole)
    written = load_file(run / "model.safetensors")
    assert torch.equal(written[name], file[name].bfloat16().float())

    begun = contents(run, 2)
    config = write(tmp_path, {"kind": "ddp"}, batch_size=4, **changes)
    assert train_here(config, resume=str(state(run, 2))) == 0
    found = contents(run, 4)
    off = sum(float((found[name] - whole[name]).square().sum()) for name in trained_of(whole))
    moved = sum(float((whole[name] - begun[name]).square().sum()) for name in trained_of(whole))
    assert off < 0.1 * moved


def trained_of(whole):
    """The names of the weights that were trained, of those in a state."""
    return [name.removesuffix(" exp_avg") for name in whole if name.endswith(" exp_avg")]


def test_the_scale_of_losses_moves_between_engines():
    """DeepSpeed goes on with the factor of torch, and doubles it after as many steps more."""
    deepspeed = pytest.importorskip("deepspeed.runtime.fp16.loss_scaler")
    weight = torch.nn.Linear(1, 1)
    masters = Masters(Accelerator(cpu=True), weight, weight, torch.optim.SGD(weight.parameters()))
    assert masters.loss_scale() == {}
    scaler = deepspeed.DynamicLossScaler(
        init_scale=2**16,
        scale_window=10,
        min_scale=1,
        delayed_shift=1,
        consecutive_hysteresis=False,
        raise_error_at_min_scale=False,
    )
    masters._zero = SimpleNamespace(dynamic_loss_scale=True, loss_scaler=scaler)
    for _ in range(3):
        scaler.update_scale(overflow=False)
    masters.set_loss_scale({"scale": 1024.0, "good_steps": 6})
    assert masters.loss_scale() == {"scale": 1024.0, "good_steps": 6}
    scales = []
    for _ in range(6):
        scaler.update_scale(overflow=False)
        scales.append(scaler.cur_scale)
    assert scales == [1024, 1024, 1024, 1024, 2048, 2048]


class _Program:
    """An object whose pickle runs a program when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_nothing_that_a_state_names_is_run(tmp_path):
    """The classes and functions in a state of DeepSpeed get stand-ins."""
    folder = tmp_path / "pytorch_model"
    folder.mkdir()
    content = {
        "module": {"weight": torch.ones(2)},
        "optimizer": {"state": {}, "param_groups": [{"lr": 1.0, "params": [0]}]},
        "frozen_param_fragments": None,
        "program": _Program(str(tmp_path / "made")),
    }
    torch.save(content, folder / "mp_rank_00_model_states.pt")
    files = DeepSpeedFiles(folder, ["weight"])
    assert torch.equal(files.weight("weight"), torch.ones(2))
    assert not (tmp_path / "made").exists()
    torch.load(folder / "mp_rank_00_model_states.pt", weights_only=False)
    assert (tmp_path / "made").exists()
