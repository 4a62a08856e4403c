"""Samples and batches: what the loader gives to the loss. Only fields, shapes and units; everything random is drawn before.

B batch, N chunks, L 77, C latent channels (4), H W latent height and width (pixels / 8).
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from capmerge.tokens.chunks import CutText


class SampleRequest(NamedTuple):
    """The sample that a place in the plan asks for; all numbers count from 0."""

    dataset: int
    """The number of the `[[data]]`."""
    record: int
    """The place of the record in the index of its data set."""
    repeat: int
    epoch: int
    step: int
    """The optimizer step that trains the sample."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One sample exactly as it trains: a pure function of its `SampleId`, but for token warm-up."""

    dataset: int
    """Which `[[data]]`, from 0."""
    record: int
    """Its place in the index."""
    repeat: int
    key: str
    caption: str
    """The text that is encoded; "" when the caption was dropped."""
    style: str
    """`t`, `c` or `b`, as the rewrite marked the drawn line."""
    cut: CutText
    """The caption's tokens; its batch decides how many chunks there are."""
    latents_CHW: Tensor
    """float32, scaled by the family's factor."""
    noise_CHW: Tensor
    """float32: what the target is made of, offset and further levels included."""
    input_noise_CHW: Tensor | None
    """float32: the noise of the input where it differs (input perturbation); None when it is `noise_CHW`."""
    timestep: int
    size_conditioning: tuple[float, float, float, float, float, float] | None
    """Original height, width, crop top, left, target height, width in pixels; None for families without."""
    mask_HW: Tensor | None
    """float32 weights in [0, 1] at latent size; None when no mask was asked for."""
    text_noise_seed: int
    """For noise on the text states."""
    events: tuple[str, ...] = ()
    """What happened to it, for counting: caption_dropped, random_caption, word_repeated, flipped, replaced (no usable latents)."""


@dataclass(frozen=True, slots=True)
class Batch:
    """A micro-batch of one rank."""

    step: int
    """The optimizer step it belongs to, from 0."""
    epoch: int
    """From 0."""
    micro: int
    """Which micro-batch of the step, from 0."""
    latents_BCHW: Tensor
    noise_BCHW: Tensor
    input_noise_BCHW: Tensor | None
    timesteps_B: Tensor
    """int64."""
    ids: tuple[Tensor, ...]
    """For each tokenizer (B, N, L) int64."""
    size_B6: Tensor | None
    """float32."""
    mask_B1HW: Tensor | None
    weights_B: Tensor
    """float32: 1 for a real sample, 0 for one that only fills a place of a short global batch."""
    real_samples: int
    """Real samples of the whole global batch, over all ranks and micro-batches."""
    text_noise_seeds: tuple[int, ...]
    keys: tuple[str, ...]
    """Of the real samples."""
    captions: tuple[str, ...]
    """Of the real samples."""
    counts: dict[str, int]
    """Over the real samples: "samples", "tokens", "dropped_tokens", "wider_batches" (0 or 1), and every event."""

    def to(self, device: torch.device | str) -> Self:
        """The same with its tensors on `device`."""
        return self._with_tensors(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> Self:
        """The same with its tensors in page-locked memory, from which a GPU takes them without waiting; a loader calls it."""
        return self._with_tensors(Tensor.pin_memory)

    def _with_tensors(self, made: Callable[[Tensor], Tensor]) -> Self:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        tensors: dict[str, Any] = {
            name: made(value) for name, value in values.items() if isinstance(value, Tensor)
        }
        return replace(self, ids=tuple(map(made, self.ids)), **tensors)
