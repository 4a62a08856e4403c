"""The parts of a rank's memory, and which of them are there at the same time."""

from dataclasses import dataclass
from typing import NamedTuple

from trainer.training.memory.trace import StepBytes

GIB = 2**30
CONTEXT = GIB * 6 // 10
"""Bytes that CUDA, cuBLAS and cuDNN take on a GPU before anything is trained."""
OF_RANKS = GIB * 4 // 10
"""Bytes of NCCL's own buffers, with several ranks."""
RESERVE = 0.05
"""Share of the peak that torch's allocator holds besides, in pieces that fit nothing.

It is about that with PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, and more without it.
"""


class Part(NamedTuple):
    """One line of the estimate."""

    name: str
    size: int
    """Bytes."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Estimate:
    """The memory of one rank."""

    lasting: tuple[Part, ...]
    """What is on the GPU all the time."""
    gradients: Part
    gradients_last: bool
    """False if they are only made in the backward pass, and dropped by the step."""
    traced: StepBytes
    """Of one micro-batch; with the gradients, unless they last."""
    step: Part
    """What the optimizer step makes and drops."""
    fixed: Part
    """What CUDA takes by itself."""
    host: tuple[Part, ...]
    """What is in main memory."""
    disk: tuple[Part, ...] = ()
    """What is on the disk of `[engine]`."""

    def in_passes(self) -> int:
        """The most bytes of tensors at any moment of forward and backward pass."""
        gradients = self.gradients.size if self.gradients_last else 0
        return sum(part.size for part in self.lasting) + gradients + self.traced.peak

    def in_step(self) -> int:
        """The most bytes of tensors at any moment of the optimizer step."""
        return sum(part.size for part in self.lasting) + self.gradients.size + self.step.size

    def peak(self) -> int:
        """The most bytes of tensors at any moment: what torch counts as allocated at most."""
        return max(self.in_passes(), self.in_step())

    def reserve(self) -> int:
        """The bytes that torch's allocator holds besides."""
        return round(self.peak() * RESERVE)

    def total(self) -> int:
        """The bytes that the GPU must have: the peak, the allocator's reserve and CUDA's own."""
        return self.peak() + self.reserve() + self.fixed.size
