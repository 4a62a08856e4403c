"""Generated pictures, a tiny VAE, and runs of `trainer.cache` on them, for tests."""

import json
from io import BytesIO, TextIOWrapper

import numpy as np
from PIL import Image

from builders import preloaded
from builders.runs import ENVIRONMENT
from builders.single_files import tiny_vae
from capmerge.toml import to_toml

CACHE = ("-c", "from trainer.cache import main; main()")
"""The arguments of Python that run `trainer.cache` as a rank."""
ENDINGS = ("png", "jpg", "webp")


def make_picture(number, channels=3):
    """A soft picture of 40 to 199 px on each side, the same for a number each time."""
    rng = np.random.default_rng(number)
    width, height = (int(side) for side in rng.integers(40, 200, 2))
    colours = rng.integers(0, 256, (5, 5, channels), dtype=np.uint8)
    return Image.fromarray(colours).resize((width, height))


def write_pictures(folder, n_pictures=8):
    """Write pictures below `folder`, some of them in a folder of their own; the records by keys."""
    (folder / "sub").mkdir(parents=True)
    records = {}
    for number in range(n_pictures):
        key = f"sub/p{number}" if number % 3 == 0 else f"p{number}"
        make_picture(number).save(folder / f"{key}.{ENDINGS[number % 3]}")
        records[key] = {"caption": f"a picture, number {number}", "tags": "tag, other_tag"}
    return records


def write_vae(folder):
    """Write a tiny VAE into a folder `vae`; its path."""
    tiny_vae().save_pretrained(folder / "vae")
    return folder / "vae"


def write_cache_config(path, **settings):
    """Write a config of `[model]` and `[cache]`, with small buckets; its path."""
    cache = {"images": "pictures", "vae": "vae", "resolution": 128, "bucket_steps": 32} | settings
    lines = ["[model]", 'family = "sd1"', 'path = "random"', "[cache]"]
    lines += [f"{name} = {to_toml(value)}" for name, value in cache.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def run_cache(config, *arguments):
    """Run `python -m trainer.cache` in the folder of a config; the result with texts."""
    done = preloaded.run(
        "trainer.cache", config.name, *arguments, cwd=config.parent, env=ENVIRONMENT
    )
    done.stdout, done.stderr = (
        TextIOWrapper(BytesIO(data), encoding="utf-8").read() for data in (done.stdout, done.stderr)
    )
    return done


def cached(folder, **settings):
    """A folder with a VAE and a config of these settings, cached; the folder.

    It must hold `pictures` already.
    """
    if not (folder / "vae").exists():
        write_vae(folder)
    done = run_cache(write_cache_config(folder / "cache.toml", **settings))
    assert done.returncode == 0, done.stderr
    return folder


def latents_in(folder):
    """The bytes of all latents files below a folder, by their paths there."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*.npz")
    }


def skipped_in(folder):
    """The reasons in the list of pictures without latents, by key."""
    lines = (folder / "cache_skipped.jsonl").read_text(encoding="utf-8").splitlines()
    return {one["key"]: one["reason"] for one in map(json.loads, lines)}
