import shutil

import pytest
from builders.config import load
from builders.runs import LATENTS, rewrite_examples, settings_of

from trainer.config.settings import Config
from trainer.data.datasets import open_datasets
from trainer.data.epochs import length_warnings, run_size
from trainer.errors import ConfigError

WARMUP = {"optimizer.schedule": "constant_with_warmup"}


def test_an_epoch_has_the_samples_that_it_trains(tmp_path):
    """Records that are left out do not count as samples of an epoch, while repeats do."""
    latents = shutil.copytree(LATENTS, tmp_path / "latents")
    for path in sorted(latents.rglob("photos/**/*.npz"))[:2]:
        path.unlink()
    sections = settings_of(
        rewrite_examples(tmp_path),
        tmp_path / "run",
        data={"latents": str(latents), "on_missing": "skip", "repeats": 3},
        train={"batch_size": 1},
    )
    config = Config.model_validate(sections | {"data": [sections["data"]]})
    size = run_size(config, open_datasets(config, jobs=1), world_size=1)
    assert (size.records, size.samples_per_epoch, size.steps_per_epoch) == (
        213,
        3 * 211,
        3 * 211,
    )


@pytest.mark.parametrize(
    ("settings", "steps", "told"),
    [
        ({"caption.token_warmup_steps": 0.1}, 8, ["caption.token_warmup_steps = 0.1 of 8 steps"]),
        ({"caption.token_warmup_steps": 0.1}, 10, []),
        ({"caption.token_warmup_steps": 3}, 2, []),
        (WARMUP | {"optimizer.warmup_steps": 8}, 8, ["optimizer.warmup_steps = 8 does not end"]),
        (WARMUP | {"optimizer.warmup_steps": 7}, 8, []),
        ({}, 1, []),
    ],
)
def test_settings_that_a_short_run_leaves_without_effect(tmp_path, settings, steps, told):
    """A warm-up of less than one step, and one past the end of the run, are told."""
    said = list(length_warnings(load(tmp_path, settings), steps))
    assert len(said) == len(told)
    assert all(part in line for part, line in zip(told, said, strict=True))


def test_a_contrast_needs_two_samples(tmp_path):
    """A contrastive loss is refused for global batches of one sample; a second rank is enough."""
    sections = settings_of(
        rewrite_examples(tmp_path),
        tmp_path / "run",
        noise={"prediction": "flow"},
        loss={"contrastive": 0.05},
        train={"batch_size": 1},
    )
    config = Config.model_validate(sections | {"data": [sections["data"]]})
    datasets = open_datasets(config, jobs=1)
    with pytest.raises(ConfigError, match=r"`loss.contrastive` has no effect with a global batch"):
        run_size(config, datasets, world_size=1)
    assert run_size(config, datasets, world_size=2).global_batch_size == 2
