"""The sections of a training config, frozen and typed: what each setting means, its unit and its default.

Only values, and of each value alone its type and range. `config` reads the file and names what is
wrong in it; `conflicts` knows which settings leave others without effect. Relative paths count from
the current directory, as on a command line.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from typing_extensions import TypedDict  # pydantic asks for this one before Python 3.12

from capmerge.tokens.chunks import CHUNK_TOKENS, Chunking
from trainer.families import FamilyName


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, finite numbers, and nothing converted: "5" is no number, 1 is not true.

    Only lists become tuples and texts become paths (`strict=False` at those fields): TOML has
    neither.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelSettings(Section):
    """`[model]`: what is trained."""

    family: FamilyName
    """sd1, sd2 or sdxl. No default."""
    path: str = Field(min_length=1)
    """A diffusers folder, or "random" for untrained weights (a folder of that name is "./random"). No default."""
    size: Literal["tiny", "full"] = "tiny"
    """With `path = "random"`: a model of a few hundred kB, or of the family's real shape. Default tiny."""
    train_only: tuple[str, ...] = Field(default=(), strict=False)
    """Patterns (`fnmatch`) of U-Net parameter names; when given, only those that match one are trained. Default: all."""
    freeze: tuple[str, ...] = Field(default=(), strict=False)
    """Patterns (`fnmatch`) of U-Net parameter names that are not trained, though `train_only` may name them. Default: none."""
    gradient_checkpointing: bool = False
    """Compute activations again in the backward pass: less memory, about a quarter slower. Default off."""


class CaptionSettings(Section):
    """`[caption]`, and `[data.caption]` for one data set: what one epoch makes of a caption. Rules: sd-scripts-facts B2-B4."""

    pick: Literal["random", "cycle"] = "random"
    """How an alternative is chosen: by its weight, or every one in turn over epochs and repeats. Default random."""
    shuffle: bool = False
    """Shuffle the tags of a line. Default off."""
    keep_tokens: int = Field(default=0, ge=0)
    """How many leading tags stay in place and are never dropped. Default 0."""
    separator: str = Field(default=",", min_length=1)
    """What stands between tags. Default ","."""
    keep_tokens_separator: str = ""
    """Tags before its first and behind its second occurrence stay in place. Default "": none."""
    secondary_separator: str = ""
    """Each occurrence becomes `separator` after shuffling, so that what it joins stays together. Default "": none."""
    tag_dropout_rate: float = Field(default=0.0, ge=0, le=1)
    """Chance of each tag to be left out. Default 0."""
    token_warmup_steps: float = Field(default=0.0, ge=0)
    """Steps (below 1: a share of the run's steps) over which the number of tags grows to all. Default 0: at once."""
    token_warmup_min: int = Field(default=1, ge=1)
    """How many tags the warm-up starts with. Default 1."""
    sentences: bool = False
    """Whether shuffle and tag dropout touch sentences too, not only lines of style `t` and the tags of `b`. Default no."""
    dropout_rate: float = Field(default=0.0, ge=0, le=1)
    """Chance of a sample to train with an empty caption. Default 0."""
    dropout_every_epochs: int = Field(default=0, ge=0)
    """Every n-th epoch (from 1) trains with empty captions. Default 0: never."""


class DataSettings(Section):
    """`[[data]]`: one set of pictures."""

    metadata: Path = Field(strict=False)
    """A file that `capmerge rewrite` wrote. No default."""
    latents: Path = Field(strict=False)
    """The folder of the cached latents. No default."""
    repeats: int = Field(default=1, ge=1)
    """How often an epoch holds each record. Default 1."""
    flip: bool = False
    """Take the flipped latents for half of the samples; the files need `latents_flipped`. Default off."""
    alpha_mask: bool = False
    """Weigh the loss by the `alpha_mask` of the file; the files need it. Default off."""
    on_missing: Literal["stop", "skip"] = "stop"
    """What a missing or broken latents file does: stop the run, or train the next record of its bucket. Default stop."""
    allow_outside: bool = False
    """Whether keys and links may lead out of the latents folder. Default no."""
    caption: CaptionSettings = CaptionSettings()
    """What is given here replaces `[caption]` for this set; `Config.caption_of` tells the result. Default: nothing."""


