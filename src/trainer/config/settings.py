"""The sections of a training config: the type, meaning, unit and default of each setting.

Only values live here, and of each value alone its type and range. `load` reads the file,
`validation` names the mistakes in it, and `conflicts` knows which settings leave others without
effect. Relative paths count from the current directory, as on a command line.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from typing_extensions import TypedDict  # pydantic requires this one before Python 3.12

from capmerge.tokens.chunks import CHUNK_TOKENS, Chunking
from trainer.families import FAMILIES, Family, FamilyName

SettingPath = tuple[str | int, ...]
"""The keys that lead to a setting: ("loss", "huber_c"), ("data", 0, "caption", "shuffle")."""


RANDOM = "random"
"""The `model.path` that means untrained weights."""
MOST = 1_000_000_000
"""Largest count of steps, epochs, tags or files; at a step per second it lasts 30 years.

Any product of two counts still fits the 64-bit numbers of plans and indexes.
"""
_LONGEST_NAME = 255
_LONGEST_PATH = 4095
"""Bytes that Linux allows in a name and in a path."""

_PathT = TypeVar("_PathT", str, Path)


def checked_path(path: _PathT) -> _PathT:
    """The path itself; raises `ValueError` for one that no system call takes."""
    text = str(path)
    if "\0" in text:
        raise ValueError("expected a path without NUL")
    sizes = [len(name.encode("utf-8", "surrogateescape")) for name in text.split("/")]
    if max(sizes) > _LONGEST_NAME or sum(sizes) + len(sizes) - 1 > _LONGEST_PATH:
        raise ValueError(
            f"expected a path of at most {_LONGEST_PATH:,} bytes whose names have at most "
            f"{_LONGEST_NAME}"
        )
    return path


def _checked_deviation(deviation: float) -> float:
    """The standard deviation itself; raises `ValueError` unless it is above 0."""
    if deviation <= 0:
        raise ValueError(
            "expected a number above 0. A mean, which may be below 0, is noise.timestep_mean"
        )
    return deviation


class Section(BaseModel):
    """Base of all sections: frozen, without unknown keys, infinite numbers or conversions.

    "5" is not a number, and 1 is not true. Only lists become tuples and texts become paths, by
    `strict=False` at those fields, because TOML has neither.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSettings(Section):
    """`[model]`: the model to train."""

    family: FamilyName
    """sd1, sd2 or sdxl. A single file tells it itself."""
    path: Annotated[str, AfterValidator(checked_path)] = Field(min_length=1)
    """A single-file .safetensors, a diffusers folder, or "random" for untrained weights.

    A folder of that name is "./random".
    """
    variant: str = ""
    """With a folder: the variant of its files to read, such as fp16. Empty: the usual files.

    Where there are no usual files, those of the variant fp16 are read.
    """
    vae: Annotated[str, AfterValidator(checked_path)] = ""
    """A VAE to write beside the trained model, as a folder or a file. Empty: that of `path`."""
    latent_channels: int | None = Field(default=None, ge=1, le=256)
    """Channels of the latents. Not set: those of the VAE, else 4."""
    latent_scale: float | None = Field(default=None, gt=0)
    """Factor of the cached latents. Not set: that of the VAE's config, else of the family."""
    latent_shift: float | None = None
    """Number to subtract from them before. Not set: that of the VAE's config, else 0."""
    size: Literal["tiny", "full"] = "tiny"
    """With `path = "random"`: a model of a few hundred kB, or one of the family's real shape."""
    train_only: tuple[str, ...] = Field(default=(), strict=False)
    """Patterns (`fnmatch`) of the only U-Net parameters to train. Empty: all of them."""
    freeze: tuple[str, ...] = Field(default=(), strict=False)
    """Patterns (`fnmatch`) of U-Net parameters not to train, even if `train_only` names them."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a quarter slower."""


