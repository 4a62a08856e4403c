#!/usr/bin/env python3
"""Write `examples/pictures`, `meta_cap.json` and `tiny_vae`: made-up pictures and an untrained VAE.

.venv/bin/python scripts/example_pictures.py [FOLDER]

Each picture is a sun over a hill, with colours, places and sides of its own, and a record with tags
and a caption that tell them. The formats are those that data sets mix. The VAE has the smallest
shape that makes latents of 4 channels at an eighth of the size; its weights are random.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from numpy.typing import NDArray
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
COLOURS = {
    "red": (200, 60, 50),
    "orange": (235, 150, 50),
    "yellow": (240, 215, 90),
    "green": (80, 160, 80),
    "blue": (90, 140, 220),
    "purple": (130, 80, 170),
}
SIDES = ((160, 120), (96, 144), (128, 128), (200, 110), (90, 200), (150, 150), (64, 80), (180, 130))
"""Width and height in px of each picture."""
FORMATS = (".jpg", ".png", ".webp")


def scene(
    width: int, height: int, colours: tuple[str, str, str], sun: tuple[float, float]
) -> NDArray[np.uint8]:
    """A picture of (height, width, 3): the sky, the sun at a share of both sides, and the hill."""
    sky, light, hill = (np.array(COLOURS[colour], float) for colour in colours)
    y, x = np.mgrid[0:height, 0:width] / np.array([height, width])[:, None, None]
    pixels = sky * (0.5 + 0.5 * y[..., None])
    distance = np.hypot((x - sun[0]) * width, (y - sun[1]) * height)
    pixels[distance < min(width, height) / 7] = light
    pixels[y > 0.7 + 0.15 * np.sin(6 * x + sun[0])] = hill * 0.8
    return pixels.astype(np.uint8)


def main() -> None:
    """Write everything below `examples/`, or below another folder."""
    examples = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "examples"
    rng = np.random.default_rng(7)
    records = {}
    for number, (width, height) in enumerate(SIDES):
        folder = "hills" if number % 2 else "suns"
        key, ending = f"{folder}/{number:02}", FORMATS[number % len(FORMATS)]
        sky, light, hill = colours = tuple(rng.permutation(list(COLOURS))[:3].tolist())
        sun = (rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.5))
        side = "left" if sun[0] < 0.5 else "right"
        path = examples / "pictures" / f"{key}{ending}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scene(width, height, colours, sun)).save(path, quality=80)
        records[key] = {
            "caption": f"The {light} sun is on the {side} of the {sky} sky, over the {hill} hill.",
            "tags": f"scenery, no_humans, sun, hill, {sky}_sky, {light}_sun, {hill}_hill",
        }
    text = json.dumps(records, indent=2) + "\n"
    (examples / "meta_cap.json").write_text(text, encoding="utf-8")

    torch.manual_seed(1)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
    )
    vae.half().save_pretrained(examples / "tiny_vae")
    for path in (examples / "tiny_vae").iterdir():
        path.chmod(0o644)


if __name__ == "__main__":
    main()
