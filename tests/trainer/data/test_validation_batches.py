import shutil

import pytest
import torch
from builders.runs import LATENTS, settings_of

from capmerge.captions.draw import draw_line
from capmerge.rng import SampleId
from trainer.config.settings import Config
from trainer.data.batch import SampleRequest
from trainer.data.datasets import open_datasets
from trainer.data.samples import SampleMaker, build_chunker
from trainer.data.validation_batches import LeftOutError, iter_validation
from trainer.errors import LatentsError

RECORDS = [(0, 3), (0, 100), (0, 212), (0, 4)]


def opened(metadata, tmp_path, **changes):
    """The config of a small run with validation, and its data set in a tuple."""
    sections = settings_of(metadata, tmp_path / "run", **changes)
    config = Config.model_validate(sections | {"data": [sections["data"]]})
    return config, open_datasets(config, jobs=1)


def assert_equal_batches(one, other):
    """Two micro-batches hold the same tensors bit for bit, and the same captions."""
    assert (one.captions, one.styles, one.counts) == (other.captions, other.styles, other.counts)
    for name in ("latents_BCHW", "noise_BCHW", "timesteps_B"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert all(torch.equal(*ids) for ids in zip(one.ids, other.ids, strict=True))


DISTURBED = {
    "caption": {
        "pick": "cycle",
        "shuffle": True,
        "tag_dropout_rate": 0.9,
        "token_warmup_steps": 50,
        "dropout_rate": 0.5,
        "dropout_every_epochs": 2,
    },
    "text": {"max_tokens": 225, "random_caption_rate": 0.5, "word_repeat_rate": 0.5},
    "noise": {"input_perturbation": 0.1, "offset": 0.1},
}
"""Settings that change a sample by chance."""


# The warning comes on a machine with two cores.
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
def test_a_record_is_the_same_whatever_disturbs_the_training(metadata, tmp_path):
    """Chance leaves no trace: a micro-batch holds one record as a plain training would make it.

    It is the same again, with any number of workers and any batch size.
    """
    config, datasets = opened(metadata, tmp_path, **DISTURBED)
    batches = list(iter_validation(config, datasets, RECORDS))
    plain = opened(metadata, tmp_path, text={"max_tokens": 225}, noise={"offset": 0.1})
    maker = SampleMaker(*plain, max_steps=1)
    for (dataset, record), batch in zip(RECORDS, batches, strict=True):
        key, values = datasets[dataset].index.read(record)
        expected = maker.make(SampleRequest(dataset, record, 0, -1, 0))
        line = draw_line(values["caption"], SampleId(7, -1, key)).text
        assert set(batch.keys) == {key}
        assert set(batch.captions) == {line} == {expected.caption}
        assert batch.timesteps_B.tolist() == [125, 375, 625, 875]
        assert batch.input_noise_BCHW is None
        for latents, noise in zip(batch.latents_BCHW, batch.noise_BCHW, strict=True):
            assert torch.equal(latents, expected.latents_CHW)
            assert torch.equal(noise, expected.noise_CHW)
        assert batch.styles == (expected.style,) * 4
        assert batch.counts["tokens"] == 4 * expected.cut.tokens
        assert batch.ids[0].shape == (1, 3, 77)
    for workers, batch_size in ((0, 1), (3, 4)):
        train = {"workers": workers, "batch_size": batch_size}
        again, _ = opened(metadata, tmp_path, train=train, **DISTURBED)
        for one, other in zip(batches, iter_validation(again, datasets, RECORDS), strict=True):
            assert_equal_batches(one, other)


def test_separators_go_as_they_go_in_the_training(metadata, tmp_path):
    """Where training removes `keep_tokens_separator` from a line, validation does so too."""
    plain, datasets = opened(metadata, tmp_path)
    before = [batch.captions[0] for batch in iter_validation(plain, datasets, RECORDS)]
    styles = [batch.styles[0] for batch in iter_validation(plain, datasets, RECORDS)]
    settings = {"shuffle": True, "separator": ",", "secondary_separator": "_"}
    config, datasets = opened(metadata, tmp_path, caption=settings)
    for caption, style, batch in zip(
        before, styles, iter_validation(config, datasets, RECORDS), strict=True
    ):
        tags = [tag.strip() for tag in caption.split(",")]
        joined = ", ".join(tags) if style == "t" else caption
        assert batch.captions[0] == joined.replace("_", ",")


@pytest.mark.parametrize(
    ("text", "chunks"),
    [
        ({"max_tokens": 150}, {2}),
        ({"max_tokens": "unlimited"}, None),
        ({"max_tokens": "unlimited", "dynamic_chunks": True}, None),
        ({"chunking": "a1111", "max_tokens": "unlimited"}, None),
        ({"chunking": "crop"}, {1}),
    ],
)
def test_long_captions_have_the_chunks_of_their_own(metadata, tmp_path, text, chunks):
    """A record is encoded at the chunks that it trains with; no neighbour pads it."""
    config, (dataset,) = opened(metadata, tmp_path, text=text)
    chunker, found = build_chunker(config), set()
    batches = iter_validation(config, [dataset], [(0, record) for record in range(12)])
    for record, batch in enumerate(batches):
        needed = chunker.chunks_of(chunker.cut(batch.captions[0]))
        of_bucket = dataset.rows.chunks
        expected = max(needed, 0 if of_bucket is None else int(of_bucket[record]))
        if chunks is None:
            assert batch.ids[0].shape[1] == expected
        found.add(batch.ids[0].shape[1])
    assert found == chunks if chunks else len(found) > 1


def test_timesteps_are_quantiles_of_those_that_train(metadata, tmp_path):
    """The timesteps lie in the middles of four quarters of the range that is drawn from."""
    noise = {"min_timestep": 200, "max_timestep": 600}
    config, datasets = opened(metadata, tmp_path, noise=noise)
    (batch,) = iter_validation(config, datasets, RECORDS[:1])
    assert batch.timesteps_B.tolist() == [250, 350, 450, 550]


@pytest.mark.parametrize(
    ("workers", "on_missing", "kind"), [(0, "skip", LeftOutError), (1, "stop", LatentsError)]
)
def test_a_broken_record_is_an_error_in_its_place(metadata, tmp_path, workers, on_missing, kind):
    """Latents that break later give an error in place of their batch, and the others follow.

    No other record takes its place.
    """
    latents = shutil.copytree(LATENTS, tmp_path / "latents")
    data = {"latents": str(latents), "on_missing": on_missing}
    config, datasets = opened(metadata, tmp_path, data=data, train={"workers": workers})
    datasets[0].latents_file(100, datasets[0].index.read(100)[0]).write_bytes(b"no archive")
    results = list(iter_validation(config, datasets, RECORDS))
    assert [isinstance(result, kind) for result in results] == [False, True, False, False]
    assert results[2].keys[0] == datasets[0].index.read(212)[0]


def test_flipped_latents_are_not_taken(metadata, tmp_path):
    """With `data.flip`, the latents of a validation are still those of the picture as it is."""
    plain, datasets = opened(metadata, tmp_path)
    expected = list(iter_validation(plain, datasets, RECORDS))
    config, datasets = opened(metadata, tmp_path, data={"flip": True})
    for one, other in zip(iter_validation(config, datasets, RECORDS), expected, strict=True):
        assert_equal_batches(one, other)


def test_no_records_need_no_workers(metadata, tmp_path):
    """A rank without a record has no batches."""
    config, datasets = opened(metadata, tmp_path)
    assert list(iter_validation(config, datasets, [])) == []