class CaptionSettings(Section):
    """`[caption]`, and `[data.caption]` for one data set: how an epoch changes a caption.

    Rules: sd-scripts-facts B2-B4.
    """

    pick: Literal["random", "cycle"] = "random"
    """Draw an alternative by its weight, or take each in turn over epochs and repeats."""
    shuffle: bool = False
    """Shuffle the tags of a line."""
    keep_tokens: int = Field(default=0, ge=0, le=MOST)
    """Number of leading tags that stay in place and are never dropped."""
    separator: str = Field(default=",", min_length=1)
    """Text that separates tags."""
    keep_tokens_separator: str = ""
    """Tags before its first and after its second occurrence stay in place. Empty: none."""
    secondary_separator: str = ""
    """Text between tags that stay together; it becomes `separator` after shuffling. Empty: none."""
    tag_dropout_rate: float = Field(default=0.0, ge=0, le=1)
    """Chance that a tag is left out."""
    token_warmup_steps: float = Field(default=0.0, ge=0, le=MOST)
    """Steps over which the number of tags grows to all; below 1, a share of the run's steps.

    A share is rounded down to whole steps; a number from 1 on is taken as it is, also 10.7.
    """
    token_warmup_min: int = Field(default=1, ge=1, le=MOST)
    """Number of tags with which the warm-up starts."""
    sentences: bool = False
    """Shuffle and drop parts of sentences too, not only tags (lines of style `t`, tags of `b`)."""
    dropout_rate: float = Field(default=0.0, ge=0, le=1)
    """Chance that a sample trains with an empty caption."""
    dropout_every_epochs: int = Field(default=0, ge=0, le=MOST)
    """Every n-th epoch, counted from 1, trains with empty captions. 0: none does."""


class DataSettings(Section):
    """`[[data]]`: one set of pictures."""

    metadata: Annotated[Path, AfterValidator(checked_path)] = Field(strict=False)
    """A file that `capmerge rewrite` wrote."""
    latents: Annotated[Path, AfterValidator(checked_path)] = Field(strict=False)
    """The folder of the cached latents."""
    index: Annotated[Path, AfterValidator(checked_path)] | None = Field(default=None, strict=False)
    """The index of the metadata; listings of latents lie beside it. It is made if missing.

    Not set: beside the metadata, or in `train.output_dir` where that folder cannot be written.
    """
    resolution: int | None = Field(default=None, ge=64, le=65_535)
    """Resolution to train where a picture has latents of several. Not set: the largest.

    It is the side of a square in px; buckets of more than half of its area and at most all of it
    belong to it.
    """
    repeats: int = Field(default=1, ge=1, le=10_000)
    """Number of times that an epoch holds each record; its plan has a line for each of them."""
    flip: bool = False
    """Take the flipped latents for half of the samples; the files need `latents_flipped`."""
    alpha_mask: bool = False
    """Weight the loss by the `alpha_mask` of the file; the files need one."""
    on_missing: Literal["stop", "skip"] = "stop"
    """On a missing or broken latents file: stop, or train the next record of its bucket."""
    allow_outside: bool = False
    """Allow keys and links to lead out of the latents folder."""
    caption: CaptionSettings = CaptionSettings()
    """Settings that replace those of `[caption]` for this set; see `Config.caption_of`."""


