import sys
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from builders.model import make_config
from diffusers.models.attention_processor import AttnProcessor2_0

from trainer.errors import ConfigError
from trainer.model.attention import AttentionShape
from trainer.model.build import build_model
from trainer.training.speed.attention_choice import choose_attention, rank_kernels

LARGE, SMALL = AttentionShape(1, 8, 40, 4096, 4096), AttentionShape(1, 8, 160, 64, 64)
SHAPES = Counter({LARGE: 10, SMALL: 2})


def choose(attention, **sections):
    """What is chosen for a tiny SD1 with that `speed.attention`, and the model."""
    AcceleratorState._reset_state(reset_partial_state=True)
    config = make_config("sd1", speed={"attention": attention}, **sections)
    model = build_model(config)
    return choose_attention(model, config, Accelerator()), model


@pytest.mark.parametrize(
    ("times", "order"),
    [
        # The fastest for all layers together is first, math always last.
        (
            {"flash": {LARGE: 2.0, SMALL: 1.0}, "cudnn": {LARGE: 1.0, SMALL: 2.0}},
            ("cudnn", "flash", "math"),
        ),
        # Times within 5 % are equal, so that a resumed run hardly ever chooses otherwise.
        (
            {"flash": {LARGE: 1.04, SMALL: 1.0}, "cudnn": {LARGE: 1.0, SMALL: 1.0}},
            ("flash", "cudnn", "math"),
        ),
        # A kernel that cannot take a shape leaves it to the fastest other one.
        (
            {
                "flash": {LARGE: 2.0, SMALL: 1.0},
                "cudnn": {LARGE: 1.0},
                "efficient": {LARGE: 3.0, SMALL: 3.0},
            },
            ("cudnn", "flash", "efficient", "math"),
        ),
        # One that takes none is not among them.
        ({"flash": {}, "efficient": {LARGE: 1.0}}, ("efficient", "math")),
        ({"flash": {}, "cudnn": {}}, ("math",)),
    ],
)
def test_kernels_are_ranked_by_their_times(times, order):
    """The order of preference follows from the times of a kernel for all layers of a part."""
    assert rank_kernels(times, SHAPES) == order


def test_without_a_gpu_torch_chooses():
    """On a CPU nothing is measured or set, and the start line says so."""
    told, model = choose("auto")
    if torch.cuda.is_available():
        assert "U-Net" in told
    else:
        assert told == "attention: chosen by torch, on cpu"
        processors = model.unet.attn_processors.values()
        assert {type(processor) for processor in processors} == {AttnProcessor2_0}


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has these kernels")
@pytest.mark.parametrize("attention", ["cudnn", "efficient"])
def test_a_kernel_of_gpus_is_refused_elsewhere(attention):
    """A kernel that this device does not have is refused by name."""
    with pytest.raises(ConfigError, match=f'speed.attention = "{attention}": found the device cpu'):
        choose(attention)


@pytest.mark.parametrize(
    ("attention", "module", "install"),
    [
        ("xformers", "xformers.ops", "pip install xformers"),
        ("flash-attention", "flash_attn", "pip install flash-attn"),
    ],
)
def test_a_package_that_is_missing_is_named(monkeypatch, attention, module, install):
    """A package that is asked for and not installed is an error with the next step."""
    for name in (module, module.split(".")[0]):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError) as refused:
        choose(attention)
    assert install in str(refused.value)
    assert 'set speed.attention to "auto"' in str(refused.value)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_gpu_measures(precision):
    """On a GPU a fused kernel is chosen for both parts, and one that is asked for is first."""
    told, _ = choose("auto", train={"precision": precision})
    assert all(name in ("flash", "cudnn", "efficient") for name in told.split()[2::3]), told
    told, _ = choose("efficient", train={"precision": precision})
    assert told.startswith("attention: U-Net efficient")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_kernel_that_takes_no_shape_is_refused():
    """The flash kernel does not compute in single precision."""
    with pytest.raises(ConfigError, match="takes none of the shapes of the U-Net"):
        choose("flash", train={"precision": "fp32"})
