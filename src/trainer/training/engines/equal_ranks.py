"""The check that all ranks hold equal weights, by a number that depends on each of their bits.

Ranks that step apart train several models, and only one of them is saved. The losses hardly show
it, and so an error in an engine or a driver may go on for days.
"""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.errors import RankError
from trainer.training.engines.accelerator import whole_weight

_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 24


def check_equal_ranks(engine: Accelerator, model: nn.Module, step: int) -> None:
    """Raise `RankError`, on all ranks, unless all have equal trained weights after `step` steps.

    Weights that ZeRO-3 has divided are gathered one at a time, so what is compared of them is what
    each rank would compute with.
    """
    if engine.num_processes == 1:
        return
    names, numbers = zip(*_numbers(engine, model), strict=True)
    own = torch.stack(numbers)
    of_ranks = engine.gather(own).view(engine.num_processes, -1)
    for rank, different in enumerate((of_ranks != of_ranks[0]).cpu()):
        if different.any():
            first = names[int(different.int().argmax())]
            raise RankError(
                f"step {step:,}: {int(different.sum()):,} of the {len(names):,} trained weights of "
                f"rank {rank} are not those of rank 0; the first is {first}. Expected equal "
                "weights on all ranks. Resume from a state of before that step, and report this."
            )


def _numbers(engine: Accelerator, model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            with whole_weight(engine, parameter) as weight:
                yield name, number_of(weight.detach())


def number_of(weight: Tensor) -> Tensor:
    """A whole number in which each bit of a tensor and its place count, as int64 on its device.

    It is the sum of the elements' bits, each times an odd number, modulo 2**64. A tensor is read in
    pieces of 16 M elements, which take 256 MB.
    """
    flat = weight.contiguous().view(-1).view(_BITS[weight.element_size()])
    number = torch.zeros((), dtype=torch.int64, device=weight.device)
    for start in range(0, flat.numel(), _PIECE):
        piece = flat[start : start + _PIECE].to(torch.int64)
        places = torch.arange(start, start + piece.numel(), device=weight.device)
        number += (piece * (2 * places + 1)).sum()
    return number
