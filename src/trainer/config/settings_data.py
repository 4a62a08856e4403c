"""`[[data]]`, `[caption]` and `[text]`: what a run reads, and how captions reach the U-Net."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from capmerge.tokens.chunks import CHUNK_TOKENS, Chunking
from trainer.config.section import MOST, Section, checked_path


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
    """A file that `capmerge rewrite` wrote, or a local folder of such files of JSON lines."""
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
