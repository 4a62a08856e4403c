"""Whole runs with bf16 weights that are rounded by chance, and with steps in the backward pass."""

import json
import zlib

import pytest
import torch
from builders.ranks import run_ranks
from builders.runs import (
    assert_equal_bits,
    metrics_of,
    rewrite_examples,
    settings_of,
    state_of,
    train_here,
    write_config,
)
from safetensors.torch import load_file

from trainer.config.load import load_config
from trainer.errors import ConfigError, NonFiniteError, ResumeError
from trainer.model.build import build_model
from trainer.training import step
from trainer.training.dry_run import show
from trainer.training.engines import fused_backward, torch_step
from trainer.training.engines.fused_backward import FusedStep


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The rewritten examples."""
    return rewrite_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture
def config(metadata, tmp_path):
    """A function that writes a small config into the test's folder; its run is in `run` there."""

    def write(optimizer=None, **train):
        train = {"max_steps": 3, "batch_size": 1, "precision": "full_bf16"} | train
        optimizer = {"learning_rate": 1e-4, "text_learning_rate": 0.0} | (optimizer or {})
        sections = settings_of(metadata, tmp_path / "run", train=train, optimizer=optimizer)
        return write_config(tmp_path / "config.toml", sections)

    return write


def optimizer_of(output_dir, step_number):
    """The saved state of the optimizer after a step."""
    folder = output_dir / "checkpoints" / f"step-{step_number:08d}"
    return torch.load(folder / "optimizer.bin", weights_only=True)


def pretend_older(folder):
    """Make a saved state as an earlier version saved it, which had no such settings."""
    config, state = folder / "config.toml", folder / "state.json"
    lines = config.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith(("stochastic_", "fused_backward"))]
    assert len(kept) == len(lines) - 2
    config.write_text("".join(kept))
    data = config.read_bytes()
    told = json.loads(state.read_text())
    told["files"]["config.toml"] = {"bytes": len(data), "crc32": f"{zlib.crc32(data):08x}"}
    state.write_text(json.dumps(told))


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_a_rounded_run_resumes_bit_for_bit(config, tmp_path, name):
    """2 + resume + 1 steps give the weights and the optimizer state of 3, also in 8 bits."""
    if name == "AdamW8bit":
        pytest.importorskip("bitsandbytes")
    written = config({"name": name})
    assert train_here(written) == 0
    parts = f"train.output_dir={tmp_path / 'parts'}"
    assert train_here(written, parts, "train.max_steps=2") == 0
    assert train_here(written, parts, resume="latest") == 0
    whole, resumed = (optimizer_of(tmp_path / folder, 3) for folder in ("run", "parts"))
    torch.testing.assert_close(resumed["state"], whole["state"], rtol=0, atol=0)
    assert resumed["param_groups"] == whole["param_groups"]
    weights = [
        load_file(tmp_path / folder / "checkpoints" / "step-00000003" / "model.safetensors")
        for folder in ("run", "parts")
    ]
    assert_equal_bits(*weights)
    assert {tensor.dtype for tensor in weights[0].values()} == {torch.bfloat16}
    assert metrics_of(tmp_path / "parts") == metrics_of(tmp_path / "run")


def test_an_older_run_goes_on_without_it_and_says_so(config, tmp_path, capsys):
    """A state from before the setting resumes with weights rounded to the nearest, bit for bit."""
    nearest = "optimizer.stochastic_rounding=false"
    assert train_here(config(), nearest) == 0
    old = f"train.output_dir={tmp_path / 'old'}"
    written = config()
    assert train_here(written, old, nearest, "train.max_steps=1") == 0
    pretend_older(tmp_path / "old" / "checkpoints" / "step-00000001")
    with pytest.raises(ResumeError, match=r"stochastic_rounding: saved false, now true"):
        train_here(written, old, "optimizer.stochastic_rounding=true", resume="latest")
    capsys.readouterr()
    assert train_here(written, old, "train.max_steps=2", resume="latest") == 0
    told = capsys.readouterr().err
    assert "is of a run without optimizer.stochastic_rounding, so this one goes on without" in told
    assert 'WARNING: train.precision = "full_bf16"' in told
    # The next resume finds the choice in the state, and makes it again.
    assert train_here(written, old, resume="latest") == 0
    assert_equal_bits(state_of(tmp_path / "old", 3), state_of(tmp_path / "run", 3))
    assert optimizer_of(tmp_path / "old", 3)["state"][0]["exp_avg"].dtype == torch.bfloat16
    # Asked for and allowed, it begins, with a state in fp32 from then on.
    asked = ("optimizer.stochastic_rounding=true", "train.max_steps=4")
    assert train_here(written, old, *asked, resume="latest", allow_change=True) == 0
    kept = optimizer_of(tmp_path / "old", 4)["state"][0]
    assert kept["exp_avg"].dtype == torch.float32
    assert "now true" in capsys.readouterr().err


