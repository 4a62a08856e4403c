"""What makes a step of a model faster without changing its numbers by more than rounding.

Before the optimizer is built and the engine prepares the model: both take the weights as they lie.
"""

from typing import Any

import torch
from accelerate import Accelerator

from trainer.config.settings import Config
from trainer.errors import ConfigError
from trainer.model.model import Model
from trainer.training.accelerator import is_deepspeed
from trainer.training.attention_choice import choose_attention

_SHARDED_STAGE = 3


def speed_up(model: Model, config: Config, engine: Accelerator, n_buckets: int) -> str:
    """Prepare `model` as `[speed]` says, and return in words what was chosen, for the start line.

    Every rank has to call this. `n_buckets` is the number of shapes of micro-batches. Raises
    `ConfigError` for what cannot be done here.
    """
    told = [choose_attention(model, config, engine)]
    if lays_channels_last(config, engine):
        model.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        told.append("convolutions channels-last")
    if config.speed.compile:
        plugin: Any = getattr(engine.state, "deepspeed_plugin", None)
        if plugin and plugin.zero_stage == _SHARDED_STAGE:
            raise ConfigError(
                "speed.compile: found stage 3 of ZeRO, which fetches the weights inside of each "
                "block, expected stage 2 or lower. Lower it, or set speed.compile = false."
            )
        from trainer.training.compile import compile_blocks  # takes a second to import

        told.append(compile_blocks(model, config, n_buckets))
    return "; ".join(told)


def lays_channels_last(config: Config, engine: Accelerator) -> bool:
    """True if the weights of convolutions lie with their channels last."""
    wanted, on_cuda = config.speed.channels_last, engine.device.type == "cuda"
    if not is_deepspeed(engine):
        return on_cuda if wanted is None else wanted
    if wanted:
        raise ConfigError(
            "speed.channels_last = true: DeepSpeed lays the weights out itself, one after the "
            "other, expected another engine. Remove speed.channels_last."
        )
    return False
