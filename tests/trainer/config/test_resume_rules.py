from fnmatch import fnmatchcase
from inspect import signature

import pytest
from torch.optim import AdamW

from trainer.config.resume_rules import FREE, LENGTH, Change, list_changes
from trainer.config.settings import Config

LEAST = {
    "model": {"family": "sd1", "path": "random"},
    "data": [{"metadata": "a.json", "latents": "a"}],
    "train": {"output_dir": "run", "max_steps": 8, "seed": 1},
}


def config(**changes):
    """A valid config with further settings in its sections; `data` replaces all data sets."""
    sections = {**LEAST}
    for section, values in changes.items():
        sections[section] = values if section == "data" else LEAST.get(section, {}) | values
    return Config.model_validate(sections)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"noise": {"prediction": "v"}}, Change("noise.prediction", "epsilon", "v")),
        ({"loss": {"kind": "l1"}}, Change("loss.kind", "l2", "l1")),
        ({"train": {"precision": "bf16"}}, Change("train.precision", "fp32", "bf16")),
        ({"validation": {"share": 0.1}}, Change("validation.share", 0.0, 0.1)),
        ({"ema": {"decay": 0.5}}, Change("ema.decay", 0.0, 0.5)),
        ({"caption": {"shuffle": True}}, Change("caption.shuffle", False, True)),
        (
            {"optimizer": {"arguments": {"weight_decay": 0.5}}},
            Change("optimizer.arguments.weight_decay", None, 0.5),
        ),
        (
            {"data": [*LEAST["data"], {"metadata": "b.json", "latents": "b"}]},
            Change("number of [[data]]", 1, 2),
        ),
    ],
)
def test_a_setting_that_decides_what_is_trained_is_named(changes, expected):
    """Objective, captions, precision, optimizer and data are compared, and named by setting."""
    assert list_changes(config(), config(**changes)) == [expected]
    assert list_changes(config(**changes), config(**changes)) == []


def test_free_settings_are_not_named():
    """Folders, batches, workers, saving, logging and the handling of faults may change."""
    changed = config(
        data=[{"metadata": "moved.json", "latents": "moved", "on_missing": "skip"}],
        model={"path": "moved"},
        train={
            "output_dir": "other",
            "workers": 0,
            "batch_size": 2,
            "accumulation": 3,
            "on_nonfinite": "stop",
            "max_steps": 9,
            "max_epochs": 3,
        },
        ema={"device": "cpu"},
        validation={"every_steps": 5},
        checkpoint={"every_steps": 5, "keep": 3},
        log={"every_steps": 7, "samples": True},
    )
    assert list_changes(config(), changed) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"optimizer": {"schedule": "cosine"}},
        {"caption": {"shuffle": True, "token_warmup_steps": 0.5}},
    ],
)
def test_the_length_is_free_only_where_nothing_counts_by_it(changes):
    """`max_steps` may change, except with a schedule or warm-up that is a share of the run."""
    longer = changes | {"train": {"max_steps": 80}}
    assert list_changes(config(**changes), config(**longer)) == [Change("train.max_steps", 8, 80)]


def test_captions_are_compared_as_each_data_set_has_them():
    """A setting that moves from [caption] to [data.caption] is no change; a set's own is one."""
    sets = [{"metadata": f"{name}.json", "latents": name} for name in "ab"]
    own = [{**one, "caption": {"keep_tokens": 2}} for one in sets]
    assert list_changes(config(data=sets, caption={"keep_tokens": 2}), config(data=own)) == []
    (change,) = list_changes(config(data=sets), config(data=[sets[0], own[1]]))
    assert change == Change("data.1.caption.keep_tokens", 0, 2)


def test_a_resumed_run_may_cache_otherwise():
    """`[cache]` is no part of what is trained, so it may come, go and change."""
    assert list_changes(config(), config(cache={"images": "a", "flip": True})) == []


def test_the_table_names_settings_that_exist():
    """Every pattern of the table fits a setting, so that none is left behind by a renaming."""
    names = [
        *(f"data.0.{name}" for name in type(config().data[0]).model_fields),
        *(
            f"{section}.{name}"
            for section in Config.model_fields
            if section != "data"
            for name in type(getattr(config(), section)).model_fields
        ),
        *(f"optimizer.arguments.{name}" for name in signature(AdamW).parameters),
    ]
    for pattern in (*FREE, *LENGTH):
        assert any(fnmatchcase(name, pattern) for name in names), pattern