def test_the_default_follows_the_precision(config, capsys):
    """It is on with bf16 weights alone, false is no mistake elsewhere, and true is one."""
    written = config()
    show(load_config(written))
    assert "\nstochastic_rounding = true\n" in capsys.readouterr().out
    show(load_config(written, ["train.precision=bf16", "optimizer.stochastic_rounding=false"]))
    assert "stochastic_rounding = true" not in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"stochastic_rounding` has no effect with `train.prec"):
        load_config(written, ["train.precision=bf16", "optimizer.stochastic_rounding=true"])
    with pytest.raises(ConfigError, match=r"stochastic_rounding = true` does not work with `engin"):
        load_config(written, ["engine.kind=deepspeed", "optimizer.stochastic_rounding=true"])
    show(load_config(written, ["engine.kind=deepspeed"]))
    assert "\nstochastic_rounding = false\n" in capsys.readouterr().out
    for precision, rounding in (("bf16", "false"), ("full_bf16", "true")):
        with pytest.raises(ConfigError, match=r"kahan_sum` has no effect with `"):
            load_config(
                written,
                [
                    "optimizer.name=StableAdamW",
                    "optimizer.arguments.kahan_sum=true",
                    f"train.precision={precision}",
                    f"optimizer.stochastic_rounding={rounding}",
                ],
            )


@pytest.mark.ranks
def test_ranks_round_alike(config, tmp_path):
    """Two ranks hold the same bits after each step, which the check of the engine compares."""
    ranks = ("engine.check_ranks_every_steps=1", "log.samples=false")
    settings = [word for each in ranks for word in ("--set", each)]
    for ended in run_ranks(tmp_path, config(max_steps=2), *settings):
        assert ended.code == 0, ended.output
    state = load_file(tmp_path / "run" / "checkpoints" / "step-00000002" / "model.safetensors")
    start = build_model(load_config(config())).state_dict()
    unet = {name: tensor for name, tensor in state.items() if name.startswith("unet.")}
    moved = [bool((start[name] != tensor).any()) for name, tensor in unet.items()]
    assert sum(moved) > 0.9 * len(moved) > 0


FUSED = ("optimizer.fused_backward=true", "optimizer.clip_grad_norm=0", "train.on_nonfinite=stop")


@pytest.mark.parametrize(
    ("name", "precision"),
    [("AdamW", "fp32"), ("CAME", "full_bf16")],
)
def test_steps_in_the_backward_pass_are_those_of_a_plain_run(
    config, tmp_path, monkeypatch, name, precision
):
    """Weights, optimizer state, losses and gradient norms are equal, and no gradient is kept."""
    written = config({"name": name}, precision=precision)
    plain, fused = (f"train.output_dir={tmp_path / folder}" for folder in ("plain", "fused"))
    assert train_here(written, *FUSED[1:], plain) == 0
    kept = []
    end = FusedStep.step

    def watched(self, sums):
        kept.extend(parameter for parameter in self._numbers if parameter.grad is not None)
        return end(self, sums)

    monkeypatch.setattr(FusedStep, "step", watched)
    assert train_here(written, *FUSED, fused, "train.max_steps=2") == 0
    assert train_here(written, *FUSED, fused, resume="latest") == 0
    assert kept == []
    assert_equal_bits(state_of(tmp_path / "fused", 3), state_of(tmp_path / "plain", 3))
    pairs = zip(metrics_of(tmp_path / "fused"), metrics_of(tmp_path / "plain"), strict=True)
    for one, other in pairs:
        assert one.pop("grad_norm") == pytest.approx(other.pop("grad_norm"), rel=1e-2)
        assert one == other


