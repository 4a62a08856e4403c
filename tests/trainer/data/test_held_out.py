import json
import shutil

import numpy as np
import pytest
from builders.runs import LATENTS, settings_of

from capmerge.index.latent_names import hash_of as hash_of_stem
from capmerge.index.latent_names import stem_of
from capmerge.rng import Chance, SampleId
from trainer.config.settings import Config
from trainer.data import held_out
from trainer.data.datasets import open_datasets
from trainer.data.epochs import identity, run_size
from trainer.data.held_out import hold_out
from trainer.errors import ConfigError, LatentsError

MASK = (1 << 64) - 1


def split_of(tmp_path, validation, *metadata, seed=7, **data):
    """The config, the opened data sets and the split of a run over sets of metadata."""
    sections = settings_of(None, tmp_path / "run", train={"seed": seed}, validation=validation)
    sets = [sections["data"] | {"metadata": str(path)} | data for path in metadata]
    config = Config.model_validate(sections | {"data": sets})
    datasets = open_datasets(config, jobs=1)
    return config, datasets, hold_out(config, datasets)


def expected_hash(key, seed=7):
    """The hash of a record as the module defines it, with Python's integers."""
    number = int.from_bytes(hash_of_stem(stem_of(key).text), "little")
    start = Chance(SampleId(seed, 0, "")).below(1 << 64, "held-out keys")
    word = (start + (number + 1) * 0x9E3779B97F4A7C15) & MASK
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & MASK
    return word ^ (word >> 31)


def keys_of(datasets, records):
    """The keys of (data set, record) pairs."""
    return [datasets[dataset].index.read(record)[0] for dataset, record in records]


def trained_keys(split):
    """The keys of all records that are trained, by data set."""
    return [
        [dataset.index.read(int(record))[0] for record in np.flatnonzero(dataset.rows.usable)]
        for dataset in split.datasets
    ]


def test_the_smallest_hashes_are_held_out_and_the_next_ones_compared(metadata, tmp_path):
    """`records = 9` holds out the 9 smallest hashes, and takes the 9 next from the training."""
    config, datasets, split = split_of(tmp_path, {"records": 9}, metadata)
    ordered = sorted(json.loads(metadata.read_text(encoding="utf-8")), key=expected_hash)
    assert keys_of(datasets, split.held_out) == ordered[:9]
    assert keys_of(datasets, split.trained) == ordered[9:18]
    assert sorted(trained_keys(split)[0]) == sorted(ordered[9:])
    assert run_size(config, split.datasets, 1).samples_per_epoch == 213 - 9
    assert datasets[0].rows.usable is None  # the data sets that were given stay as they are
    assert "9 held-out records" in split.notes[0]


def test_another_seed_holds_out_others(metadata, tmp_path):
    """The seed of the run decides which records are held out, and with what it can be resumed."""
    splits = [split_of(tmp_path, {"records": 9}, metadata, seed=seed) for seed in (7, 7, 8)]
    one, same, other = (split.held_out for _, _, split in splits)
    assert one == same != other
    names = [
        identity(config, split.datasets, run_size(config, split.datasets, 1))[
            "data.0 records left out"
        ]
        for config, _, split in splits
    ]
    assert names[0] == names[1] != names[2]


def test_a_share_depends_on_the_key_alone(metadata, tmp_path):
    """`share` holds out the hashes below it, so records that come or go change no others."""
    records = json.loads(metadata.read_text(encoding="utf-8"))
    fewer = tmp_path / "fewer.json"
    fewer.write_text(json.dumps(dict(list(records.items())[::2])), encoding="utf-8")
    held = []
    for path in (metadata, fewer):
        _, datasets, split = split_of(tmp_path, {"share": 0.2}, path)
        held.append(keys_of(datasets, split.held_out))
        keys = json.loads(path.read_text(encoding="utf-8"))
        assert set(held[-1]) == {key for key in keys if expected_hash(key) < 0.2 * 2**64}
        assert len(split.trained) == len(split.held_out) > 0
        assert not set(held[-1]) & set(trained_keys(split)[0])
    assert set(held[1]) == set(held[0]) & set(list(records)[::2])


