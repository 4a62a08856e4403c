import os
import shutil

import pytest
import torch
import torch._dynamo
from builders.runs import (
    metrics_of,
    rewrite_examples,
    settings_of,
    state_of,
    train_here,
    write_config,
)
from safetensors.torch import load_file

from trainer.errors import ConfigError
from trainer.training.speed import compile as compiling

LAST = 4
MEASURED = ("loss", "grad_norm")


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """Some of the rewritten examples."""
    return rewrite_examples(tmp_path_factory.mktemp("examples"), 12)


def write(metadata, folder, **changes):
    """Write the config of a run with an average, states and a model; its path."""
    sections = {
        "train": {"max_steps": LAST},
        "ema": {"decay": 0.9},
        "checkpoint": {"every_steps": 2, "keep": 9},
        **changes,
    }
    folder.mkdir(exist_ok=True)
    return write_config(folder / "c.toml", settings_of(metadata, folder / "run", **sections))


@pytest.fixture(scope="module")
def plain(metadata, tmp_path_factory):
    """A run with no setting of `[speed]`."""
    folder = tmp_path_factory.mktemp("plain")
    assert train_here(write(metadata, folder)) == 0
    return folder / "run"


def assert_alike(run, other):
    """Fail unless two runs have the same losses, and the same names and weights in all files."""
    for one, two in zip(metrics_of(run), metrics_of(other), strict=True):
        for name in MEASURED:
            assert one[name] == pytest.approx(two[name], rel=1e-4), (one["step"], name)
    files = [state_of(folder, LAST) for folder in (run, other)]
    assert files[0].keys() == files[1].keys()
    saved = f"checkpoints/step-{LAST:08d}/ema.safetensors"
    written = "model/unet/diffusion_pytorch_model.safetensors"
    for name in (saved, written):
        one, two = (load_file(folder / name) for folder in (run, other))
        assert one.keys() == two.keys()
        for key, value in one.items():
            assert torch.allclose(value, two[key], atol=2e-3), key


SPEED = {"attention": "math", "channels_last": True}


def test_faster_settings_train_the_same(plain, metadata, tmp_path, capfd):
    """Kernel and layout change neither losses nor weights by more than rounding, nor any name."""
    config = write(metadata, tmp_path / "a", speed=SPEED)
    assert train_here(config) == 0
    told = capfd.readouterr().err
    assert "; attention: U-Net math, text encoders math; convolutions channels-last" in told
    assert_alike(plain, tmp_path / "a" / "run")


def test_a_resumed_run_may_change_them(plain, metadata, tmp_path):
    """They are no change of the run, and a state fits weights that lie otherwise."""
    config = write(metadata, tmp_path / "b", speed=SPEED)
    text = config.read_text(encoding="utf-8")
    fused = text.replace("[optimizer]", "[optimizer]\narguments = {fused = true}")
    config.write_text(fused, encoding="utf-8")
    folder = tmp_path / "b"
    shutil.copytree(plain, folder / "run")
    shutil.rmtree(folder / "run" / "checkpoints" / f"step-{LAST:08d}")
    assert train_here(config, resume="latest") == 0
    assert_alike(plain, folder / "run")


@pytest.fixture
def compiles_quickly(monkeypatch):
    """Blocks are traced and differentiated as always, but their code is run by torch itself."""
    monkeypatch.setattr(compiling, "BACKEND", "aot_eager")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    monkeypatch.setenv("TRITON_CACHE_DIR", "")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# Torch hides this warning of its own in a way that pytest's filter does not know.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.usefixtures("compiles_quickly")
def test_compiled_blocks_train_and_are_saved_the_same(metadata, tmp_path, capfd):
    """A compiled run has the losses, weights and names of any other, and goes on as any other."""
    settings = {
        "speed": {"compile": True},
        "model": {"gradient_checkpointing": True},
        "validation": {"records": 2, "every_steps": 2},
    }
    config = write(metadata, tmp_path / "c", **settings)
    assert train_here(config) == 0
    told = capfd.readouterr().err
    assert "compiled: 12 blocks of the U-Net" in told
    assert "graphs were compiled for a new shape" in told
    assert "recompile_limit" not in told
    run, without = tmp_path / "c" / "run", tmp_path / "d"
    # Compiled code lies in the run, where a resumed run finds it.
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(run / compiling.CACHE_FOLDER)
    assert os.environ["TRITON_CACHE_DIR"] == str(run / compiling.CACHE_FOLDER / "triton")
    assert train_here(write(metadata, without, **{**settings, "speed": {}})) == 0
    assert_alike(without / "run", run)
    # The last steps once more, without compiling.
    shutil.rmtree(run / "checkpoints" / f"step-{LAST:08d}")
    assert train_here(config, "speed.compile=false", resume="latest") == 0
    assert_alike(without / "run", run)


def test_no_compiler_is_told(metadata, tmp_path, monkeypatch):
    """Without a C++ compiler the run ends before it starts, with the next step."""
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("torch._inductor.config.cpp.cxx", ("no-such-compiler",))
    config = write(metadata, tmp_path / "f", speed={"compile": True})
    with pytest.raises(ConfigError, match=r"speed\.compile: found no C\+\+ compiler"):
        train_here(config)


def test_shapes_without_end_are_refused(metadata, tmp_path):
    """Where the longest caption of a batch decides its shape, nothing is compiled."""
    text = {"max_tokens": "unlimited"}
    config = write(metadata, tmp_path / "g", speed={"compile": True}, text=text)
    with pytest.raises(ConfigError, match=r"speed\.compile = true` does not work with"):
        train_here(config)
