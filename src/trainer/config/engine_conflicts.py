"""What DeepSpeed cannot carry out of a config, each with the reason and the next step."""

from collections.abc import Iterator
from typing import NamedTuple

from trainer.config.settings import Config


class EngineConflict(NamedTuple):
    """A setting of `[engine]` that cannot be carried out beside the others."""

    setting: tuple[str, str]
    text: str


CPU_ADAM = ("Adam", "AdamW")
"""The optimizers that DeepSpeed has for the CPU, which alone step with weights in fp16."""


def iter_engine_conflicts(config: Config) -> Iterator[EngineConflict]:
    """The combinations that DeepSpeed cannot carry out; none for another engine."""
    engine, precision = config.engine, config.train.precision
    if engine.kind != "deepspeed":
        return
    if config.optimizer.stochastic_rounding:
        yield EngineConflict(
            ("optimizer", "stochastic_rounding"),
            '`optimizer.stochastic_rounding = true` does not work with `engine.kind = "deepspeed"`,'
            " which rounds weights by itself: with bf16 it keeps them in float32 besides, with "
            "full_bf16 it rounds to the nearest number. Remove optimizer.stochastic_rounding, or "
            'set engine.kind = "ddp".',
        )
    if config.optimizer.fused_backward:
        yield EngineConflict(
            ("optimizer", "fused_backward"),
            '`optimizer.fused_backward = true` does not work with `engine.kind = "deepspeed"`, '
            "which reduces gradients in the backward pass itself. Remove optimizer.fused_backward, "
            'or set engine.kind = "ddp".',
        )
    if engine.zero_stage == 0 and precision != "fp32":
        yield EngineConflict(
            ("engine", "zero_stage"),
            # Source: 2**16 of FP16_UnfusedOptimizer in DeepSpeed 0.19, by which only the gradients
            # are divided. Adam hides it from all but small gradients.
            f'`engine.zero_stage = 0` does not work with `train.precision = "{precision}"`: '
            "there, DeepSpeed 0.19 divides gradients by a scale that it has not given the loss. "
            'Set engine.zero_stage to 1, 2 or 3, or engine.kind = "ddp".',
        )
    for what, device, path in (
        ("optimizer", engine.offload_optimizer_device, engine.offload_optimizer_nvme_path),
        ("param", engine.offload_param_device, engine.offload_param_nvme_path),
    ):
        if device != "nvme":
            continue
        if engine.zero_stage != 3:
            yield EngineConflict(
                ("engine", f"offload_{what}_device"),
                f'`engine.offload_{what}_device = "nvme"` does not work with `engine.zero_stage = '
                f"{engine.zero_stage}`: DeepSpeed uses a disk at stage 3 alone. "
                "Set engine.zero_stage = 3, or offload to the cpu.",
            )
        if not path:
            yield EngineConflict(
                ("engine", f"offload_{what}_device"),
                f'`engine.offload_{what}_device = "nvme"` needs a folder on that disk, found none. '
                f"Set engine.offload_{what}_nvme_path.",
            )
    if config.speed.channels_last:
        yield EngineConflict(
            ("speed", "channels_last"),
            '`speed.channels_last = true` does not work with `engine.kind = "deepspeed"`, which '
            "lays the weights out itself, one after the other. Remove speed.channels_last, or set "
            'engine.kind = "ddp".',
        )
    if engine.zero_stage == 3 and config.speed.compile:
        yield EngineConflict(
            ("speed", "compile"),
            "`speed.compile = true` does not work with `engine.zero_stage = 3`, which fetches the "
            "weights inside of each block. Set engine.zero_stage to 2 or lower, or remove "
            "speed.compile.",
        )
    if engine.zero_stage == 3 and config.samples.prompts:
        yield EngineConflict(
            ("samples", "prompts"),
            "`samples.prompts` does not work with `engine.zero_stage = 3`, with which no process "
            "has all weights. Set engine.zero_stage to 2 or lower, or remove [[samples.prompts]].",
        )
    offloads = engine.offload_optimizer_device != "none"
    if offloads and precision == "full_bf16":
        yield EngineConflict(
            ("engine", "offload_optimizer_device"),
            f'`engine.offload_optimizer_device = "{engine.offload_optimizer_device}"` does not '
            'work with `train.precision = "full_bf16"`: what is offloaded are the weights in '
            'float32, which full_bf16 has none of. Set train.precision = "bf16".',
        )
    if engine.fp16_master_weights_and_gradients and (
        engine.zero_stage not in (1, 2)
        or engine.offload_optimizer_device != "cpu"
        or config.optimizer.name not in CPU_ADAM
    ):
        yield EngineConflict(
            ("engine", "fp16_master_weights_and_gradients"),
            "`engine.fp16_master_weights_and_gradients = true` needs engine.zero_stage 1 or 2, "
            'engine.offload_optimizer_device = "cpu" and optimizer.name = "AdamW", found '
            f'`{engine.zero_stage}`, `"{engine.offload_optimizer_device}"` and '
            f'`"{config.optimizer.name}"`: DeepSpeed\'s own Adam for the CPU alone can do it. '
            "Set them, or leave it out.",
        )
