from copy import deepcopy

import pytest
import torch
from torch.nn import Parameter

from trainer.training.optimizer.classes import find_class
from trainer.training.optimizer.fused_kernel import fit_loaded_state, with_fused
from trainer.training.optimizer.options import options_of

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "arguments", "device", "is_fused"),
    [
        ("AdamW", {}, CUDA, True),
        ("AdamW", {"weight_decay": 0.1, "amsgrad": True}, CUDA, True),
        ("SGD", {"momentum": 0.9}, CUDA, True),
        ("AdamW", {}, CPU, False),
        ("AdamW", {"foreach": True}, CUDA, False),
        ("AdamW", {"differentiable": True}, CUDA, False),
        ("AdamW", {"capturable": True}, CUDA, False),
        ("RMSprop", {}, CUDA, False),
        ("Adafactor", {}, CUDA, False),
    ],
)
def test_what_is_fused(name, arguments, device, is_fused):
    """Torch's optimizers are fused on a GPU, unless they cannot or the arguments choose."""
    found = with_fused(find_class(name), arguments, device)
    assert found == {**arguments, **({"fused": True} if is_fused else {})}


def test_the_choice_of_the_user_stays():
    """Neither `fused = false` nor `fused = true` is changed."""
    for value in (True, False):
        assert with_fused(find_class("AdamW"), {"fused": value}, CUDA) == {"fused": value}


def optimizer(memory_format, **arguments):
    """AdamW over a convolution and a bias, whose weights lie in that format."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, 3, 3, generator=generator)
    bias = torch.randn(4, generator=generator)
    parameters = [Parameter(weight.to(memory_format=memory_format)), Parameter(bias)]
    return torch.optim.AdamW(parameters, lr=1e-2, **arguments), parameters


def step(made, parameters, seed):
    """A step by gradients of that seed."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        gradient = torch.randn(parameter.shape, generator=generator)
        parameter.grad = torch.empty_like(parameter).copy_(gradient)
    made.step()


@pytest.mark.parametrize(("before", "after"), [(False, True), (True, False)])
@pytest.mark.parametrize(
    ("first", "then"),
    [
        (torch.contiguous_format, torch.channels_last),
        (torch.channels_last, torch.contiguous_format),
    ],
)
def test_a_state_goes_on_with_another_layout_and_kernel(before, after, first, then):
    """A loaded state fits the weights and the kernel of now, and trains the same numbers."""
    saved, parameters = optimizer(first, fused=before)
    step(saved, parameters, 1)
    resumed, others = optimizer(then, fused=after)
    built = options_of(resumed)
    resumed.load_state_dict(deepcopy(saved.state_dict()))
    for parameter, other in zip(parameters, others, strict=True):
        other.data.copy_(parameter.data)
    fit_loaded_state(resumed, built)
    assert resumed.param_groups[0]["fused"] is after
    kept = resumed.state[others[0]]
    assert kept["exp_avg"].stride() == others[0].stride()
    assert torch.equal(kept["exp_avg"], saved.state[parameters[0]]["exp_avg"])
    step(saved, parameters, 2)
    step(resumed, others, 2)
    for parameter, other in zip(parameters, others, strict=True):
        assert torch.allclose(parameter, other, atol=1e-7)