class TextSettings(Section):
    """`[text]`: the encoding of captions for the U-Net."""

    chunking: Chunking = "kohya"
    """Join chunks like sd-scripts, put them side by side like AUTOMATIC1111, or use one of them.

    `crop` keeps the first 75 tokens.
    """
    max_tokens: (
        Annotated[int, Field(ge=CHUNK_TOKENS, le=1000 * CHUNK_TOKENS, multiple_of=CHUNK_TOKENS)]
        | Literal["unlimited"]
    ) = 225
    """Tokens of a caption that are read: a multiple of 75, or "unlimited" for all of them.

    Without a limit, the longest caption of a micro-batch decides how many chunks of padding the
    others get; less so with `dynamic_chunks`.
    """
    dynamic_chunks: bool = False
    """Batch captions with the same number of chunks, and encode no more chunks than they need."""
    clip_skip: int | None = Field(default=None, ge=1, le=11)
    """SD1: layer of the text encoder to use, counted from the end. Not set: the last, as for 1."""
    embedding_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise on the text states. Source: arXiv 2305.20086, GN."""
    random_caption_rate: float = Field(default=0.0, ge=0, le=1)
    """Chance that random words replace a caption. Source: arXiv 2305.20086, RC."""
    word_repeat_rate: float = Field(default=0.0, ge=0, le=1)
    """Chance that a caption repeats one of its words somewhere. Source: arXiv 2305.20086, CWR."""


class NoiseSettings(Section):
    """`[noise]`: schedule, noise and timesteps. Source: sd-scripts-facts D2."""

    prediction: Literal["epsilon", "v", "flow"] = "epsilon"
    """Quantity that the U-Net predicts: the noise, the velocity, or the flow.

    The flow is the noise minus the latents on the straight line between them, at a share sigma of
    noise in (0, 1); sigma x 1000 is its timestep, a number that is not rounded. Source: arXiv
    2210.02747, model-facts 1.
    """
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise; needs `prediction = "v"`.

    Source: arXiv 2305.08891.
    """
    offset: float = Field(default=0.0, ge=0)
    """Standard deviation of a constant added to the noise of each channel."""
    multires_iterations: int = Field(default=0, ge=0, le=64)
    """Levels of multi-resolution noise. 0: none. A level of one pixel is the last."""
    multires_discount: float = Field(default=0.3, gt=0, le=1)
    """Weight of each level relative to the previous, finer one."""
    input_perturbation: float = Field(default=0.0, ge=0)
    """Extra noise on the input that is not in the target, as a share of the noise.

    Source: arXiv 2301.11706.
    """
    min_timestep: int = Field(default=0, ge=0, le=999)
    """Lowest timestep that is drawn; of a flow, lower limit of sigma x 1000 after the shift."""
    max_timestep: int = Field(default=1000, ge=1, le=1000)
    """Upper limit of the timesteps, which is not drawn itself."""
    timestep_sampling: Literal["uniform", "logit_normal"] = "uniform"
    """Flow: distribution of sigma before the shift.

    logit_normal is 1 / (1 + exp(-x)) of a normal x, which has more of the middle timesteps. Source:
    arXiv 2403.03206.
    """
    timestep_mean: float = Field(default=0.0, ge=-10, le=10)
    """Mean of the normal x of logit_normal; below 0 there is less noise."""
    timestep_std: Annotated[float, AfterValidator(_checked_deviation)] = Field(default=1.0, le=10)
    """Standard deviation of the normal x of logit_normal, above 0."""
    shift: Annotated[float, Field(ge=0.001, le=1000)] | Literal["resolution"] = 1.0
    """Flow: factor s that moves sigma to s sigma / (1 + (s - 1) sigma); above 1 to more noise.

    "resolution" is the square root of the picture's pixels / 1,048,576: 1 at 1024 x 1024. Source:
    arXiv 2403.03206.
    """


