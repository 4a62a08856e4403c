"""A data set tells which of its records cannot be trained, and why."""

import json
from pathlib import Path

import numpy as np
import pytest
from builders.data_sets import config_of, new_style_data, open_one
from builders.runs import LATENTS

from trainer.data.datasets import open_datasets
from trainer.errors import LatentsError


def test_missing_latents_stop(metadata, latents, tmp_path):
    """A single error says how many records lack latents and names the first of them."""
    for path in sorted(latents.rglob("danbooru/10*.npz")):
        path.unlink()
    gone = sorted(
        key
        for key in json.loads(metadata.read_text(encoding="utf-8"))
        if key.startswith("danbooru/10")
    )
    with pytest.raises(LatentsError) as error:
        open_one(metadata, tmp_path, data={"latents": str(latents)})
    message = str(error.value)
    assert (
        f"data.0, {metadata}: found {len(gone)} without latents ({latents}/<key>.npz, " in message
    )
    assert "among 213 records; the first: " in message
    assert all(f'"{key}"' in message for key in gone[:5])
    assert 'data.on_missing = "skip"' in message


def test_missing_latents_are_left_out(metadata, latents, tmp_path):
    """With "skip", up to 1 % of the records are left out and counted; more is an error."""
    paths = sorted(latents.rglob("photos/**/*.npz"))
    data = {"latents": str(latents), "on_missing": "skip"}
    for path in paths[:2]:
        path.unlink()
    dataset = open_one(metadata, tmp_path, data=data)
    (unusable,) = np.nonzero(~dataset.rows.usable)
    names = [path.relative_to(latents).as_posix() for path in paths[:2]]
    unusable_keys = [dataset.index.read(number)[0] for number in unusable.tolist()]
    assert len(unusable_keys) == 2
    assert all(any(name.startswith(key) for name in names) for key in unusable_keys)
    assert dataset.notes[-1].endswith("Records left out: 2.")
    assert all(
        dataset.latents_file(number, dataset.index.read(number)[0]) is None
        for number in unusable.tolist()
    )
    paths[2].unlink()
    with pytest.raises(
        LatentsError, match=r'Expected at most 1% with data.on_missing = "skip", found 1.4%'
    ):
        open_datasets(config_of(metadata, tmp_path, data=data), jobs=1, relist=True)


def test_broken_latents_are_found_when_they_are_listed(metadata, latents, tmp_path):
    """A new-style file without latents is told at the start, with its name and what it holds."""
    path = min(latents.rglob("*x*_sdxl.npz"))
    path.write_bytes(b"broken")
    data = {"latents": str(latents)}
    with pytest.raises(LatentsError) as error:
        open_one(metadata, tmp_path, data=data)
    assert f"found 1 with a broken latents file ({path}: not a zip of arrays)" in str(error.value)
    dataset = open_one(metadata, tmp_path, data=data | {"on_missing": "skip"})
    (left_out,) = np.flatnonzero(~dataset.rows.usable)
    assert path.name.startswith(Path(dataset.index.read(int(left_out))[0]).stem)


def test_the_resolution_that_is_wanted(tmp_path):
    """`data.resolution` names one of several; no latents of it at all are an error."""
    metadata, latents = new_style_data(tmp_path, [(64, 64), (128, 64)], [(64, 64)])
    data = {"latents": str(latents)}
    largest = open_one(metadata, tmp_path, data=data)
    assert largest.rows.width.tolist() == [128, 64]
    assert "1 records have latents of several sizes, and the largest are trained" in " ".join(
        largest.notes
    )
    small = open_one(metadata, tmp_path, data=data | {"resolution": 64})
    assert (small.rows.width.tolist(), small.notes) == ([64, 64], ())
    mixed = open_one(metadata, tmp_path, data=data | {"resolution": 96})
    assert mixed.rows.width.tolist() == [128, 64]
    assert "1 of 2 records have no latents of data.resolution = 96" in mixed.notes[0]
    with pytest.raises(LatentsError, match=r"found no latents of data\.resolution = 1024"):
        open_one(metadata, tmp_path, data=data | {"resolution": 1024})


def test_names_of_another_family(metadata, tmp_path):
    """SDXL does not use `_sd` latents."""
    latents = tmp_path / "latents"
    for path in LATENTS.rglob("*.npz"):
        target = (
            latents / path.relative_to(LATENTS).parent / path.name.replace("_sdxl.npz", "_sd.npz")
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(path)
    data = {"latents": str(latents), "allow_outside": True}
    assert open_one(metadata, tmp_path, data=data).rows.usable is None
    with pytest.raises(LatentsError, match="found 22 without latents"):
        open_one(metadata, tmp_path, data=data, model={"family": "sdxl", "path": "random"})


def test_keys_that_lead_out(metadata, tmp_path):
    """A key that leads out of the folder has no latents unless that is allowed."""
    records = json.loads(metadata.read_text(encoding="utf-8"))
    records = {
        f"../latents/{key}" if key.startswith("photos") else key: record
        for key, record in records.items()
    }
    changed = tmp_path / "meta.json"
    changed.write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(
        LatentsError,
        match=r"21 keys lead out of that folder: data.allow_outside = true allows this\.",
    ):
        open_one(changed, tmp_path)
    assert open_one(changed, tmp_path, data={"allow_outside": True}).rows.usable is None
