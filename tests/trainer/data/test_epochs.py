import shutil

from builders.runs import LATENTS, rewrite_examples, settings_of

from trainer.config.settings import Config
from trainer.data.datasets import open_datasets
from trainer.data.epochs import run_size


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
