"""The engine: accelerate, set up from the config, and the exchange of values between ranks.

Knows no data and no model. All ranks call everything here alike; nothing is done by one rank alone
between two collectives.
"""

import gc
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.distributed
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    reduce,
)

from trainer.config.settings import Config
from trainer.errors import ConfigError, RankError
from trainer.training.engines import deepspeed_engine
from trainer.training.engines.launcher import Launched

Value = TypeVar("Value")

LONGEST_WAIT = timedelta(minutes=10)
"""The time after which a process that does not answer counts as lost.

The others wait that long for rank 0 to write a state or the model. It is the default of NCCL; that
of gloo is half an hour.
"""

# Of gloo, the store behind the process group, and NCCL, in the order of their sources.
_SIGNS_OF_LOSS = (
    "connection closed by peer",
    "connection reset by peer",
    "connection refused",
    "broken pipe",
    "timed out waiting",
    "connection was likely closed",
    "wait timeout",
    "remote process exited",
    "watchdog caught collective operation timeout",
)

# With full_bf16 the weights are bf16 themselves, so nothing is left to cast. fp16 is left to
# `trainer.training.engines.loss_scaling`, because accelerate would ignore it on a CPU.
_PRECISION = {"fp32": "no", "bf16": "bf16", "fp16": "no", "full_bf16": "no"}


def check_installed(launched: Launched) -> None:
    """Raise `ConfigError` for an engine or a tracker that is asked for and not installed.

    Accelerate would leave a missing tracker out without a word. To be called before long work.
    """
    available = {str(tracker) for tracker in get_available_trackers()}
    missing = [name for name in launched.config.log.trackers if name not in available]
    if missing:
        raise ConfigError(
            f"log.trackers: {', '.join(missing)} is not installed. "
            f"Install it (pip install {' '.join(missing)}), or remove it."
        )
    if launched.uses_deepspeed and find_spec("deepspeed") is None:
        raise ConfigError(
            "engine.kind: DeepSpeed is asked for and not installed. Install it (pip install "
            "'capmerge[train,deepspeed]'), or set engine.kind = \"ddp\"."
        )


def build_engine(launched: Launched) -> Accelerator:
    """The accelerator of this process; starts the process group when a launcher asks for one.

    `launched` is what config and launcher agree on, and all of it is installed. Raises `RankError`
    when the processes of the run do not meet.
    """
    try:
        return _engine(launched)
    except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RankError(
            f"{this_rank()}: found no way to meet the other processes at {place} "
            f"({_in_short(error)}), expected all {os.environ.get('WORLD_SIZE')} of them. Start "
            "them together, with a MASTER_ADDR that all can reach and a free MASTER_PORT."
        ) from error


def is_deepspeed(engine: Accelerator) -> bool:
    """True if DeepSpeed trains."""
    return bool(engine.distributed_type == DistributedType.DEEPSPEED)


def engine_name(engine: Accelerator) -> str:
    """What trains, for people: `DDP on 4 ranks`, `DeepSpeed ZeRO-2 on 4 ranks`, `one device`."""
    ranks = "one rank" if engine.num_processes == 1 else f"{engine.num_processes:,} ranks"
    if is_deepspeed(engine):
        return f"{deepspeed_engine.name_of_plugin(engine.deepspeed_plugin)} on {ranks}"
    return f"DDP on {ranks}" if engine.num_processes > 1 else "one device"


def _engine(launched: Launched) -> Accelerator:
    config = launched.config
    has_device = torch.accelerator.is_available()
    group = InitProcessGroupKwargs(timeout=LONGEST_WAIT)
    plugin = None
    if launched.uses_deepspeed:
        deepspeed_engine.prepare_process(has_device=has_device)
        plugin = deepspeed_engine.build_plugin(config, launched.deepspeed_file)
        if not has_device:
            group.backend = "gloo"
    engine = Accelerator(
        # Where it finds no device, accelerate would start no process group, and each rank would
        # train alone. DeepSpeed is another case: accelerate would leave it out without a word.
        cpu=not has_device and plugin is None,
        deepspeed_plugin=plugin,
        mixed_precision=deepspeed_engine.PRECISION[config.train.precision]
        if plugin
        else _PRECISION[config.train.precision],
        # `train_step` accumulates by itself. With an explicit 1 here, no
        # ACCELERATE_GRADIENT_ACCUMULATION_STEPS in the environment divides the loss.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=config.train.accumulation if plugin else 1, sync_with_dataloader=False
        ),
        log_with=list(config.log.trackers) or None,
        project_dir=str(config.train.output_dir),
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[
            group,
            # Gradients lie in the buffers that are exchanged, so that no copy of them is needed.
            DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        ],
    )
    assert is_deepspeed(engine) == launched.uses_deepspeed, "accelerate has chosen another engine"
    return engine


def prepare(
    engine: Accelerator, config: Config, model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[torch.nn.Module, Any]:
    """The model and its optimizer, on the device of the engine and in its wrappers."""
    with deepspeed_engine.exact_masters(config, model) if is_deepspeed(engine) else nullcontext():
        prepared, wrapped = engine.prepare(model, optimizer)
    if isinstance(prepared, torch.nn.parallel.DistributedDataParallel):
        # No buffer of these models ever changes, and a rank whose forward pass fails tries another
        # one: an exchange of buffers in each pass would leave the ranks out of step.
        prepared.broadcast_buffers = False
    return prepared, wrapped


@contextmanager
def whole_weight(engine: Accelerator, parameter: torch.nn.Parameter) -> Iterator[torch.Tensor]:
    """A context in which a weight that the ranks divide is there as a whole, on every rank."""
    if is_deepspeed(engine):
        with deepspeed_engine.gathered(parameter):
            yield parameter
    else:
        yield parameter


def problem_of_lost_rank(error: BaseException | None) -> str:
    """The start of a message on a process that is gone or does not answer, or "" for other errors.

    Its exceptions have no common class: gloo raises a `RuntimeError`, whose text alone tells it.
    Notes that were added to the error are told too.
    """
    while error is not None:
        text = str(error).lower()
        if isinstance(error, RuntimeError) and any(sign in text for sign in _SIGNS_OF_LOSS):
            known = "; ".join([_in_short(error), *getattr(error, "__notes__", ())])
            return f"{this_rank()}: lost another process of the run ({known})"
        error = error.__cause__
    return ""


def this_rank() -> str:
    """The name of this process in messages."""
    return f"rank {os.environ.get('RANK', '0')}"


def _in_short(error: BaseException) -> str:
    """The first sentence of an engine's error, without the place in its own source."""
    text = re.sub(r"^\[[^]]*\.(cc|cpp|h):\d+\]\s*", "", " ".join(str(error).split()))
    return re.split(r"\.( |$)", text)[0][:200]


def leave_ranks() -> None:
    """Leave the process group after an error, when nothing but garbage holds the model any more.

    If DDP were the last to hold the group, it would wait at the exit of the process for a thread of
    gloo with Python's lock in hand, which that thread may need: both would hang. NCCL has no such
    thread, but might wait for a lost process.
    """
    gc.collect()
    if torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()


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