def test_a_key_is_held_out_in_every_data_set(metadata, tmp_path):
    """A picture in two sets, also with another extension, is held out in both and counts once."""
    records = json.loads(metadata.read_text(encoding="utf-8"))
    other = tmp_path / "other.json"
    other.write_text(
        json.dumps({f"{key}.png": record for key, record in records.items()}), encoding="utf-8"
    )
    _, datasets, split = split_of(tmp_path, {"records": 20}, other, metadata, repeats=2)
    assert len(set(split.held_out)) == 20
    assert {dataset for dataset, _ in split.held_out + split.trained} == {0}
    held = {key.removesuffix(".png") for key in keys_of(datasets, split.held_out)}
    for keys in trained_keys(split):
        assert len(keys) == 213 - 20
        assert not held & {key.removesuffix(".png") for key in keys}


def test_the_order_of_windows_changes_nothing(metadata, tmp_path, monkeypatch):
    """Reading the columns a few records at a time finds the same records."""
    expected = split_of(tmp_path, {"records": 5}, metadata, metadata)[2]
    by_share = split_of(tmp_path, {"share": 0.1}, metadata, metadata)[2]
    monkeypatch.setattr(held_out, "WINDOW", 4)
    for validation, before in (({"records": 5}, expected), ({"share": 0.1}, by_share)):
        found = split_of(tmp_path, validation, metadata, metadata)[2]
        assert (found.held_out, found.trained) == (before.held_out, before.trained)
        for one, two in zip(found.datasets, before.datasets, strict=True):
            assert np.array_equal(one.rows.usable, two.rows.usable)


def test_records_that_cannot_be_trained_are_not_held_out(metadata, tmp_path):
    """A record without latents is neither held out nor compared."""
    _, datasets, before = split_of(tmp_path, {"records": 9}, metadata)
    missing = datasets[0].latents_file(before.held_out[0][1], keys_of(datasets, before.held_out)[0])
    latents = shutil.copytree(LATENTS, tmp_path / "latents")
    (latents / missing.relative_to(LATENTS)).unlink()
    data = {"latents": str(latents), "on_missing": "skip"}
    _, _, split = split_of(tmp_path, {"records": 9}, metadata, **data)
    assert split.held_out == (*before.held_out[1:], before.trained[0])


def test_fewer_are_compared_where_fewer_are_left(metadata, tmp_path):
    """With 200 of 213 held out, the 13 others are all that is trained and compared."""
    _, datasets, split = split_of(tmp_path, {"records": 200}, metadata)
    assert (len(split.held_out), len(split.trained)) == (200, 13)
    assert sorted(keys_of(datasets, split.trained)) == sorted(trained_keys(split)[0])
    assert "200 held-out records, which are never trained, and 13 of" in split.notes[0]


def test_a_set_that_is_held_out_whole_is_told(metadata, tmp_path):
    """A data set whose records are all held out trains nothing, which a warning says."""
    key, record = min(
        json.loads(metadata.read_text(encoding="utf-8")).items(),
        key=lambda pair: expected_hash(pair[0]),
    )
    single = tmp_path / "single.json"
    single.write_text(json.dumps({key: record}), encoding="utf-8")
    config, _, split = split_of(tmp_path, {"records": 1}, metadata, single)
    assert split.notes[1].startswith("WARNING: data.1: all of its records are held out")
    assert run_size(config, split.datasets, 1).samples_per_epoch == 212
    (alone,) = (dataset.rows.usable.sum() for dataset in split.datasets[1:])
    assert alone == 0


@pytest.mark.parametrize(
    ("validation", "message"),
    [
        ({"records": 213}, r"validation\.records = 213: found 213 different keys with latents"),
        ({"records": 1_000_000_000}, r"records = 1,000,000,000: found 213 different keys"),
        ({"share": 0.999999}, r"validation\.share = 0\.999999: found 213 different keys"),
        ({"share": 1e-9}, r"validation\.share = 1e-09 holds out none of 213 usable records"),
    ],
)
def test_none_or_all_is_refused(metadata, tmp_path, validation, message):
    """Holding out nothing, or everything, is an error that names the setting."""
    with pytest.raises(ConfigError, match=message):
        split_of(tmp_path, validation, metadata)


def test_data_without_latents_is_refused_as_without_validation(tmp_path):
    """Where no record is usable at all, that is what is told."""
    empty = tmp_path / "empty.json"
    empty.write_text("{}", encoding="utf-8")
    config, _, split = split_of(tmp_path, {"records": 2}, empty)
    with pytest.raises(LatentsError, match="none of the 0 records is usable"):
        run_size(config, split.datasets, 1)
