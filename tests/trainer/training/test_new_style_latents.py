"""A training run over metadata and latents of sd-scripts v0.10 and later, from end to end."""

import json
import re
import shutil

import pytest
from builders.latents import write_latents
from builders.metadata import run as capmerge
from builders.runs import metrics_of, settings_of, train_here, write_config

from trainer.errors import LatentsError

PICTURES = {"a": (1300, 1000), "b": (547, 466), "c": (1000, 1300), "d": (466, 547)}
"""The size of each picture. The wide ones are cached as 128 x 96 px, the others as 96 x 128."""


def bucket_of(name):
    """The larger bucket of a picture."""
    width, height = PICTURES[name]
    return (128, 96) if width > height else (96, 128)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Metadata of a tagger, rewritten, beside new-style latents of two resolutions."""
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for name, size in PICTURES.items():
        wide, high = size
        write_latents(
            folder / "latents" / f"{name}_{wide:04d}x{high:04d}_sdxl.npz",
            bucket_of(name),
            (64, 64),
            flipped=True,
        )
        record = {"image_path": f"{name}.png", "caption": f"tag {name}, other"}
        lines.append(
            record
            | {
                "a": {"image_size": size},
                "b": {"width": wide, "height": high},
                "c": {"image_size": size, "train_resolution": [512, 512]},
                "d": {},
            }[name]
        )
    source = folder / "tagger.jsonl"
    source.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    capmerge("rewrite", source, "-o", folder / "meta.jsonl", "--no-image-size")
    return folder


def config_of(data, folder, **settings):
    """The config of a run over the data, with batches of two."""
    sections = settings_of(
        data / "meta.jsonl",
        folder / "run",
        model={"family": "sdxl", "path": "random"},
        data={"latents": str(data / "latents"), "flip": True, **settings},
        train={"max_steps": 4},
    )
    return write_config(folder / "config.toml", sections)


def test_the_cached_files_decide_the_buckets(data, tmp_path, capsys):
    """Pictures of other sizes than their buckets train in batches, and the choice is told."""
    assert train_here(config_of(data, tmp_path)) == 0
    told = capsys.readouterr().err
    assert "4 latents files were opened to see their sizes" in told
    assert "4 records have latents of several sizes, and the largest are trained" in told
    assert "the latents of 1 records have another size than their train_resolution" in told
    for line in metrics_of(tmp_path / "run"):
        names = [key.removesuffix(".png") for key in line["keys"]]
        assert len({bucket_of(name) for name in names}) == 1
        assert len(names) == 2


def test_the_wanted_resolution_puts_all_pictures_into_one_bucket(data, tmp_path):
    """With `data.resolution = 64` the small latents are trained."""
    assert train_here(config_of(data, tmp_path, resolution=64)) == 0
    keys = [line["keys"] for line in metrics_of(tmp_path / "run")]
    assert {frozenset(pair) for pair in keys} - {
        frozenset({"a.png", "b.png"}),
        frozenset({"c.png", "d.png"}),
    }


def test_a_legacy_file_that_differs_stops_the_run(data, tmp_path):
    """It is not opened when the folder is listed, and the message says what else can be done."""
    copy = shutil.copytree(data, tmp_path / "data")
    for path in (copy / "latents").glob("c_*"):
        path.unlink()
    write_latents(copy / "latents" / "c.npz", (64, 96), suffixed=False, flipped=True)
    with pytest.raises(LatentsError) as error:
        train_here(config_of(copy, tmp_path))
    assert re.search(
        r'c\.npz: "latents(_flipped)?" has the shape \(4, 12, 8\), expected \(4, 64, 64\) for the '
        r'bucket 512x512\..*data\.on_missing = "skip".*--check',
        str(error.value),
    )
