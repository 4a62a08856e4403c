"""`[optimizer]`: the optimizer, its learning rates, and how they change."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field
from typing_extensions import TypedDict  # pydantic requires this one before Python 3.12

from trainer.config.section import MOST, Section


class ScheduleArguments(TypedDict, total=False):
    """`[optimizer.schedule_arguments]`: each argument is read by some schedules only."""

    __pydantic_config__ = ConfigDict(  # type: ignore[misc]
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    num_cycles: Annotated[float, Field(gt=0)]
    """cosine_with_restarts: number of falls to 0, default 1. cosine: number of waves, default 0.5.

    Half a wave is one fall to 0.
    """
    power: Annotated[float, Field(gt=0)]
    """polynomial: exponent of the fall, default 1, which is a straight line."""
    lr_end: Annotated[float, Field(ge=0)]
    """polynomial: final learning rate of the U-Net, default 1e-7."""
    f_min: Annotated[float, Field(ge=0)]
    """linear: factor of the rate at the end, default 0."""
    f_max: Annotated[float, Field(ge=0)]
    """linear: factor of the rate after warm-up, default 1."""
    step_rules: Annotated[
        str, Field(pattern=r"^([0-9.]+:[0-9]+,)+[0-9.]+$", examples=["1:10,0.1:20,0.01"])
    ]
    """piecewise_constant: factors of the rate, each up to a step, then the last factor; required.

    "1:10,0.1:20,0.01" is the full rate up to step 10, a tenth up to step 20, then a hundredth.
    """


class OptimizerSettings(Section):
    """`[optimizer]`: the optimizer, its learning rates, and how they change."""

    name: str = Field(default="AdamW", min_length=1)
    """A class of torch.optim or pytorch-optimizer, `Adafactor`, or a bitsandbytes one.

    Adafactor is that of transformers; those of bitsandbytes are 8-bit, 32-bit or paged.
    """
    learning_rate: float = Field(default=1e-5, ge=0)
    """Learning rate of the U-Net. 0: it is frozen."""
    text_learning_rate: float = Field(default=0.0, ge=0)
    """Learning rate of the (first) text encoder. 0: it is frozen."""
    text2_learning_rate: float = Field(default=0.0, ge=0)
    """SDXL: learning rate of the second text encoder. 0: it is frozen."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer, such as weight_decay."""
    schedule: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "piecewise_constant",
    ] = "constant"
    """Change of the learning rates over the steps: the schedule of that name in diffusers."""
    warmup_steps: int = Field(default=0, ge=0, le=MOST)
    """Steps over which the learning rates rise from 0."""
    schedule_arguments: ScheduleArguments = Field(default_factory=ScheduleArguments)
    """Further arguments of the schedule, such as num_cycles."""
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Largest norm of the whole gradient. 0: it is not clipped."""
    stochastic_rounding: bool | None = None
    """Round bf16 weights up or down by chance, so that small updates are kept on average.

    Not set: true with `train.precision = "full_bf16"`. It steps fp32 copies of a few weights at a
    time, so the optimizer keeps what it keeps for fp32 weights.
    """
    fused_backward: bool = False
    """Step each parameter as soon as its gradient is there, and free the gradient at once.

    The result is the same, without the memory of the gradients. For one rank, without accumulation,
    clipping or skipped steps.
    """
