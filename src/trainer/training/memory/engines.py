"""What each engine of a run keeps on a GPU, in main memory and on a disk, in bytes.

DDP holds everything on every GPU. DeepSpeed divides it by the stage of ZeRO: 1 the master weights
and the states of the optimizer, 2 the gradients too, 3 the weights too. The sizes of DeepSpeed's
parts are read from the source of its version 0.19: runtime/zero/stage_1_and_2.py and stage3.py.
"""

from dataclasses import replace
from typing import NamedTuple

import torch

from trainer.config.settings import Config
from trainer.model.model import Model
from trainer.training.engines.deepspeed_engine import BUCKET
from trainer.training.memory.optimizer import Kind, OptimizerBytes, measure_optimizer
from trainer.training.memory.parts import CONTEXT, GIB, OF_RANKS, Estimate, Part
from trainer.training.memory.trace import StepBytes
from trainer.training.optimizer.portions import PORTION

MOST_GATHERED = 1_050_000_000
"""Weights that stage 3 holds whole at most: those that are soon used again and those fetched ahead.

They are stage3_max_live_parameters and stage3_prefetch_bucket_size.
"""
SUB_GROUP = 1_000_000_000
"""Weights that stage 3 steps at a time."""


def _is_deepspeed(config: Config) -> bool:
    return config.engine.kind == "deepspeed"


def types_of(config: Config) -> tuple[torch.dtype, torch.dtype | None]:
    """The type of the weights that compute, and that of autocast or None.

    DeepSpeed computes with weights in 16 bits; its master weights are others.
    """
    precision = config.train.precision
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    if precision == "full_bf16":
        return torch.bfloat16, None
    if _is_deepspeed(config):
        return half or torch.float32, None
    return torch.float32, half


def makes_gradients_in_passes(config: Config, ranks: int) -> bool:
    """True if gradients are there only from the backward pass to the step.

    Otherwise they, or their share, are there all the time.
    """
    if _is_deepspeed(config):
        return config.engine.zero_stage < 2 and config.train.accumulation == 1
    if _steps_in_backward(config):
        return False
    return ranks == 1 and config.train.accumulation == 1


def _rounds(config: Config) -> bool:
    """True if weights in bf16 are rounded by chance, which steps copies in float32."""
    return config.optimizer.stochastic_rounding is True


def _steps_in_backward(config: Config) -> bool:
    """True if each weight is stepped when its gradient is there, which is then dropped."""
    return config.optimizer.fused_backward