@pytest.mark.parametrize("every_steps", [1, 0])
def test_a_broken_gradient_in_the_backward_pass_saves_nothing(config, tmp_path, every_steps):
    """Weights that a broken gradient has stepped are not saved, and the message says so."""
    written = config({"name": "SGD", "learning_rate": 1e30}, precision="fp32")
    way_on = r"--resume .*step-00000001 --allow-change" if every_steps else "start anew"
    with pytest.raises(
        NonFiniteError, match=rf"step 2: .*so they are broken and not saved. .*{way_on}"
    ):
        train_here(written, *FUSED, *[f"checkpoint.every_steps={every_steps}"] * every_steps)
    states = tmp_path / "run" / "checkpoints"
    found = [path.name for path in states.iterdir()] if states.exists() else []
    assert found == ["step-00000001"] * every_steps


def test_an_error_inside_the_backward_pass_saves_nothing(config, tmp_path, monkeypatch):
    """After an error between two parameters' steps the weights are of no step, so none is saved."""
    step_one = FusedStep._step_one
    steps = []

    def fail(self, parameter):
        steps.append(parameter)
        if len(steps) > 2 * len(self._numbers) - 5:
            raise MemoryError("no memory")
        step_one(self, parameter)

    monkeypatch.setattr(FusedStep, "_step_one", fail)
    with pytest.raises(MemoryError):
        train_here(config(precision="fp32"), *FUSED)
    assert not (tmp_path / "run" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (["train.accumulation=2"], "`train.accumulation = 2`"),
        (["optimizer.clip_grad_norm=1"], "`optimizer.clip_grad_norm = 1.0`"),
        (["train.on_nonfinite=skip"], '`train.on_nonfinite = "skip"`'),
        (["train.precision=fp16"], '`train.precision = "fp16"`'),
        (["engine.kind=deepspeed"], '`engine.kind = "deepspeed"`'),
    ],
)
def test_what_needs_the_whole_gradient_is_refused(config, settings, named):
    """Each setting that rests on the whole gradient is named, with the value that would do."""
    with pytest.raises(ConfigError) as refused:
        load_config(config(precision="fp32"), [*FUSED, *settings])
    assert f"`optimizer.fused_backward = true` does not work with {named}" in str(refused.value)
    assert load_config(config(precision="fp32"), FUSED)


def test_several_processes_are_refused(config, monkeypatch):
    """Gradients have to be summed over them before a step."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"fused_backward: found 2 processes, expected one"):
        show(load_config(config(), FUSED))


@pytest.mark.parametrize("settings", [(), FUSED])
def test_frozen_weights_have_neither_gradient_nor_state(config, tmp_path, monkeypatch, settings):
    """Only trained parameters get a gradient, and the optimizer keeps nothing for the others."""
    seen = {}
    guarded_step = torch_step.guarded_step

    def watched(optimizer, *scalars):
        seen["trained"] = {p for group in optimizer.param_groups for p in group["params"]}
        seen["with gradient"] = {p for p in seen["model"].parameters() if p.grad is not None}
        return guarded_step(optimizer, *scalars)

    train_step = step.train_step

    def with_model(state, *arguments):
        seen["model"] = state.bare_model
        return train_step(state, *arguments)

    for module in (torch_step, fused_backward):
        monkeypatch.setattr(module, "guarded_step", watched)
    monkeypatch.setattr("trainer.training.active_run.train_step", with_model)
    written = config({"text_learning_rate": 0.0}, max_steps=1)
    assert train_here(written, *settings, "model.train_only=['*attn*']") == 0
    trained = {p for p in seen["model"].parameters() if p.requires_grad}
    assert 0 < len(trained) < len([*seen["model"].unet.parameters()])
    assert seen["trained"] == trained
    assert seen["with gradient"] == (set() if settings else trained)
    assert len(optimizer_of(tmp_path / "run", 1)["state"]) == len(trained)