class LossSettings(Section):
    """`[loss]`. Source: sd-scripts-facts D3."""

    kind: Literal["l2", "l1", "huber", "smooth_l1"] = "l2"
    """Distance between prediction and target."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """Dependence of the threshold of huber and smooth_l1 on the timestep."""
    huber_c: float = Field(default=0.1, gt=0)
    """Threshold of huber and smooth_l1."""
    huber_scale: float = Field(default=1.0, gt=0)
    """Factor of the threshold for the constant and exponential schedules."""
    min_snr_gamma: float = Field(default=0.0, ge=0)
    """Largest SNR in min-SNR weights. 0: no such weights. Source: arXiv 2303.09556."""
    debiased: bool = False
    """Debiased estimation weights. Source: arXiv 2310.08442."""
    v_like_noise: bool = False
    """Scale a v-prediction loss like one of a noise prediction; needs `noise.prediction = "v"`."""
    v_pred_like: float = Field(default=0.0, ge=0)
    """Share of a v-prediction loss to add to that of a noise prediction.

    Needs `noise.prediction = "epsilon"`.
    """
    contrastive: float = Field(default=0.0, ge=0, lt=1)
    """Flow: weight of the squared distance from the target of another sample, which is subtracted.

    The other sample is the next one in the global batch. Needs `kind = "l2"`. Source: arXiv
    2506.05350.
    """


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


class ValidationSettings(Section):
    """`[validation]`: the loss on records that are never trained, and on as many that are."""

    every_steps: int = Field(default=1000, ge=1, le=MOST)
    """Steps between validations, besides one before the first step and one after the last."""
    records: int = Field(default=0, ge=0, le=MOST)
    """Number of records to hold out, in all data sets together. 0: none, unless by `share`."""
    share: float = Field(default=0.0, ge=0, lt=1)
    """Share of the records to hold out, in place of `records`. 0: none, unless by `records`.

    A record is held out by the hash of its key, whatever else is in the data.
    """


class CheckpointSettings(Section):
    """`[checkpoint]`: when the full state is saved, besides at the end."""

    every_steps: int | None = Field(default=None, ge=1, le=MOST)
    """Optimizer steps between saves. Not set: steps decide nothing."""
    every_epochs: int | None = Field(default=None, ge=1, le=MOST)
    """Epochs between saves. Not set: epochs decide nothing."""
    every_minutes: float = Field(default=30.0, ge=0)
    """Minutes between saves. 0: time decides nothing."""
    keep: int = Field(default=2, ge=1, le=MOST)
    """Number of newest states to keep."""


class ExportSettings(Section):
    """`[export]`: how the trained model is written at the end."""

    formats: tuple[Literal["diffusers", "single"], ...] = Field(
        default=("diffusers",), strict=False, min_length=1
    )
    """diffusers: the folder `model`. single: the file `model.safetensors`."""
    dtype: Literal["source", "fp16", "bf16", "fp32"] = "source"
    """Type of the weights. source: as `model.path` stores each of them, and fp32 for random ones.

    What a single-file source holds besides, such as its VAE, keeps its type.
    """
    title: str = ""
    """Title in the metadata of the single file. Empty: the family and the number of steps."""


class SamplePrompt(Section):
    """`[[samples.prompts]]`: one picture that the model makes; repeat the section for several."""

    prompt: str
    """Text of the picture, read as it is and chunked like the captions. Empty: an empty caption."""
    negative_prompt: str = ""
    """Text that the guidance leads away from. Empty: an empty caption."""
    width: int | None = Field(default=None, ge=64, le=4096, multiple_of=8)
    """Pixels, a multiple of 8. Not set: 512 for SD1, 768 for SD2, 1024 for SDXL."""
    height: int | None = Field(default=None, ge=64, le=4096, multiple_of=8)
    """Pixels, a multiple of 8. Not set: as for the width."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of the noise that the picture begins with, the same each time."""
    steps: int = Field(default=30, ge=1, le=1000)
    """Predictions of the U-Net on the way from noise to picture."""
    guidance: float = Field(default=6.0, ge=0, le=100)
    """Factor of classifier-free guidance. 1: none, which takes half the time."""


class SampleSettings(Section):
    """`[samples]`: pictures that the model makes from prompts while it trains."""

    prompts: tuple[SamplePrompt, ...] = Field(default=(), max_length=1000, strict=False)
    """The pictures; each set is made at the end, too. Empty: none are made."""
    every_steps: int | None = Field(default=None, ge=1, le=MOST)
    """Optimizer steps between two sets of pictures. Not set: only the end has one."""


