"""What a run writes besides, and when.

These are `[validation]`, `[checkpoint]`, `[export]`, `[samples]` and `[log]`.
"""

from typing import Literal

from pydantic import Field

from trainer.config.section import MOST, Section


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
