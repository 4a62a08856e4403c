import json
import pickle
from dataclasses import fields

import numpy as np
import pytest
import torch
from builders.runs import LATENTS, settings_of

from capmerge.captions.draw import draw_line
from capmerge.errors import StaleError
from capmerge.rng import Chance, SampleId
from trainer.config.settings import Config
from trainer.data.batch import SampleRequest
from trainer.data.datasets import open_datasets
from trainer.data.noise import draw_noise, draw_timestep
from trainer.data.samples import SampleMaker, build_chunker
from trainer.errors import LatentsError


def maker_of(metadata, tmp_path, sets=1, **changes):
    """The sample maker of a small run over `sets` equal data sets, and the data sets."""
    sections = settings_of(metadata, tmp_path / "run", **changes)
    config = Config.model_validate(sections | {"data": [sections["data"]] * sets})
    datasets = open_datasets(config, jobs=1)
    return SampleMaker(config, datasets, max_steps=100), datasets


def make(maker, *numbers):
    """The sample of a data set, record, repeat, epoch and step."""
    return maker.make(SampleRequest(*numbers))


def assert_same(one, two):
    """Two samples are equal in every field, bit for bit."""
    for field in fields(one):
        value, other = getattr(one, field.name), getattr(two, field.name)
        assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other, (
            field.name
        )


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_one_sample(metadata, tmp_path, family):
    """Each part of a sample is the result of its own module for the record and its identity."""
    maker, (dataset,) = maker_of(
        metadata,
        tmp_path,
        model={"family": family, "path": "random"},
        noise={"offset": 0.1, "max_timestep": 500},
    )
    config = maker._config
    for number in (0, 7, 100, 212):
        key, record = dataset.index.read(number)
        sample_id = SampleId(7, 3, key, 0, 1)
        chance = Chance(sample_id)
        sample = make(maker, 0, number, 1, 3, 40)
        assert (sample.dataset, sample.record, sample.repeat, sample.key) == (0, number, 1, key)
        assert sample.caption == draw_line(record["caption"], sample_id).text
        assert sample.cut == build_chunker(config).cut(sample.caption)
        width, height = record["train_resolution"]
        assert sample.latents_CHW.shape == sample.noise_CHW.shape == (4, height // 8, width // 8)
        assert torch.equal(
            sample.noise_CHW, draw_noise(sample.latents_CHW, chance, config.noise)[0]
        )
        assert sample.timestep == draw_timestep(chance, config.noise, width * height) < 500
        assert (sample.size_conditioning is None) == (family != "sdxl")
        assert (sample.input_noise_CHW, sample.mask_HW, sample.events) == (None, None, ())


def test_a_pure_function(metadata, tmp_path):
    """A sample made again by a pickled maker is equal, bit for bit.

    Another epoch, repeat or data set gives another sample.
    """
    maker, _ = maker_of(
        metadata,
        tmp_path,
        sets=2,
        data={"flip": True},
        caption={"shuffle": True},
        noise={"input_perturbation": 0.1},
    )
    first = make(maker, 0, 5, 0, 0, 0)
    others = [make(maker, *place) for place in ((0, 5, 1, 0, 0), (0, 5, 0, 1, 0), (1, 5, 0, 0, 0))]
    again = make(pickle.loads(pickle.dumps(maker)), 0, 5, 0, 0, 99)
    assert_same(first, again)
    for other in others:
        assert not torch.equal(first.noise_CHW, other.noise_CHW)
        assert first.text_noise_seed != other.text_noise_seed
    assert len({sample.timestep for sample in (first, *others)}) > 1


def test_a_set_has_captions_of_its_own(metadata, tmp_path):
    """The second data set draws by its own number and settings."""
    sections = settings_of(metadata, tmp_path / "run")
    sets = [sections["data"], sections["data"] | {"caption": {"dropout_every_epochs": 2}}]
    config = Config.model_validate(sections | {"data": sets})
    datasets = open_datasets(config, jobs=1)
    maker = SampleMaker(config, datasets, max_steps=100)
    records = [datasets[0].index.read(number) for number in range(20)]
    for dataset in (0, 1):
        expected = [
            draw_line(record["caption"], SampleId(7, 0, key, dataset)).text
            for key, record in records
        ]
        assert [make(maker, dataset, number, 0, 0, 0).caption for number in range(20)] == expected
    assert make(maker, 0, 0, 0, 1, 0).caption
    assert not make(maker, 1, 0, 0, 1, 0).caption


def test_half_are_flipped(metadata, tmp_path):
    """With `data.flip`, about half of the samples take the flipped latents and report it."""
    maker, (dataset,) = maker_of(metadata, tmp_path, data={"flip": True})
    plain, _ = maker_of(metadata, tmp_path)
    flipped = 0
    for number in range(200):
        sample = make(maker, 0, number, 0, 0, 0)
        straight = make(plain, 0, number, 0, 0, 0).latents_CHW
        assert torch.equal(
            sample.latents_CHW, straight.flip(2) if "flipped" in sample.events else straight
        )
        flipped += "flipped" in sample.events
    assert 75 < flipped < 125
    assert len(dataset.index) == 213


def test_masks(metadata, tmp_path):
    """A sample has a mask when `data.alpha_mask` asks for one.

    A file without a mask is then an error that names the setting.
    """
    maker, (dataset,) = maker_of(metadata, tmp_path, data={"alpha_mask": True})
    found, lacking = [], []
    for number in range(213):
        try:
            found.append(make(maker, 0, number, 0, 0, 0))
        except LatentsError as error:
            lacking.append(str(error))
    assert found
    assert all(sample.mask_HW.shape == sample.latents_CHW.shape[1:] for sample in found)
    assert all("data.alpha_mask" in line for line in lacking)
    assert len(found) + len(lacking) == len(dataset.index)


def test_step_moves_the_token_warmup_alone(metadata, tmp_path):
    """Early steps train fewer tags of the same line, and nothing else changes."""
    maker, _ = maker_of(metadata, tmp_path, caption={"token_warmup_steps": 0.5})
    early, late = ([make(maker, 0, number, 0, 0, step) for number in range(20)] for step in (0, 50))
    tags = [(one, two) for one, two in zip(early, late, strict=True) if one.style == "t"]
    assert tags
    assert all(one.caption == two.caption.partition(",")[0] for one, two in tags)
    assert all(
        torch.equal(one.noise_CHW, two.noise_CHW) and one.timestep == two.timestep
        for one, two in zip(early, late, strict=True)
    )


def test_events_of_the_caption(metadata, tmp_path):
    """A dropped caption trains as the empty text and is reported as an event."""
    maker, _ = maker_of(metadata, tmp_path, caption={"dropout_every_epochs": 2})
    assert make(maker, 0, 0, 0, 0, 0).events == ()
    dropped = make(maker, 0, 0, 0, 1, 0)
    assert (dropped.caption, dropped.cut.tokens, dropped.events) == ("", 0, ("caption_dropped",))


def test_a_record_that_was_edited_since(metadata, tmp_path):
    """The error for a record that is not as it was indexed names its file and byte offset."""
    records = json.loads(metadata.read_text(encoding="utf-8"))
    key = list(records)[2]
    changed = tmp_path / "meta.json"
    changed.write_text(json.dumps(records), encoding="utf-8")
    maker, (dataset,) = maker_of(changed, tmp_path)
    content = changed.read_bytes()
    place = content.index(b'"capmerge": "', content.index(f'"{key}"'.encode()))
    with changed.open("r+b") as file:
        file.seek(place + len(b'"capmerge": "'))
        file.write(b"x")
    with pytest.raises(StaleError) as error:
        make(maker, 0, 2, 0, 0, 0)
    where = f"{changed}, byte {int(dataset.index.offset[2]):,}"
    assert f"{where}: this is not record 2 of its index" in str(error.value)


def test_vanished_latents(metadata, tmp_path):
    """Latents that were never listed, or have vanished since, raise `LatentsError`."""
    latents = tmp_path / "latents"
    for path in LATENTS.rglob("*.npz"):
        target = latents / path.relative_to(LATENTS)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    absent, *_ = sorted(latents.rglob("photos/**/*.npz"))
    absent.unlink()
    maker, (dataset,) = maker_of(
        metadata, tmp_path, data={"latents": str(latents), "on_missing": "skip"}
    )
    (number,) = np.flatnonzero(~dataset.rows.usable).tolist()
    with pytest.raises(LatentsError, match=f"{latents}: found no latents of the record"):
        make(maker, 0, number, 0, 0, 0)
    dataset.latents_file(0, dataset.index.read(0)[0]).unlink()
    with pytest.raises(LatentsError, match="no such file"):
        make(maker, 0, 0, 0, 0, 0)


def test_chunker_of_a_run(metadata, tmp_path):
    """The `[text]` section decides how many chunks a caption may take."""
    for most, expected in ((75, 1), (225, 3), ("unlimited", None)):
        maker, _ = maker_of(
            metadata,
            tmp_path,
            model={"family": "sdxl", "path": "random"},
            text={"max_tokens": most},
        )
        chunker = build_chunker(maker._config)
        assert (chunker.max_chunks, len(chunker.tokenizers)) == (expected, 2)