class LogSettings(Section):
    """`[log]`: what is written beside the progress bar."""

    every_steps: int = Field(default=1, ge=1, le=MOST)
    """Steps between lines of metrics.jsonl."""
    samples: bool = False
    """List the keys and captions of a step in its line."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(default=(), strict=False)
    """Trackers of accelerate that get the same numbers."""
    project: str = "trainer"
    """Project name for the trackers."""


class CacheSettings(Section):
    """`[cache]`: latents made of pictures by `python -m trainer.cache`; a training ignores it.

    Sources: sd-scripts-facts A4, A5 and D6.
    """

    images: Annotated[str, AfterValidator(checked_path)] = ""
    """The folder of the pictures, which `python -m trainer.cache` needs."""
    metadata: Annotated[str, AfterValidator(checked_path)] = ""
    """A metadata file, whose keys name the pictures. Empty: all pictures in `images` and below.

    A key is the path of a picture below `images`, with its extension or without, or absolute.
    """
    metadata_output: Annotated[str, AfterValidator(checked_path)] = ""
    """The new metadata file, with `train_resolution` and `image_size` of every picture.

    Empty: `<stem>_lat` beside `metadata`, such as `meta_cap_lat.json`.
    """
    output: Annotated[str, AfterValidator(checked_path)] = ""
    """The folder of the latents. Empty: `images`, where sd-scripts looks for them."""
    vae: Annotated[str, AfterValidator(checked_path)] = ""
    """The VAE that encodes, a folder or a file. Empty: `model.vae`, else that of `model.path`."""
    vae_precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of the VAE's computation. SDXL's own VAE gives NaN in fp16."""
    resolution: int | None = Field(default=None, ge=64, le=8192)
    """Side in px of a square with the area of the largest bucket. Not set: 512, 768 or 1024.

    These are the sides of SD1, SD2 and SDXL.
    """
    bucket_steps: int = Field(default=64, ge=8, le=1024, multiple_of=8)
    """Pixels of which both sides of a bucket are multiples: 64 for SD1 and SD2, 32 for SDXL."""
    bucket_min: int | None = Field(default=None, ge=8, le=65_535)
    """Shortest side of a bucket in px. Not set: half of `resolution`."""
    bucket_max: int | None = Field(default=None, ge=8, le=65_535)
    """Longest side of a bucket in px. Not set: twice the `resolution`."""
    upscale: bool = True
    """Make pictures larger where they are smaller than their bucket.

    False: pictures are only made smaller, and each has a bucket of its own size, as with
    `bucket_no_upscale` in sd-scripts.
    """
    exif_rotation: bool = False
    """Turn pictures as their EXIF data say. sd-scripts does not."""
    alpha_mask: bool = False
    """Store the transparency of each picture as `alpha_mask`, which `data.alpha_mask` takes."""
    flip: bool = False
    """Store the latents of the mirrored picture too, which `data.flip` takes."""
    latents: Literal["sample", "mean"] = "sample"
    """A draw from the distribution that the VAE gives, as in sd-scripts, or the middle of it."""
    seed: int = Field(default=0, ge=0, lt=1 << 63)
    """Seed of the draws; each follows from it and from the path of its picture below `images`."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Type of the latents. Only this trainer reads fp16 and bf16, which take half the space."""
    suffix: Literal["_sd", "_sdxl", ""] | None = None
    """End of the names, behind the picture's size. Not set: `_sdxl` for SDXL, else `_sd`.

    Empty: the old names without a size, `<stem>.npz`.
    """
    batch_size: int = Field(default=1, ge=1, le=256)
    """Pictures of one bucket that are encoded together."""
    workers: int = Field(default=4, ge=1, le=256)
    """Threads per rank that read pictures and write files."""


class Config(Section):
    """A whole run."""

    model: ModelSettings
    data: tuple[DataSettings, ...] = Field(min_length=1, strict=False)
    caption: CaptionSettings = CaptionSettings()
    text: TextSettings = TextSettings()
    noise: NoiseSettings = NoiseSettings()
    loss: LossSettings = LossSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    train: TrainSettings
    speed: SpeedSettings = SpeedSettings()
    engine: EngineSettings = EngineSettings()
    ema: EmaSettings = EmaSettings()
    validation: ValidationSettings = ValidationSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    export: ExportSettings = ExportSettings()
    samples: SampleSettings = SampleSettings()
    log: LogSettings = LogSettings()
    cache: CacheSettings = CacheSettings()

    def caption_of(self, dataset: int) -> CaptionSettings:
        """`[caption]` with the changes that `data.<dataset>.caption` makes to it."""
        own = self.data[dataset].caption
        return self.caption.model_copy(
            update={name: getattr(own, name) for name in own.model_fields_set}
        )


def family_of(model: ModelSettings) -> Family:
    """The family of a model, with the latents of its own VAE where they are set."""
    given = {
        "latent_channels": model.latent_channels,
        "latent_scale": model.latent_scale,
        "latent_shift": model.latent_shift,
    }
    return replace(
        FAMILIES[model.family],
        **{name: value for name, value in given.items() if value is not None},  # type: ignore[arg-type]
    )
