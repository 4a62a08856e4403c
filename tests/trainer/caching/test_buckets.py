import json

import pytest
from builders.paths import ROOT

from trainer.caching.buckets import Buckets, Placed, buckets_of, crop_of
from trainer.config.settings import CacheSettings
from trainer.families import FAMILIES

GOLDEN = json.loads((ROOT / "tests" / "data" / "buckets_and_crops.json").read_text())


def _buckets(rule):
    names = ("resolution", "step", "least", "most", "upscale")
    return Buckets(**{name: rule[name] for name in names})


@pytest.mark.parametrize(
    "rule", GOLDEN, ids=lambda rule: f"{rule['resolution']}-{rule['step']}-{rule['upscale']}"
)
def test_buckets_and_crops_are_those_of_sd_scripts(rule):
    """Bucket, resized size and crop of each picture are what sd-scripts' own code gave."""
    buckets = _buckets(rule)
    if rule["upscale"]:
        assert [list(sides) for sides in buckets.sides] == rule["sides"]
    for width, height, *expected in rule["cases"]:
        if not expected:  # sd-scripts divides by zero there, or has a bucket without pixels
            with pytest.raises(ValueError, match=f"{width} x {height} px, expected at least"):
                buckets.place(width, height)
            continue
        bucket, resized = tuple(expected[:2]), tuple(expected[2:4])
        assert buckets.place(width, height) == Placed(bucket, resized)
        assert list(crop_of(bucket, width, height)) == expected[4:]


def test_what_is_not_set_follows_from_the_family():
    """SDXL has buckets of 1024 px, from 512 to 2048; limits become multiples of the step."""
    buckets = buckets_of(CacheSettings(), FAMILIES["sdxl"])
    assert (buckets.resolution, buckets.step) == (1024, 64)
    assert (buckets.least, buckets.most) == (512, 2048)
    set_all = CacheSettings(resolution=640, bucket_steps=32, bucket_min=300, bucket_max=1000)
    buckets = buckets_of(set_all, FAMILIES["sdxl"])
    assert (buckets.resolution, buckets.step, buckets.least, buckets.most) == (640, 32, 288, 1024)


def test_limits_below_a_step_are_a_step():
    """Buckets as small as a step are found, where sd-scripts divides by zero."""
    buckets = Buckets(resolution=64, step=64, least=32, most=128, upscale=True)
    assert buckets.sides == [(64, 64)]
    assert buckets.place(9, 5) == Placed((64, 64), (115, 64))
