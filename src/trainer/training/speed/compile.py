"""The U-Net's blocks, compiled by torch.compile: one by one, so that equal blocks share their code.

A compiled block has the same parameters under the same names, so saving, averaging and resuming
know nothing of it.
"""

import os
from collections.abc import Iterator

import torch
from torch import nn
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch._inductor.cpp_builder import get_cpp_compiler
from torch.utils._triton import has_triton

from trainer.config.settings import Config
from trainer.errors import ConfigError
from trainer.model.model import Model

CACHE_FOLDER = "compiled"
"""The folder in `train.output_dir` with the compiled code, which a resumed run uses again."""
BACKEND = "inductor"
_BLOCKS = ("BasicTransformerBlock", "ResnetBlock2D")
_MODES = 3
"""With gradients, without, and in the validation, whose micro-batches have a size of their own."""
_BESIDES = 8
"""Shapes besides the buckets: samples, and stand-ins for batches that are missing."""


def compile_blocks(model: Model, config: Config, n_buckets: int) -> str:
    """Compile the blocks of the U-Net at their first use, and return what that means in words.

    `n_buckets` is the number of shapes that micro-batches have. Before the engine prepares the
    model. Raises `ConfigError` where torch.compile cannot work.
    """
    blocks = list(_repeated_blocks(model.unet))
    _check_compiler()
    folder = config.train.output_dir.absolute() / CACHE_FOLDER
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    # At this number of variants of one function torch would stop compiling without an error. All
    # blocks of a class count together, because they share their functions.
    limit = _MODES * (n_buckets + _BESIDES) * len(blocks)
    dynamo.recompile_limit = limit
    dynamo.accumulated_recompile_limit = limit
    for block in blocks:
        block.compile(backend=BACKEND, dynamic=False)
    return (
        f"compiled: {len(blocks)} blocks of the U-Net, at the first batch of each of the "
        f"{n_buckets:,} shapes"
    )


class CompileLog:
    """Tells of the graphs that were compiled on the way."""

    def __init__(self) -> None:
        self._told = self._count()

    def lines(self, step: int, seconds: float) -> Iterator[str]:
        """A line if step `step`, which took so many seconds, has compiled anything."""
        count = self._count()
        if count > self._told:
            yield (
                f"step {step:,} took {seconds:.1f} seconds: {count - self._told:,} graphs were "
                f"compiled for a new shape, {count:,} so far"
            )
        self._told = count

    @staticmethod
    def _count() -> int:
        return int(counters["stats"]["unique_graphs"])


def _check_compiler() -> None:
    """Raise `ConfigError` if inductor has no compiler for this device."""
    try:
        # Triton, which compiles for CUDA, builds its launchers by a C compiler.
        get_cpp_compiler()
    except Exception as error:  # of a class of its own for each platform
        raise ConfigError(
            "speed.compile: found no C++ compiler, expected one, such as g++, by which torch "
            "compiles the blocks. Install one, or set speed.compile = false."
        ) from error
    if torch.cuda.is_available() and not has_triton():
        raise ConfigError(
            "speed.compile: Triton is not installed or does not know this card, expected it beside "
            "torch for CUDA. Install it (pip install triton), or set speed.compile = false."
        )


def _repeated_blocks(unet: nn.Module) -> Iterator[nn.Module]:
    for block in unet.modules():
        if type(block).__name__ in _BLOCKS:
            yield block
