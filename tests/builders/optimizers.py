"""Optimizers over a few small weights, in groups like those of a model."""

import torch
from torch.nn import Parameter

from trainer.config.settings import OptimizerSettings
from trainer.training.optimizer.build import build_optimizer

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


def weights_in(optimizer):
    """The weights of an optimizer themselves."""
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def same(left, right):
    """True if two lists of tensors are equal bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))