class _Sizes(NamedTuple):
    """How much there is of a model."""

    weights: int
    """Bytes of all weights, trained or not."""
    itemsize: int
    """Bytes of a number of them."""
    largest: int
    """Elements of the largest trained weight."""
    groups: tuple[tuple[Kind, ...], ...]
    """The kinds of the trained weights of each part."""

    def trained(self) -> int:
        """Elements of all trained weights."""
        return sum(self.shares(1))

    def shares(self, ranks: int) -> list[int]:
        """Elements of the trained weights of each part that fall to a rank."""
        return [
            -(-sum(torch.Size(shape).numel() for shape, _ in group) // ranks)
            for group in self.groups
        ]


def divide_memory(
    config: Config, model: Model, ranks: int, traced: StepBytes, batch_bytes: int
) -> Estimate:
    """The memory of each rank, with what was traced of a micro-batch."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    sizes = _Sizes(
        sum(parameter.nbytes for parameter in model.parameters()),
        trained[0].itemsize,
        max(parameter.numel() for parameter in trained),
        tuple(
            tuple((tuple(p.shape), p.dtype) for p in part.parameters() if p.requires_grad)
            for part in model.parts().values()
        ),
    )
    # The average follows the weights that the optimizer steps, which ZeRO divides.
    is_divided = _is_deepspeed(config) and config.engine.zero_stage > 0
    averaged = sum(sizes.shares(ranks)) if is_divided else sizes.trained()
    average = Part("moving average", 4 * averaged if config.ema.decay else 0)
    is_on_gpu = config.ema.device == "gpu"
    found = (_of_deepspeed if _is_deepspeed(config) else _of_ddp)(config, sizes, ranks, traced)
    first = found.lasting[0]
    weights = first if first.note else first._replace(note=_by_part(model))
    # DeepSpeed casts what the config's precision has built.
    read = sum(p.numel() for p in model.parameters()) * _itemsize_read(config)
    return replace(
        found,
        lasting=_there(
            weights,
            *found.lasting[1:],
            *([average] if is_on_gpu else []),
            Part("latents and captions of a batch", batch_bytes),
        ),
        host=_there(
            Part("weights while they are read", read),
            *found.host,
            *([] if is_on_gpu else [average]),
        ),
        disk=_there(*found.disk),
    )


def _there(*parts: Part) -> tuple[Part, ...]:
    return tuple(part for part in parts if part.size)


def _by_part(model: Model) -> str:
    """The bytes of each part of the model, and their type."""
    sizes = {
        name: sum(parameter.nbytes for parameter in part.parameters())
        for name, part in model.parts().items()
    }
    shown = ", ".join(f"{name} {size / GIB:.2f}" for name, size in sizes.items())
    return f"{shown}; {_name(next(model.parameters()).dtype)}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _itemsize_read(config: Config) -> int:
    """Bytes of a number of the weights as they are read, before the engine takes them."""
    return 2 if config.train.precision == "full_bf16" else 4


def _fixed(ranks: int) -> Part:
    return Part("CUDA and its libraries", CONTEXT + (OF_RANKS if ranks > 1 else 0))


def _of_ddp(config: Config, sizes: _Sizes, ranks: int, traced: StepBytes) -> Estimate:
    """DDP on several ranks, and plain training on one."""
    rounds, fused = _rounds(config), _steps_in_backward(config)
    measured = measure_optimizer(
        sizes.groups,
        config.optimizer,
        at_once=1 if fused else PORTION if rounds else None,
        copies=rounds,
    )
    gradients = sizes.itemsize * (sizes.largest if fused else sizes.trained())
    return Estimate(
        lasting=(
            Part("weights", sizes.weights),
            Part(f"optimizer state ({config.optimizer.name})", measured.state),
        ),
        gradients=Part(
            "gradients",
            gradients,
            "one at a time" if fused else "in DDP's buckets" if ranks > 1 else "",
        ),
        gradients_last=not makes_gradients_in_passes(config, ranks),
        traced=traced,
        step=Part("passing in the optimizer step", measured.step),
        fixed=_fixed(ranks),
        host=(),
    )


def _of_stage_0(config: Config, sizes: _Sizes, ranks: int, traced: StepBytes) -> Estimate:
    """DeepSpeed without ZeRO, which divides nothing, and trains in float32 alone."""
    found = _of_ddp(config, sizes, ranks, traced)
    bucket = min(BUCKET, sizes.trained()) * sizes.itemsize
    return replace(
        found,
        gradients=found.gradients._replace(note=""),
        step=found.step._replace(size=max(bucket, found.step.size)),
    )


def _master_type(config: Config) -> torch.dtype:
    """The type of the weights that ZeRO steps."""
    if config.train.precision == "full_bf16":
        return torch.bfloat16
    is_half = config.engine.fp16_master_weights_and_gradients
    return torch.float16 if is_half else torch.float32


def _of_deepspeed(config: Config, sizes: _Sizes, ranks: int, traced: StepBytes) -> Estimate:
    """DeepSpeed, whose optimizer steps one flat master weight for each part."""
    engine, stage, item = config.engine, config.engine.zero_stage, sizes.itemsize
    if stage == 0:
        return _of_stage_0(config, sizes, ranks, traced)
    shares = sizes.shares(ranks)
    own, master_type = sum(shares), _master_type(config)
    masters = [[((share,), master_type)] for share in shares if share]
    measured = measure_optimizer(masters, config.optimizer)
    per_master = master_type.itemsize
    master = Part(
        "master weights", per_master * own, f"{_name(master_type)}, 1 of {ranks:,} shares"
    )
    state = Part(
        f"optimizer state ({config.optimizer.name})", measured.state, f"1 of {ranks:,} shares"
    )
    # What a step takes at a time: a part of the model, of which stage 3 takes at most a sub-group.
    at_once = max(shares) if stage < 3 else min(max(shares), SUB_GROUP)
    bucket = Part("buffer to reduce gradients", BUCKET * item)
    gradients = item * (own if stage > 1 else sizes.trained())
    kept = [master, state]
    host: list[Part] = []
    disk: list[Part] = []
    if stage == 3 and master_type.itemsize == item and engine.offload_optimizer_device == "none":
        kept = [state]  # the weights themselves are stepped
    if engine.offload_optimizer_device != "none":
        # The step is that of the CPU; the GPU sends it the gradients.
        moved = [master, state, Part("gradients of the master weights", per_master * own)]
        (disk if engine.offload_optimizer_device == "nvme" else host).extend(moved)
        host.append(Part("weights on their way to the GPU", item * own))
        if config.train.accumulation > 1 and stage < 3:
            host.append(Part("gradients that add up", item * own))
        kept = [Part("gradients on their way to the CPU", 2 * item * sizes.largest)]
        measured, at_once, gradients = OptimizerBytes(0, 0), 0, gradients if stage == 1 else 0
    if stage < 3:
        weights = [Part("weights", sizes.weights), bucket]
    else:
        share = Part("weights", -(-sizes.weights // ranks), f"1 of {ranks:,} shares")
        gathered = min(sizes.weights, MOST_GATHERED * item)
        whole = Part("weights that are whole at a time", gathered)
        weights = [share, whole, bucket]
        if engine.offload_param_device != "none":
            (disk if engine.offload_param_device == "nvme" else host).append(share)
            weights = [Part("weights that are whole at a time", gathered), bucket]
    return Estimate(
        lasting=(*weights, *kept),
        gradients=Part("gradients", gradients),
        gradients_last=not makes_gradients_in_passes(config, ranks),
        traced=traced,
        step=Part("passing in the optimizer step", measured.step + at_once * (item + per_master)),
        fixed=_fixed(ranks),
        host=tuple(host),
        disk=tuple(disk),
    )
