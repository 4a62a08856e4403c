"""Data sets opened for tests: configs of small runs, and metadata beside new-style latents."""

import json

from builders.latents import write_latents
from builders.runs import settings_of
from trainer.config.settings import Config
from trainer.data.datasets import open_datasets


def config_of(metadata, tmp_path, **changes):
    """The config of a small run."""
    sections = settings_of(metadata, tmp_path / "run", **changes)
    return Config.model_validate(sections | {"data": [sections["data"]]})


def open_one(metadata, tmp_path, **changes):
    """The only data set of a small run."""
    (dataset,) = open_datasets(config_of(metadata, tmp_path, **changes), jobs=1)
    return dataset


def new_style_data(folder, *sizes):
    """Metadata without sizes, and a folder with new-style latents of these sizes per record."""
    metadata, latents = folder / "data" / "m.json", folder / "data" / "latents"
    for number, each in enumerate(sizes):
        write_latents(latents / f"k{number}_0547x0466_sdxl.npz", *each)
    records = {
        f"k{number}": {"caption": "a", "capmerge": "c", "image_size": [547, 466]}
        for number in range(len(sizes))
    }
    metadata.write_text(json.dumps(records), encoding="utf-8")
    return metadata, latents
