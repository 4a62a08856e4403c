"""Packed latents in the trainer: the same samples as loose files, and clear errors when damaged."""

import json
import os
import pickle
import shutil
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
from builders.latents import write_latents
from builders.metadata import run as capmerge
from builders.runs import LATENTS, rewrite_examples, settings_of

from capmerge.errors import StaleError
from capmerge.files import positioned
from trainer.config.settings import Config, family_of
from trainer.data.datasets import latents_fingerprint, open_datasets
from trainer.data.latents import load_latents
from trainer.errors import LatentsError


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """The rewritten example metadata as `meta.json`, and the example latents as `shards`."""
    folder = tmp_path_factory.mktemp("packed")
    metadata = rewrite_examples(folder)
    capmerge(
        *("pack-latents", metadata, "--latents", LATENTS),
        *("-o", folder / "shards", "--shard-mb", "1"),
    )
    return folder


@pytest.fixture
def copied(packed, tmp_path):
    """A copy of the packed folder that a test may damage."""
    return shutil.copytree(packed, tmp_path / "copied")


def opened(folder, latents, tmp_path, *, relist=False, **changes):
    """The only data set of a small run over the metadata of a folder."""
    data = {"latents": str(latents), **changes.pop("data", {})}
    sections = settings_of(folder / "meta.json", tmp_path / "run", data=data, **changes)
    config = Config.model_validate(sections | {"data": [sections["data"]]})
    (dataset,) = open_datasets(config, jobs=1, relist=relist)
    return dataset, family_of(config.model)


def sample_of(dataset, family, record, *, flipped=False):
    """The latents of a record as a run reads them."""
    path = dataset.latents_file(record, dataset.index.read(record)[0])
    sides = {name: int(getattr(dataset.rows, name)[record]) for name in ("width", "height")}
    return load_latents(path, family=family, **sides, flipped=flipped, alpha_mask=False)


def assert_equal_samples(loose, packed, **options):
    """Fail unless every record gives the same latents and size conditioning, bit by bit."""
    assert len(loose[0].index) == len(packed[0].index)
    for record in range(len(loose[0].index)):
        one, other = (sample_of(*which, record, **options) for which in (loose, packed))
        assert one.size_conditioning == other.size_conditioning
        assert one.latents_CHW.numpy().tobytes() == other.latents_CHW.numpy().tobytes()


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_every_sample_is_that_of_the_loose_files(packed, tmp_path, family):
    """Buckets, latents, flipped latents and size conditioning are equal, bit by bit."""
    model = {"family": family, "path": "random"}
    loose = opened(packed, LATENTS, tmp_path, model=model)
    shards = opened(packed, packed / "shards", tmp_path, model=model)
    for name in ("width", "height"):
        one, other = (getattr(which[0].rows, name) for which in (loose, shards))
        np.testing.assert_array_equal(one, other)
    assert_equal_samples(loose, shards)
    assert_equal_samples(loose, shards, flipped=True)
    assert latents_fingerprint(loose[0]) == latents_fingerprint(shards[0])


def test_several_files_and_resolutions_of_one_picture(tmp_path):
    """The choice between sizes and between names is the one that loose files lead to."""
    records = {
        "old": {"train_resolution": [128, 64]},
        "sized": {},
        "many": {},
        "both": {"train_resolution": [64, 128]},
    }
    for record in records.values():
        record["caption"] = "a"
    (tmp_path / "source.json").write_text(json.dumps(records))
    capmerge("rewrite", tmp_path / "source.json", "-o", tmp_path / "meta.json")
    latents = tmp_path / "latents"
    write_latents(latents / "old.npz", (128, 64), suffixed=False)
    for age, (name, size) in enumerate(
        [("0300x0200", (192, 128)), ("0600x0400", (64, 64)), ("0900x0600", (128, 128))]
    ):
        path = write_latents(latents / f"sized_{name}_sdxl.npz", size, seed=age)
        os.utime(path, (100 - age, 100 - age))
    write_latents(latents / "many_0300x0200_sdxl.npz", (192, 128), (96, 64), (384, 256))
    write_latents(latents / "both.npz", (64, 128), suffixed=False)
    write_latents(latents / "both_0100x0200_sdxl.npz", (128, 256))
    write_latents(latents / "both_0100x0200_sd.npz", (256, 512))
    capmerge(
        "pack-latents", tmp_path / "meta.json", "--latents", latents, "-o", tmp_path / "shards"
    )
    for family in ("sd1", "sdxl"):
        for resolution in (None, 128, 320):
            changes = {
                "model": {"family": family, "path": "random"},
                "data": {"resolution": resolution},
            }
            loose, shards = (
                opened(tmp_path, folder, tmp_path, **changes)
                for folder in (latents, tmp_path / "shards")
            )
            np.testing.assert_array_equal(loose[0].rows.width, shards[0].rows.width)
            np.testing.assert_array_equal(loose[0].rows.height, shards[0].rows.height)
            for record in range(4):
                key = loose[0].index.read(record)[0]
                paths = [which[0].latents_file(record, key) for which in (loose, shards)]
                assert paths[0].name == paths[1].name
            assert_equal_samples(loose, shards)


def _read_in_process(dataset, family, record):
    return sample_of(dataset, family, record).latents_CHW.sum().item()


