"""The memory that a run will need on each GPU, part by part, without a GPU and without weights.

Owns what the parts are and when they are there at the same time. Their sizes come from `model`,
whose weights have shapes alone, from a traced micro-batch and from a traced optimizer step.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config.settings import Config, family_of
from trainer.data.batch import Batch
from trainer.data.buckets import bucket_sizes, triple_of
from trainer.data.datasets import DataSet
from trainer.data.samples import build_chunker
from trainer.model.model import Model
from trainer.model.noise_schedule import Schedule
from trainer.training.loss import batch_loss
from trainer.training.memory.engines import divide_memory, makes_gradients_in_passes, types_of
from trainer.training.memory.parts import GIB, RESERVE, Estimate, Part
from trainer.training.memory.trace import META, Rules, trace_step

CHUNKS_OF_UNLIMITED = 3
"""Chunks of a caption where neither the settings nor the buckets tell them."""


class Shape(NamedTuple):
    """The size of the pictures and captions of a micro-batch."""

    width: int
    """Pixels."""
    height: int
    """Pixels."""
    chunks: int
    """Chunks of each caption."""


def largest_shape(config: Config, datasets: Sequence[DataSet]) -> Shape:
    """The largest pictures of the data, with the most chunks of any caption."""
    codes, _ = bucket_sizes([dataset.rows for dataset in datasets])
    buckets = [triple_of(code) for code in codes.tolist()]
    width, height, _ = max(buckets, key=lambda bucket: bucket[0] * bucket[1])
    chunks = max(bucket[2] for bucket in buckets) or build_chunker(config).max_chunks
    return Shape(width, height, chunks or CHUNKS_OF_UNLIMITED)


def estimate_memory(config: Config, model: Model, ranks: int, shape: Shape) -> Estimate:
    """The memory of each of `ranks` ranks of the run of `config` with micro-batches of `shape`.

    `model` is that of `build_model` without weights, which is moved to `META`, and to the type that
    the engine computes in.
    """
    low, autocast = types_of(config)
    model.to(META, dtype=low)
    batch = batch_of(config, shape)
    schedule = Schedule.of(config.noise).to(META)

    def loss() -> Tensor:
        return batch_loss(model, batch, schedule, config.noise, config.loss).value

    keeps_gradients = makes_gradients_in_passes(config, ranks)
    traced = trace_step(loss, model, Rules(autocast=autocast), keeps_gradients=keeps_gradients)
    return divide_memory(
        config, model, ranks, traced, sum(tensor.nbytes for tensor in _tensors(batch))
    )


def batch_of(config: Config, shape: Shape, device: torch.device = META) -> Batch:
    """A micro-batch of the run of `config`, of that shape and of zeros."""
    family, size = family_of(config.model), config.train.batch_size
    least = Batch.stand_in(family)
    latents_BCHW = torch.zeros(
        size, family.latent_channels, shape.height // 8, shape.width // 8, device=device
    )
    return replace(
        least,
        latents_BCHW=latents_BCHW,
        noise_BCHW=torch.zeros_like(latents_BCHW),
        timesteps_B=least.timesteps_B.repeat(size),
        ids=tuple(ids_BNL.repeat(size, shape.chunks, 1) for ids_BNL in least.ids),
        size_B6=None if least.size_B6 is None else least.size_B6.repeat(size, 1),
        weights_B=least.weights_B.repeat(size),
        text_noise_seeds=(0,) * size,
    ).to(device)


def _tensors(batch: Batch) -> Iterator[Tensor]:
    yield from (batch.latents_BCHW, batch.noise_BCHW, batch.timesteps_B, batch.weights_B)
    yield from batch.ids


def memory_lines(estimate: Estimate, config: Config, ranks: int, shape: Shape) -> Iterator[str]:
    """The estimate for people, one line per part."""
    where = "the GPU" if ranks == 1 else f"each of {ranks:,} GPUs"
    yield (
        f"memory of {where}, estimated: {estimate.total() / GIB:.1f} GiB for micro-batches of "
        f"{config.train.batch_size:,} x {shape.width:,} x {shape.height:,} px with "
        f"{shape.chunks:,} chunks of text"
    )
    kept = "with" if config.model.gradient_checkpointing else "without"
    for part in (
        *estimate.lasting,
        estimate.gradients,
        Part("activations", estimate.traced.saved, f"{kept} gradient checkpointing"),
        Part("largest temporary", estimate.traced.largest),
        estimate.step,
        Part("-> most in the passes", estimate.in_passes()),
        Part("-> most in the optimizer step", estimate.in_step()),
        Part("reserve of the allocator", estimate.reserve(), f"{RESERVE:.0%} of the most"),
        estimate.fixed,
    ):
        yield _line(part)
    for title, parts in (("main memory of each rank", estimate.host), ("disk", estimate.disk)):
        if parts:
            yield f"{title}, estimated: {sum(part.size for part in parts) / GIB:.1f} GiB"
            yield from map(_line, parts)


def _line(part: Part) -> str:
    return f"  {part.name:36}{part.size / GIB:7.2f} GiB  {part.note}".rstrip()
