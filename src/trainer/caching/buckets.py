"""The bucket of a picture, and what of the picture is seen there, by sd-scripts' rule.

All functions are pure, and agree with sd-scripts in every size. Source: sd-scripts-facts D6
(`make_bucket_resolutions`, `BucketManager`).
"""

import math
from functools import cached_property
from typing import NamedTuple

from trainer.config.settings import CacheSettings
from trainer.families import Family

SidesWH = tuple[int, int]
"""Width and height in px."""
CropLTRB = tuple[float, float, float, float]
"""Left, top, right and bottom in px."""


class Placed(NamedTuple):
    """What becomes of a picture of some size."""

    bucket: SidesWH
    resized: SidesWH
    """The size of the whole picture when it is resized to cover the bucket, before it is cropped.
    """


class Buckets:
    """The buckets of pictures, with a rule in px: `area` and sides of the buckets.

    `upscale` takes the bucket of a fixed list that has the nearest aspect ratio, and makes pictures
    larger or smaller; without it pictures are only made smaller, and each has the largest bucket
    that it covers.
    """

    def __init__(self, *, resolution: int, step: int, least: int, most: int, upscale: bool) -> None:
        self.resolution, self.step, self.upscale = resolution, step, upscale
        # As sd-scripts adjusts both for its training, but for sides of 0, by which it divides.
        self.least, self.most = max(step, least - least % step), most + -most % step

    @cached_property
    def sides(self) -> list[SidesWH]:
        """The fixed list of buckets, in ascending order."""
        area = self.resolution**2
        square = self.resolution // self.step * self.step
        found = {(square, square)}
        for width in range(self.least, self.most + 1, self.step):
            height = min(self.most, area // width // self.step * self.step)
            if height >= self.least:
                found |= {(width, height), (height, width)}
        return sorted(found)

    @cached_property
    def _by_ratio(self) -> tuple[frozenset[SidesWH], list[float]]:
        return frozenset(self.sides), [width / height for width, height in self.sides]

    def place(self, width: int, height: int) -> Placed:
        """The bucket of a picture of this size in px, and its size when it is resized.

        Raises `ValueError` for a picture that is too small or too narrow for any bucket.
        """
        return self._listed(width, height) if self.upscale else self._own(width, height)

    def _listed(self, width: int, height: int) -> Placed:
        listed, ratios = self._by_ratio
        ratio, bucket = width / height, (width, height)
        if bucket not in listed:
            nearest = min(range(len(ratios)), key=lambda number: abs(ratios[number] - ratio))
            bucket = self.sides[nearest]
        is_wider = ratio > bucket[0] / bucket[1]
        scale = bucket[1] / height if is_wider else bucket[0] / width
        return Placed(bucket, (int(width * scale + 0.5), int(height * scale + 0.5)))

    def _own(self, width: int, height: int) -> Placed:
        resized, area = (width, height), self.resolution**2
        if width * height > area:
            ratio = width / height
            exact_width = math.sqrt(area * ratio)
            # One side becomes a multiple of the step: the one that keeps the ratio better.
            by_width = self._rounded(exact_width)
            by_height = self._rounded(area / exact_width)
            height_there = self._rounded(by_width / ratio)
            width_there = self._rounded(by_height * ratio)
            if not (height_there and by_height):
                raise ValueError(self._too_narrow(width, height))
            errors = abs(by_width / height_there - ratio), abs(width_there / by_height - ratio)
            resized = (
                (by_width, int(by_width / ratio + 0.5))
                if errors[0] < errors[1]
                else (int(by_height * ratio + 0.5), by_height)
            )
        bucket = resized[0] - resized[0] % self.step, resized[1] - resized[1] % self.step
        if not all(bucket):
            raise ValueError(self._too_narrow(width, height))
        return Placed(bucket, resized)

    def _rounded(self, side: float) -> int:
        whole = int(side + 0.5)
        return whole - whole % self.step

    def _too_narrow(self, width: int, height: int) -> str:
        return (
            f"{width} x {height} px, expected at least {self.step} px on each side of the resized "
            "picture (cache.bucket_steps)"
        )


def buckets_of(settings: CacheSettings, family: Family) -> Buckets:
    """The buckets that `[cache]` asks for; what is not set follows from the family."""
    resolution = settings.resolution or family.side_px
    return Buckets(
        resolution=resolution,
        step=settings.bucket_steps,
        least=resolution // 2 if settings.bucket_min is None else settings.bucket_min,
        most=resolution * 2 if settings.bucket_max is None else settings.bucket_max,
        upscale=settings.upscale,
    )


def crop_of(bucket: SidesWH, width: int, height: int) -> CropLTRB:
    """The `crop_ltrb` of a picture of this size: its edges in px of the bucket, as SDXL is told.

    It is the place of the whole picture when it is resized to lie inside the bucket, which is what
    sd-scripts stores, though it trains on one that covers the bucket.

    >>> crop_of((64, 64), 200, 100)
    (0, 16.0, 64, 48.0)
    """
    ratio = width / height
    inner: tuple[float, float] = (bucket[0], bucket[0] / ratio)
    if bucket[0] / bucket[1] > ratio:
        inner = bucket[1] * ratio, bucket[1]
    left, top = (bucket[0] - inner[0]) // 2, (bucket[1] - inner[1]) // 2
    return left, top, left + inner[0], top + inner[1]
