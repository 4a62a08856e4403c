import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from builders.runs import LATENTS, rewrite_examples, settings_of

from capmerge.errors import CapmergeError
from capmerge.index.build import build_index
from trainer.config.settings import Config
from trainer.data.datasets import open_datasets
from trainer.errors import LatentsError


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The rewritten example metadata."""
    return rewrite_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture
def latents(tmp_path):
    """A copy of the example latents that a test may damage."""
    return shutil.copytree(LATENTS, tmp_path / "latents")


def config_of(metadata, tmp_path, **changes):
    """The config of a small run."""
    sections = settings_of(metadata, tmp_path / "run", **changes)
    return Config.model_validate(sections | {"data": [sections["data"]]})


def open_one(metadata, tmp_path, **changes):
    """The only data set of a small run."""
    (dataset,) = open_datasets(config_of(metadata, tmp_path, **changes), jobs=1)
    return dataset


def test_every_example_is_found(metadata, tmp_path):
    """All records have latents for every family, and a pickled set finds the same files."""
    for family in ("sd1", "sd2", "sdxl"):
        dataset = open_one(metadata, tmp_path, model={"family": family, "path": "random"})
        assert (len(dataset.index), dataset.rows.usable, dataset.notes) == (213, None, ())
        again = pickle.loads(pickle.dumps(dataset))
        files = {
            dataset.latents_file(number, dataset.index.read(number)[0]) for number in range(213)
        }
        assert (
            files
            == {again.latents_file(number, again.index.read(number)[0]) for number in range(213)}
            == set(LATENTS.rglob("*.npz"))
        )


def test_captions_of_a_set(metadata, tmp_path):
    """Caption settings of a data set override those of `[caption]`."""
    sections = settings_of(metadata, tmp_path / "run", caption={"shuffle": True, "keep_tokens": 2})
    other = sections["data"] | {"caption": {"keep_tokens": 0}, "repeats": 3}
    first, second = open_datasets(
        Config.model_validate(sections | {"data": [sections["data"], other]}), jobs=1
    )
    assert [
        (found.number, found.captions.keep_tokens, found.captions.shuffle)
        for found in (first, second)
    ] == [(0, 2, True), (1, 0, True)]
    assert (first.rows.repeats, second.rows.repeats) == (1, 3)


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
    assert dataset.notes[0].endswith("Records left out: 2.")
    assert all(
        dataset.latents_file(number, dataset.index.read(number)[0]) is None
        for number in unusable.tolist()
    )
    paths[2].unlink()
    with pytest.raises(
        LatentsError, match=r'Expected at most 1% with data.on_missing = "skip", found 1.4%'
    ):
        open_datasets(config_of(metadata, tmp_path, data=data), jobs=1, relist=True)


def test_records_without_a_size(metadata, tmp_path):
    """Records without a size are counted separately, and no plan contains them."""
    records = json.loads(metadata.read_text(encoding="utf-8"))
    for key in list(records)[3:5]:
        del records[key]["train_resolution"]
        records[key].pop("image_size", None)
    changed = tmp_path / "meta.json"
    changed.write_text(json.dumps(records), encoding="utf-8")
    with pytest.raises(
        LatentsError,
        match=r'found 2 without a size \("train_resolution" or "image_size"\) among 213',
    ):
        open_one(changed, tmp_path)
    dataset = open_one(changed, tmp_path, data={"on_missing": "skip"})
    assert np.flatnonzero(~dataset.rows.usable).tolist() == [3, 4]


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


def test_links_that_lead_out(metadata, tmp_path):
    """A link that leads out of the folder is refused on reading unless that is allowed."""
    latents = tmp_path / "latents"
    shutil.copytree(
        LATENTS, latents, copy_function=lambda source, target: Path(target).symlink_to(source)
    )
    dataset = open_one(metadata, tmp_path, data={"latents": str(latents)})
    with pytest.raises(CapmergeError, match="allow_outside"):
        dataset.latents_file(0, dataset.index.read(0)[0])
    allowed = open_one(metadata, tmp_path, data={"latents": str(latents), "allow_outside": True})
    assert allowed.latents_file(0, dataset.index.read(0)[0]).is_symlink()


@pytest.mark.parametrize(("chunking", "unit"), [("kohya", "tokens"), ("a1111", "chunks")])
def test_chunks_for_the_plan(metadata, tmp_path, chunking, unit):
    """The longest alternative decides the chunk count of a record, capped by `max_tokens`."""
    dataset = open_one(
        metadata, tmp_path, text={"dynamic_chunks": True, "chunking": chunking, "max_tokens": 150}
    )
    values = dataset.index.longest_alternative(unit, "sd1").astype(int)
    expected = np.clip(values if chunking == "a1111" else np.ceil(values / 75), 1, 2)
    assert dataset.rows.chunks.tolist() == expected.tolist()
    assert set(dataset.rows.chunks.tolist()) == {1, 2}
    assert open_one(metadata, tmp_path, text={"chunking": chunking}).rows.chunks is None
    unlimited = open_one(
        metadata,
        tmp_path,
        text={"dynamic_chunks": True, "chunking": chunking, "max_tokens": "unlimited"},
    )
    assert max(unlimited.rows.chunks) > 2


def test_an_index_without_token_lengths(metadata, tmp_path):
    """An index without token lengths is rebuilt only for dynamic chunks."""
    copy = shutil.copy(metadata, tmp_path / "meta.json")
    build_index(copy, tokens=False)
    assert not open_one(copy, tmp_path).index.has_tokens
    assert open_one(copy, tmp_path, text={"dynamic_chunks": True}).rows.chunks.min() == 1


def test_scale_is_looked_at_for_real_models_alone(metadata, latents, tmp_path):
    """Latents of another family are noted, but only for a real model.

    A broken file among those checked is an error, or is skipped.
    """
    data = {"latents": str(latents), "on_missing": "stop"}
    assert (
        open_one(metadata, tmp_path, data=data, model={"family": "sd1", "path": "a/model"}).notes
        == ()
    )
    (note,) = open_one(
        metadata, tmp_path, data=data, model={"family": "sdxl", "path": "a/model"}
    ).notes
    assert note.startswith(
        f"WARNING: data.0, {latents}: scaled by 0.13025, "
        "the latents of 64 files have a standard deviation of 0.7"
    )
    for path in latents.rglob("*.npz"):
        path.write_bytes(b"")
    with pytest.raises(LatentsError, match="expected an"):
        open_one(metadata, tmp_path, data=data, model={"family": "sd1", "path": "a/model"})
    data["on_missing"] = "skip"
    assert (
        open_one(metadata, tmp_path, data=data, model={"family": "sd1", "path": "a/model"}).notes
        == ()
    )
