"""`[cache]`: how latents are made of pictures."""

from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from trainer.config.section import Section, checked_path


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