class TextSettings(Section):
    """`[text]`: how captions reach the U-Net."""

    chunking: Chunking = "kohya"
    """Chunks joined as sd-scripts does, whole chunks side by side as AUTOMATIC1111 does, or the first 75 tokens. Default kohya."""
    max_tokens: (
        Annotated[int, Field(ge=CHUNK_TOKENS, multiple_of=CHUNK_TOKENS)] | Literal["unlimited"]
    ) = 225
    """Tokens of a caption that are read: a multiple of 75, or "unlimited": all of the longest caption in the micro-batch. Default 225.

    Without a limit the others in its micro-batch decide how many chunks of padding a caption gets;
    less so with `dynamic_chunks`."""
    dynamic_chunks: bool = False
    """Put captions of the same number of chunks into a batch and encode no more chunks than they need. Default off."""
    clip_skip: int | None = Field(default=None, ge=1, le=11)
    """SD1: which layer from the end gives the states, 1 is the last. Default: the last."""
    embedding_noise: float = Field(default=0.0, ge=0)
    """Standard deviation of Gaussian noise on the text states. Default 0. Source: arXiv 2305.20086, GN."""
    random_caption_rate: float = Field(default=0.0, ge=0, le=1)
    """Chance of a caption to be replaced by one of random words. Default 0. Source: arXiv 2305.20086, RC."""
    word_repeat_rate: float = Field(default=0.0, ge=0, le=1)
    """Chance of a caption to get one of its words a second time at a random place. Default 0. Source: arXiv 2305.20086, CWR."""


class NoiseSettings(Section):
    """`[noise]`: schedule, noise and timesteps. Source: sd-scripts-facts D2."""

    prediction: Literal["epsilon", "v"] = "epsilon"
    """What the U-Net predicts. Default epsilon."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that the last timestep is pure noise; needs `prediction = "v"`. Default off. Source: arXiv 2305.08891."""
    offset: float = Field(default=0.0, ge=0)
    """Standard deviation of a constant added to each channel's noise. Default 0."""
    multires_iterations: int = Field(default=0, ge=0)
    """Levels of multi-resolution noise. Default 0: none."""
    multires_discount: float = Field(default=0.3, gt=0, le=1)
    """What each coarser level counts of the one before. Default 0.3."""
    input_perturbation: float = Field(default=0.0, ge=0)
    """Extra noise on the input that is not in the target, as a share of the noise. Default 0. Source: arXiv 2301.11706."""
    min_timestep: int = Field(default=0, ge=0, le=999)
    """Lowest timestep. Default 0."""
    max_timestep: int = Field(default=1000, ge=1, le=1000)
    """First timestep that is not drawn. Default 1000."""


class LossSettings(Section):
    """`[loss]`. Source: sd-scripts-facts D3."""

    kind: Literal["l2", "l1", "huber", "smooth_l1"] = "l2"
    """Distance of prediction and target. Default l2."""
    huber_schedule: Literal["constant", "exponential", "snr"] = "snr"
    """How the threshold of huber and smooth_l1 follows the timestep. Default snr."""
    huber_c: float = Field(default=0.1, gt=0)
    """Threshold of huber and smooth_l1. Default 0.1."""
    huber_scale: float = Field(default=1.0, gt=0)
    """Factor of the threshold for the constant and exponential schedules. Default 1."""
    min_snr_gamma: float = Field(default=0.0, ge=0)
    """Cap of the SNR in min-SNR weights; 0: no such weights. Default 0. Source: arXiv 2303.09556."""
    debiased: bool = False
    """Debiased estimation weights. Default off. Source: arXiv 2310.08442."""
    v_like_noise: bool = False
    """Scale a v-prediction loss as a noise prediction's would be; needs `noise.prediction = "v"`. Default off."""
    v_pred_like: float = Field(default=0.0, ge=0)
    """Add this share of a v-prediction's loss to a noise prediction's; needs `noise.prediction = "epsilon"`. Default 0."""


