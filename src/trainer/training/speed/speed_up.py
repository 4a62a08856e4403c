"""What makes a step of a model faster without changing its numbers by more than rounding.

Before the optimizer is built and the engine prepares the model: both take the weights as they lie.
"""

import torch
from accelerate import Accelerator

from trainer.config.settings import Config
from trainer.model.model import Model
from trainer.training.engines.accelerator import is_deepspeed
from trainer.training.speed.attention_choice import choose_attention


def speed_up(model: Model, config: Config, engine: Accelerator, n_buckets: int) -> str:
    """Prepare `model` as `[speed]` says, and return in words what was chosen, for the start line.

    Every rank has to call this. `n_buckets` is the number of shapes of micro-batches. Raises
    `ConfigError` for what this machine cannot do.
    """
    told = [choose_attention(model, config, engine)]
    if lays_channels_last(config, engine):
        model.unet.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        told.append("convolutions channels-last")
    if config.speed.compile:
        from trainer.training.speed.compile import compile_blocks  # takes a second to import

        told.append(compile_blocks(model, config, n_buckets))
    return "; ".join(told)


def lays_channels_last(config: Config, engine: Accelerator) -> bool:
    """True if the weights of convolutions lie with their channels last, which DeepSpeed forbids."""
    wanted, on_cuda = config.speed.channels_last, engine.device.type == "cuda"
    return not is_deepspeed(engine) and (on_cuda if wanted is None else wanted)
