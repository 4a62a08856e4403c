"""The engine: accelerate, set up from the config, and the exchange of values between ranks.

Knows no data and no model. All ranks call everything here alike; nothing is done by one rank alone
between two collectives.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

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

Value = TypeVar("Value")

# With full_bf16 the weights are bf16 themselves, so nothing is left to cast.
_PRECISION = {"fp32": "no", "bf16": "bf16", "full_bf16": "no"}


def build_engine(config: Config) -> Accelerator:
    """The accelerator of this process; starts the process group when a launcher asks for one.

    Raises `ConfigError` for a tracker that is not installed: accelerate would silently leave it
    out.
    """
    available = {str(tracker) for tracker in get_available_trackers()}
    missing = [name for name in config.log.trackers if name not in available]
    if missing:
        raise ConfigError(
            f"log.trackers: {', '.join(missing)} is not installed. "
            f"Install it (pip install {' '.join(missing)}), or remove it."
        )
    return Accelerator(
        # Where it finds no device, accelerate would start no process group, and each rank would
        # train alone.
        cpu=not torch.accelerator.is_available(),
        mixed_precision=_PRECISION[config.train.precision],
        # `train_step` accumulates by itself. With an explicit 1 here, no
        # ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment divides the loss.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=1, sync_with_dataloader=False
        ),
        log_with=list(config.log.trackers) or None,
        project_dir=str(config.train.output_dir),
        step_scheduler_with_optimizer=False,
    )


def from_rank_0(engine: Accelerator, value: Any) -> Any:
    """Rank 0's `value`, on every rank."""
    values = [value]
    if engine.num_processes > 1:
        broadcast_object_list(values)
    return values[0]


def from_all_ranks(engine: Accelerator, values: Sequence[Any]) -> list[Any]:
    """The values of all ranks, in the order of the ranks."""
    return list(gather_object(list(values))) if engine.num_processes > 1 else list(values)


def first_of_ranks(engine: Accelerator, value: Value | None) -> Value | None:
    """The first value that is not None, in the order of the ranks; None if all values are."""
    return next((found for found in from_all_ranks(engine, [value]) if found is not None), None)


def sum_over_ranks(engine: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """The sum of a tensor over the ranks."""
    if engine.num_processes == 1:
        return values
    summed = reduce(values, reduction="sum")
    assert isinstance(summed, torch.Tensor)
    return summed