class ScheduleArguments(TypedDict, total=False):
    """`[optimizer.schedule_arguments]`: each is read by some schedules only."""

    __pydantic_config__ = ConfigDict(  # type: ignore[misc]
        extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    num_cycles: Annotated[float, Field(gt=0)]
    """cosine_with_restarts: how often the rate falls to 0. Default 1. cosine: how many whole waves. Default 0.5: one fall to 0."""
    power: Annotated[float, Field(gt=0)]
    """polynomial: 1 falls in a straight line. Default 1."""
    lr_end: Annotated[float, Field(ge=0)]
    """polynomial: the rate at the end, of the U-Net's. Default 1e-7."""
    f_min: Annotated[float, Field(ge=0)]
    """linear: factor of the rate at the end. Default 0."""
    f_max: Annotated[float, Field(ge=0)]
    """linear: factor of the rate after warm-up. Default 1."""
    step_rules: Annotated[
        str, Field(pattern=r"^([0-9.]+:[0-9]+,)+[0-9.]+$", examples=["1:10,0.1:20,0.01"])
    ]
    """piecewise_constant: factor of the rate up to a step, and the last factor, as in "1:10,0.1:20,0.01". No default."""


class OptimizerSettings(Section):
    """`[optimizer]`: the rates, and how they move."""

    name: str = Field(default="AdamW", min_length=1)
    """A class of torch.optim, an 8-bit or paged one of bitsandbytes, `Adafactor`, or one of pytorch-optimizer. Default AdamW."""
    learning_rate: float = Field(default=1e-5, ge=0)
    """Of the U-Net; 0 freezes it. Default 1e-5."""
    text_learning_rate: float = Field(default=0.0, ge=0)
    """Of the (first) text encoder; 0 freezes it. Default 0."""
    text2_learning_rate: float = Field(default=0.0, ge=0)
    """SDXL: of the second text encoder; 0 freezes it. Default 0."""
    arguments: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the optimizer, such as weight_decay. Default: its own."""
    schedule: Literal[
        "constant",
        "constant_with_warmup",
        "linear",
        "cosine",
        "cosine_with_restarts",
        "polynomial",
        "piecewise_constant",
    ] = "constant"
    """How the rate moves over the optimizer steps, as diffusers' schedule of that name. Default constant."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the rate rises from 0. Default 0."""
    schedule_arguments: ScheduleArguments = Field(default_factory=ScheduleArguments)
    """Further arguments of the schedule, such as num_cycles. Default: its own."""
    clip_grad_norm: float = Field(default=1.0, ge=0)
    """Largest norm of the whole gradient; 0: not clipped. Default 1."""


class TrainSettings(Section):
    """`[train]`: how long, how large, where to."""

    output_dir: Path = Field(strict=False)
    """Folder of the run: config, metrics, checkpoints, model. No default."""
    max_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps. Default: no limit; one of `max_steps` and `max_epochs` is needed, with both the run ends at what comes first."""
    max_epochs: int | None = Field(default=None, ge=1)
    """Epochs. Default: no limit."""
    seed: int | None = Field(default=None, ge=0, lt=1 << 63)
    """Of everything random. Default: one is drawn, printed and stored."""
    batch_size: int = Field(default=1, ge=1)
    """Samples of a micro-batch on one rank. Default 1."""
    accumulation: int = Field(default=1, ge=1)
    """Micro-batches of an optimizer step. Default 1."""
    workers: int = Field(default=2, ge=0)
    """Processes a rank that load samples; 0: the training process itself. Default 2."""
    precision: Literal["fp32", "bf16", "full_bf16"] = "fp32"
    """Single precision, bf16 computation over fp32 weights, or bf16 weights too. Default fp32."""
    on_nonfinite: Literal["skip", "stop"] = "skip"
    """What a gradient that is no number does: skip the step, or save the state and stop. Default skip."""


class CheckpointSettings(Section):
    """`[checkpoint]`: when the full state is saved, besides at the end."""

    every_steps: int | None = Field(default=None, ge=1)
    """Optimizer steps between saves. Default: never."""
    every_epochs: int | None = Field(default=None, ge=1)
    """Epochs between saves. Default: never."""
    every_minutes: float | None = Field(default=None, gt=0)
    """Minutes between saves. Default: never."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest states are kept. Default 2."""


class LogSettings(Section):
    """`[log]`: what is written beside the progress bar."""

    every_steps: int = Field(default=1, ge=1)
    """Steps between lines of metrics.jsonl. Default 1."""
    samples: bool = False
    """Whether a line lists the keys and captions of its step. Default no."""
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = Field(default=(), strict=False)
    """Trackers of accelerate that get the same numbers. Default: none."""
    project: str = "trainer"
    """Project name for the trackers. Default "trainer"."""


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
    checkpoint: CheckpointSettings = CheckpointSettings()
    log: LogSettings = LogSettings()

    def caption_of(self, dataset: int) -> CaptionSettings:
        """`[caption]` with what `data.<dataset>.caption` sets differently."""
        own = self.data[dataset].caption
        return self.caption.model_copy(
            update={name: getattr(own, name) for name in own.model_fields_set}
        )
