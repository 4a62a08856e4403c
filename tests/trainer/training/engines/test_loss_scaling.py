import json
import re

import pytest
import torch
from builders.runs import (
    assert_equal_bits,
    metrics_of,
    rewrite_examples,
    settings_of,
    state_of,
    train_here,
    write_config,
)

from trainer.errors import NonFiniteError, ResumeError
from trainer.training.engines import loss_scaling


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The rewritten examples."""
    return rewrite_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture
def config(metadata, tmp_path):
    """A function that writes a config with fp16 into the test's folder; its run is in `run`."""

    def write(**train):
        train = {"max_steps": 4, "batch_size": 2, "precision": "fp16"} | train
        settings = settings_of(metadata, tmp_path / "run", train=train)
        return write_config(tmp_path / "c.toml", settings)

    return write


@pytest.fixture
def scale(monkeypatch):
    """A function that sets the first factor and the steps after which it is doubled."""

    def choose(first, interval=2000):
        real = torch.amp.GradScaler
        monkeypatch.setattr(
            loss_scaling.torch.amp,
            "GradScaler",
            lambda device, *, enabled: real(
                device, init_scale=first, growth_interval=interval, enabled=enabled
            ),
        )

    return choose


def test_fp16_trains_as_fp32_within_its_precision(config, tmp_path):
    """Losses and gradient norms are those of fp32 within a few thousandths, and not the same."""
    written = config()
    assert train_here(written) == 0
    other = tmp_path / "fp32"
    assert train_here(written, "train.precision=fp32", f"train.output_dir={other}") == 0
    pairs = list(zip(metrics_of(tmp_path / "run"), metrics_of(other), strict=True))
    for name in ("loss", "grad_norm"):
        assert all(half[name] == pytest.approx(full[name], rel=5e-3) for half, full in pairs)
    assert any(half["loss"] != full["loss"] for half, full in pairs)
    assert all(half["loss_scale"] == 65_536 and "loss_scale" not in full for half, full in pairs)
    weights = state_of(tmp_path / "run", 4)
    assert {tensor.dtype for tensor in weights.values()} <= {torch.float32, torch.int64}


def test_the_scale_falls_until_gradients_fit_and_changes_nothing_else(
    config, scale, tmp_path, capsys
):
    """Steps that overflow are skipped and told, also with on_nonfinite = "stop"; then it trains."""
    scale(2.0**33)
    assert train_here(config(max_steps=20, on_nonfinite="stop")) == 0
    lines = metrics_of(tmp_path / "run")
    skipped = [line for line in lines if line.get("skipped")]
    assert 0 < len(skipped) < 20
    assert lines[len(skipped) :] == [line for line in lines if not line.get("skipped")]
    assert [line["loss_scale"] for line in skipped] == [
        2.0 ** (33 - number) for number in range(len(skipped))
    ]
    told = capsys.readouterr().err
    assert len(re.findall("was skipped: its gradients overflow fp16", told)) == len(skipped)
    assert "WARNING: step" not in told


def test_the_scale_goes_on_where_it_was(config, scale, tmp_path):
    """A resumed run doubles the scale at the same step, and ends with the same bits."""
    scale(1024.0, interval=3)
    written = config(max_steps=5)
    assert train_here(written) == 0
    other = f"train.output_dir={tmp_path / 'other'}"
    assert train_here(written, other, "train.max_steps=2") == 0
    assert train_here(written, other, resume="latest") == 0
    assert [line["loss_scale"] for line in metrics_of(tmp_path / "other")] == [1024] * 3 + [
        2048
    ] * 2
    assert_equal_bits(state_of(tmp_path / "run", 5), state_of(tmp_path / "other", 5))


def test_a_broken_gradient_is_none_of_the_scale(config, scale, monkeypatch):
    """Where a smaller scale cannot help, on_nonfinite = "stop" stops as in other precisions."""
    scale(1.0)
    monkeypatch.setattr(
        "trainer.training.engines.torch_step.clip_gradients", lambda *_: torch.tensor(float("nan"))
    )
    with pytest.raises(NonFiniteError):
        train_here(config(on_nonfinite="stop"))


def test_a_scale_that_no_run_saves_is_refused(config, tmp_path):
    """A state with an impossible scale is damaged: with it, every step would be skipped."""
    written = config(max_steps=1)
    assert train_here(written) == 0
    state = tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json"
    values = json.loads(state.read_text())
    of_no_run = [
        {"scale": 0, "good_steps": 1},
        {"scale": 1e400, "good_steps": 1},
        {"scale": 2},
        {"scale": True, "good_steps": 1},
        {"scale": "2", "good_steps": 1},
        [1],
        "two",
        None,
    ]
    for found in of_no_run:
        state.write_text(json.dumps(values | {"loss_scale": found}))
        with pytest.raises(ResumeError, match="found the loss scale"):
            train_here(written, "train.max_steps=2", resume="latest")


def test_precision_may_change_with_allow_change(config, tmp_path):
    """A run goes from fp32 to fp16 and back when the change is allowed."""
    written = config(max_steps=1, precision="fp32")
    assert train_here(written) == 0
    for step, precision in ((2, "fp16"), (3, "fp32")):
        changes = (f"train.max_steps={step}", f"train.precision={precision}")
        assert train_here(written, *changes, resume="latest", allow_change=True) == 0
    assert ["loss_scale" in line for line in metrics_of(tmp_path / "run")] == [False, True, False]
