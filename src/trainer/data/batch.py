"""Samples and batches, which the loader hands to the loss.

This module has only fields, shapes and units; everything random has been drawn before.

Shape suffixes: B batch, N chunks, L 77, C latent channels, H W latent height and width
(pixels / 8).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from capmerge.tokens.chunks import CHUNK_IDS, CutText
from trainer.families import Family


class SampleRequest(NamedTuple):
    """The identity of a sample to be made, as the plan gives it; all numbers count from 0."""

    dataset: int
    """The number of the `[[data]]` section."""
    record: int
    """The number of the record in the index of its data set."""
    repeat: int
    epoch: int
    step: int
    """The optimizer step that trains the sample."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample exactly as it trains.

    A pure function of its `SampleId`, except for token warm-up, which depends on the step.
    """

    dataset: int
    """The number of the `[[data]]` section, from 0."""
    record: int
    """The number of the record in the index of its data set."""
    repeat: int
    key: str
    caption: str
    """The text that is encoded; "" when the caption was dropped."""
    style: str
    """`t`, `c` or `b`, as the rewrite marked the drawn line; "" for a record without text."""
    cut: CutText
    """The tokens of the caption; the batch decides how many chunks they are laid out in."""
    latents_CHW: Tensor
    """float32, scaled by the family's factor."""
    noise_CHW: Tensor
    """float32: the noise that the target is made from, including offset and multires levels."""
    input_noise_CHW: Tensor | None
    """float32: the noise that is added to the latents; None when it is `noise_CHW`.

    The two differ under input perturbation.
    """
    timestep: float
    """A whole number, or sigma x 1000 of a flow."""
    size_conditioning: tuple[float, float, float, float, float, float] | None
    """Original height and width, crop top and left, target height and width in pixels.

    None for families without size conditioning.
    """
    mask_HW: Tensor | None
    """float32 weights in [0, 1] at latent size; None when no mask was requested."""
    text_noise_seed: int
    """The seed of the noise on the text states."""
    events: tuple[str, ...] = ()
    """The names of the events that happened to the sample, to be counted.

    They are caption_dropped, random_caption, word_repeated, flipped, and replaced (the latents of
    the planned record were unusable).
    """


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one rank."""

    step: int
    """The optimizer step that the batch belongs to, from 0."""
    epoch: int
    """The epoch, from 0."""
    micro: int
    """The number of the micro-batch within the step, from 0."""
    latents_BCHW: Tensor
    noise_BCHW: Tensor
    input_noise_BCHW: Tensor | None
    timesteps_B: Tensor
    """int64, or float32 for a flow."""
    ids: tuple[Tensor, ...]
    """The token ids of each tokenizer: (B, N, L) int64."""
    size_B6: Tensor | None
    """float32: the size conditioning; None for families without it."""
    mask_B1HW: Tensor | None
    """float32; None when no sample has a mask."""
    weights_B: Tensor
    """float32: 1 for a real sample, 0 for one that only pads a short global batch."""
    real_samples: int
    """The number of real samples in the global batch, over all ranks and micro-batches."""
    text_noise_seeds: tuple[int, ...]
    keys: tuple[str, ...]
    """The keys of the real samples."""
    captions: tuple[str, ...]
    """The captions of the real samples."""
    counts: dict[str, int]
    """Counts over the real samples.

    The keys are "samples", "tokens", "dropped_tokens", "wider_batches" (0 or 1), and the name of
    every event.
    """
    other_flow_BCHW: Tensor | None = None
    """float32: for each sample, the flow of the next one in the global batch.

    None without `loss.contrastive`, and in a global batch of one sample.
    """
    styles: tuple[str, ...] = ()
    """The styles of the real samples, as `Sample.style`."""

    @classmethod
    def stand_in(cls, family: Family) -> Self:
        """The smallest batch that a model of `family` takes, of one sample that weighs nothing.

        A rank without a batch computes with it, so that the other ranks need not wait in vain.
        """
        return cls(
            step=0,
            epoch=0,
            micro=0,
            latents_BCHW=torch.zeros(1, family.latent_channels, 8, 8),
            noise_BCHW=torch.zeros(1, family.latent_channels, 8, 8),
            input_noise_BCHW=None,
            timesteps_B=torch.zeros(1, dtype=torch.int64),
            ids=tuple(torch.zeros(1, 1, CHUNK_IDS, dtype=torch.int64) for _ in family.encoders),
            size_B6=torch.zeros(1, 6) if family.size_conditioning else None,
            mask_B1HW=None,
            weights_B=torch.zeros(1),
            real_samples=1,
            text_noise_seeds=(0,),
            keys=(),
            captions=(),
            counts={},
        )

    def to(self, device: torch.device | str) -> Self:
        """The same batch with its tensors on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same batch with its tensors in page-locked memory.

        From there they are copied to a GPU without waiting. Torch's loader calls this method.
        """
        return self._with_tensors(Tensor.pin_memory)

    def record_stream(self, stream: torch.Stream) -> None:
        """Keep the memory of the tensors until what `stream` has to do by now is done."""
        self._with_tensors(lambda tensor: _recorded(tensor, stream))

    def _with_tensors(self, made: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors: dict[str, Any] = {
            name: made(value) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, ids=tuple(map(made, self.ids)), **tensors)


def _recorded(tensor: Tensor, stream: torch.Stream) -> Tensor:
    tensor.record_stream(stream)
    return tensor
