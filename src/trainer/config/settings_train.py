"""`[train]`, `[speed]`, `[engine]` and `[ema]`: how a run goes, and on which devices."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainer.config.section import MOST, Section, checked_path


class TrainSettings(Section):
    """`[train]`: length and size of the run, and where it is stored."""

    output_dir: Annotated[Path, AfterValidator(checked_path)] = Field(strict=False)
    """Folder of the run: config, metrics, checkpoints, model."""
    max_steps: int | None = Field(default=None, ge=1, le=MOST)
    """Number of optimizer steps. Not set: no limit.

    One of `max_steps` and `max_epochs` is needed; with both, the run ends at whichever comes first.
    """
    max_epochs: int | None = Field(default=None, ge=1, le=MOST)
    """Number of epochs. Not set: no limit."""
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    """Seed of everything random. Not set: one is drawn, printed and stored."""
    batch_size: int = Field(default=1, ge=1, le=8192)
    """Samples per micro-batch on one rank; workers hold several in shared memory."""
    accumulation: int = Field(default=1, ge=1, le=65_536)
    """Micro-batches per optimizer step."""
    workers: int = Field(default=2, ge=0, le=256)
    """Processes per rank that load samples. 0: the training process loads them itself."""
    precision: Literal["fp32", "bf16", "fp16", "full_bf16"] = "fp32"
    """Single precision, bf16 or fp16 computation over fp32 weights, or bf16 weights too.

    fp16 is for cards without bf16: its losses are scaled so that small gradients do not become 0.
    Weights in bf16 lose every update below about 0.2 % of a weight, unless
    `optimizer.stochastic_rounding` keeps them: at a learning rate of 1e-5, 4.5 % of the weights
    moved, at 1e-6 0.8 %, and all of them in fp32.
    """
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """On a NaN or infinite gradient: skip the step, or save the state and stop."""


class SpeedSettings(Section):
    """`[speed]`: how the same step is computed faster; nothing here changes more than rounding."""

    attention: Literal[
        "auto", "flash", "cudnn", "efficient", "math", "xformers", "flash-attention"
    ] = "auto"
    """auto: on a CUDA device the fastest of torch's flash, cudnn and efficient, measured there.

    U-Net and text encoders are measured apart. On other devices torch chooses itself. xformers and
    flash-attention are packages of their own, and compute the attention of the U-Net alone.
    """
    channels_last: bool | None = None
    """Lay the weights of the U-Net's convolutions out with their channels last.

    Not set: on a CUDA device, unless DeepSpeed trains, which lays weights out itself.
    """
    compile: bool = False
    """Compile the U-Net's blocks with torch.compile, once for each shape of a micro-batch."""


class EngineSettings(Section):
    """`[engine]`: what trains on several devices, and what of a model each of them holds.

    Clipping and accumulation are those of `[optimizer]` and `[train]`, for every engine. How many
    processes there are, and where, is the launcher's business.
    """

    kind: Literal["auto", "ddp", "deepspeed"] = "auto"
    """DDP, where each device holds everything, or DeepSpeed, whose devices share by ZeRO.

    auto: DeepSpeed if the launcher's accelerate config asks for it, else DDP.
    """
    zero_stage: int = Field(default=2, ge=0, le=3)
    """DeepSpeed: what is divided among the devices: 0 nothing, 1 the states of the optimizer.

    2: the gradients too. 3: the weights too. Not set: as in the launcher's accelerate config.
    """
    offload_optimizer_device: Literal["none", "cpu", "nvme"] = "none"
    """DeepSpeed from stage 1 on: keep the states of the optimizer in main memory or on a disk.

    The disk, nvme, needs stage 3.
    """
    offload_optimizer_nvme_path: Annotated[str, AfterValidator(checked_path)] = ""
    """Folder on that disk."""
    offload_param_device: Literal["none", "cpu", "nvme"] = "none"
    """DeepSpeed, stage 3: keep the weights in main memory or on a disk while they are not used."""
    offload_param_nvme_path: Annotated[str, AfterValidator(checked_path)] = ""
    """Folder on that disk."""
    zero3_init_flag: bool = False
    """DeepSpeed, stage 3: divide the weights as soon as they are made, not when all are there."""
    zero3_save_16bit_model: bool = False
    """DeepSpeed, stage 3: write the model from its 16-bit weights, not from those in float32."""
    fp16_master_weights_and_gradients: bool = False
    """DeepSpeed, stage 2 on the CPU: keep the weights and gradients that step in fp16 too."""
    check_ranks_every_steps: int = Field(default=0, ge=0, le=MOST)
    """Steps between checks that all ranks hold equal weights, which end a run otherwise. 0: none.

    Each check reads all trained weights once.
    """


class EmaSettings(Section):
    """`[ema]`: a moving average of the trained weights, kept and saved beside them."""

    decay: float = Field(default=0.0, ge=0, lt=1)
    """Share of the average that each step keeps, such as 0.9999. 0: no average is kept."""
    warmup_steps: int = Field(default=0, ge=0, le=MOST)
    """Steps over which the decay rises from 0, so that the first weights are forgotten sooner."""
    device: Literal["gpu", "cpu"] = "gpu"
    """Keep the average on the device that trains, or in main memory.

    It takes 4 bytes per trained parameter. Main memory costs time: each step copies the weights.
    """