@pytest.mark.parametrize("method", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_several_processes_read_at_once(packed, tmp_path, method):
    """Forked and new processes read the same values, from descriptors without a position."""
    dataset, family = opened(packed, packed / "shards", tmp_path)
    sums = [_read_in_process(dataset, family, record) for record in range(20)]
    with get_context(method).Pool(2) as pool:
        assert sums == pool.starmap(
            _read_in_process, [(dataset, family, record) for record in range(20)]
        )


def test_threads_and_more_shards_than_stay_open(packed, tmp_path, monkeypatch):
    """A shard that is closed for another one does not disturb those who still read it."""
    monkeypatch.setattr(positioned, "_MOST_OPEN", 1)
    dataset, family = opened(packed, packed / "shards", tmp_path)
    sums = [_read_in_process(dataset, family, record) for record in range(213)]
    order = [number * 101 % 213 for number in range(213)]
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda record: _read_in_process(dataset, family, record), order))
    assert found == [sums[record] for record in order]
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) <= before + 1


def test_a_pickled_listing_keeps_its_shards(packed, tmp_path):
    """A data set that is sent to a worker reads the same members."""
    dataset, family = opened(packed, packed / "shards", tmp_path)
    again = pickle.loads(pickle.dumps(dataset))
    for record in (0, 100, 212):
        one, other = (sample_of(which, family, record) for which in (dataset, again))
        assert (one.latents_CHW == other.latents_CHW).all()


@pytest.mark.parametrize("damage", ["cut", "missing", "longer", "index", "names", "other names"])
def test_damage_that_shows_at_the_start(copied, tmp_path, damage):
    """A folder that was copied in part is refused before training, with the file and a next step.

    Whether it was listed before makes no difference.
    """
    shards = copied / "shards"
    opened(copied, shards, tmp_path)
    name = {
        "index": "latents.index", "names": "latents.names", "other names": "latents.names",
    }.get(damage, "latents-00001.tar")  # fmt: skip
    path = shards / name
    data = path.read_bytes()
    if damage in ("missing", "index", "names"):
        path.unlink()
    elif damage == "cut":
        path.write_bytes(data[:-512])
    elif damage == "longer":
        path.write_bytes(data + bytes(512))
    else:
        path.write_bytes(data[:-70] + b"x" + data[-69:])
    with pytest.raises(StaleError, match=rf"{name}: .*(pack-latents|Copy the folder)"):
        opened(copied, shards, tmp_path)


def test_damage_that_shows_at_reading(copied, tmp_path):
    """A flipped bit, another member in the place and a cut shard name member, shard and step."""
    shards = copied / "shards"
    dataset, family = opened(copied, shards, tmp_path)
    names = [*dataset.listing.shards.names()]
    place = dataset.listing.shards.place(0)
    path = shards / "latents-00000.tar"
    whole = path.read_bytes()

    def problem():
        with pytest.raises(LatentsError) as caught:
            sample_of(dataset, family, 0)
        assert f"latents-00000.tar, member {names[0]}: " in str(caught.value)
        assert "pack-latents" in str(caught.value)
        return str(caught.value)

    for at in (place.start + 1000, place.start + 3000):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 255]) + whole[at + 1 :])
        assert problem()
    path.write_bytes(whole[: place.start - 512] + b"other" + whole[place.start - 507 :])
    assert "found 'other" in problem()
    path.write_bytes(whole[: place.start + 1000])
    assert "the shard ends at byte" in problem()


def test_a_new_packing_is_listed_anew(copied, tmp_path):
    """The listing belongs to the shards that it was made of, not to the name of their folder."""
    shards = copied / "shards"
    dataset, family = opened(copied, shards, tmp_path)
    before = sample_of(dataset, family, 212).latents_CHW
    shutil.rmtree(shards)
    capmerge(
        *("pack-latents", copied / "meta.json", "--latents", LATENTS, "-o", shards),
        *("--dtype", "fp16"),
    )
    dataset, family = opened(copied, shards, tmp_path)
    after = sample_of(dataset, family, 212).latents_CHW
    # The example latents have few bits, so that float16 holds most of them.
    np.testing.assert_allclose(before, after, rtol=1e-3)
    assert len(dataset.listing.shards) == 213


def test_records_that_were_not_packed_are_missing(copied, tmp_path):
    """Latents that were left out are missing for the trainer, as loose files would be."""
    loose = shutil.copytree(LATENTS, tmp_path / "loose")
    (loose / "danbooru" / "1044018.npz").write_bytes(b"junk")
    shutil.rmtree(copied / "shards")
    capmerge("pack-latents", copied / "meta.json", "--latents", loose, "-o", copied / "shards")
    with pytest.raises(LatentsError, match=r"found 1 without latents .*danbooru/1044018"):
        opened(copied, copied / "shards", tmp_path)
    dataset, _ = opened(copied, copied / "shards", tmp_path, data={"on_missing": "skip"})
    assert np.count_nonzero(~dataset.rows.usable) == 1


def test_capmerge_lists_and_checks_shards(packed, tmp_path):
    """`index`, `check-latents` and `rewrite --latents` take a folder of shards like any other."""
    done = capmerge(
        *("index", packed / "meta.json", "--latents", packed / "shards", "--check"),
        *("--out", tmp_path / "other.index"),
    )
    assert b"213 of 213 records have a file" in done.out
    assert b"checked: 213 files, 0 of them broken" in done.out
    done = capmerge("check-latents", packed / "meta.json", "--latents", packed / "shards")
    assert b"files                           213" in done.out
    done = capmerge(
        *("check-latents", packed / "meta.json", "--latents", packed / "shards"),
        *("--quarantine", tmp_path / "away"),
        fails=2,
    )
    assert "members cannot be moved" in done.err
    loose, shards = (
        capmerge(
            *("rewrite", LATENTS.parent / "meta_lat.json", "-o", tmp_path / f"{name}.json"),
            *("--latents", folder),
        ).out.decode()
        for name, folder in (("loose", LATENTS), ("shards", packed / "shards"))
    )
    (one,), (other,) = (
        [line for line in out.splitlines() if "legacy" in line and "new-style" in line]
        for out in (loose, shards)
    )
    assert one == other
