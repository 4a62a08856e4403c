"""The engine: accelerate from config, and what all ranks must agree on. Knows no data and no model.

Everything here is called by all ranks alike; nothing is done by one rank alone between two
collectives.
"""

from collections.abc import Sequence
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    GradientAccumulationPlugin,
    broadcast_object_list,
    gather_object,
    reduce,
)

from trainer.config.settings import Config
from trainer.errors import ConfigError

_PRECISION = {
    "fp32": "no",
    "bf16": "bf16",
    "full_bf16": "no",
}  # full_bf16 has bf16 weights, so nothing is left to cast


def build_engine(config: Config) -> Accelerator:
    """The accelerator of this process; starts the process group when a launcher asks for one.

    Raises `ConfigError` for a tracker that is not installed: accelerate would leave it out without
    a word.
    """
    missing = [
        name
        for name in config.log.trackers
        if name not in {str(tracker) for tracker in get_available_trackers()}
    ]
    if missing:
        raise ConfigError(
            f"log.trackers: {', '.join(missing)} is not installed. Install it (pip install {' '.join(missing)}), or remove it."
        )
    return Accelerator(
        # Without a device to find, accelerate would start no process group, and each rank would
        # train alone.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=_PRECISION[config.train.precision],
        # The step accumulates by itself. Given as 1 here, so that no
        # ACCELERATE_GRADIENT_ACCUMULATION_STEPS divides the loss.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=1, sync_with_dataloader=False
        ),
        log_with=list(config.log.trackers) or None,
        project_dir=str(config.train.output_dir),
        step_scheduler_with_optimizer=False,
    )


def from_rank_0(engine: Accelerator, value: Any) -> Any:
    """Rank 0's `value` on every rank."""
    values = [value]
    if engine.num_processes > 1:
        broadcast_object_list(values)
    return values[0]


def from_all_ranks(engine: Accelerator, values: Sequence[Any]) -> list[Any]:
    """The values of all ranks, rank by rank."""
    return list(gather_object(list(values))) if engine.num_processes > 1 else list(values)


def sum_over_ranks(engine: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over the ranks."""
    if engine.num_processes == 1:
        return values
    summed = reduce(values, reduction="sum")
    assert isinstance(summed, torch.Tensor)
    return summed
