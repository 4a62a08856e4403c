import json
import shutil

import pytest
import torch
from builders.runs import (
    LATENTS,
    metrics_of,
    rewrite_examples,
    settings_of,
    train_here,
    write_config,
)

from trainer.config.load import load_config
from trainer.errors import ResumeError
from trainer.training.run_folder import config_to_resume


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A function that gives a copy of a run of 2 steps, and the path of its config."""
    folder = tmp_path_factory.mktemp("begun")
    metadata = rewrite_examples(folder, n_records=24)
    sections = settings_of(metadata, folder / "run", train={"max_steps": 2})
    assert train_here(write_config(folder / "c.toml", sections)) == 0

    def copy(to):
        shutil.copytree(folder / "run", to / "run")
        sections["train"]["output_dir"] = str(to / "run")
        return to / "run", write_config(to / "c.toml", sections)

    return copy


def groups_of(run, step):
    """The parameter groups in the saved optimizer."""
    path = run / "checkpoints" / f"step-{step:08d}" / "optimizer.bin"
    return torch.load(path, weights_only=True)["param_groups"]


def test_a_changed_objective_is_refused_by_name(begun, tmp_path):
    """Forgotten or changed settings are all named, and the files of the run stay as they are."""
    run, config = begun(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    changes = ["noise.prediction=v", "optimizer.arguments.weight_decay=0.5", "train.max_steps=3"]
    with pytest.raises(ResumeError, match="--allow-change") as refused:
        train_here(config, *changes, resume="latest")
    assert 'noise.prediction: saved "epsilon", now "v"' in str(refused.value)
    assert "optimizer.arguments.weight_decay: saved nothing, now 0.5" in str(refused.value)
    assert "max_steps" not in str(refused.value)
    after = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    assert {path: time for path, time in after.items() if path.name != ".lock"} == {
        path: time for path, time in before.items() if path.name != ".lock"
    }


def test_an_allowed_change_is_applied_and_told(begun, tmp_path, capsys):
    """--allow-change gives the loaded optimizer its new arguments and rates; both configs stay."""
    run, config = begun(tmp_path)
    old = (run / "config.toml").read_bytes()
    changes = [
        *("optimizer.arguments.weight_decay=0.5", "optimizer.learning_rate=2e-3"),
        *("train.max_steps=3", "noise.offset=0.1"),
    ]
    assert train_here(config, *changes, resume="latest", allow_change=True) == 0
    said = capsys.readouterr().err
    assert "changed since the state was saved: noise.offset: saved 0.0, now 0.1" in said
    assert "lr_unet of step 2: saved 0.001, now 0.002" in said
    assert [group["weight_decay"] for group in groups_of(run, 2)] != [0.5, 0.5]
    assert [group["weight_decay"] for group in groups_of(run, 3)] == [0.5, 0.5]
    assert metrics_of(run)[-1]["lr_unet"] == 2e-3
    assert (run / "config.1.toml").read_bytes() == old
    assert load_config(run / "config.toml").optimizer.arguments == {"weight_decay": 0.5}


def test_a_longer_run_tells_how_its_schedule_moves(begun, tmp_path, capsys):
    """With a schedule over the whole run, more steps are refused, then told with both rates."""
    _, config = begun(tmp_path)
    cosine = ["optimizer.schedule=cosine", f"train.output_dir={tmp_path / 'cosine'}"]
    assert train_here(config, *cosine, "train.max_steps=3") == 0
    longer = [*cosine, "train.max_steps=4"]
    with pytest.raises(ResumeError, match=r"train\.max_steps: saved 3, now 4"):
        train_here(config, *longer, resume="latest")
    capsys.readouterr()
    assert train_here(config, *longer, resume="latest", allow_change=True) == 0
    assert "lr_unet of step 3: saved 0.00025, now 0.0005" in capsys.readouterr().err


def test_a_state_of_an_earlier_version_is_compared_by_what_it_holds(begun, tmp_path, capsys):
    """A state without a config resumes with a note; its optimizer's arguments and rates count."""
    run, config = begun(tmp_path)
    state = run / "checkpoints" / "step-00000002"
    (state / "config.toml").unlink()
    told = json.loads((state / "state.json").read_text(encoding="utf-8"))
    del told["files"]
    (state / "state.json").write_text(json.dumps(told), encoding="utf-8")
    with pytest.raises(ResumeError, match=r"optimizer\.arguments\.weight_decay: saved 0\.01, now"):
        train_here(config, "optimizer.arguments.weight_decay=0.5", resume="latest")
    with pytest.raises(ResumeError, match=r"lr_unet of step 2: saved 0\.001, now 0\.002"):
        train_here(config, "optimizer.learning_rate=2e-3", resume="latest")
    capsys.readouterr()
    assert train_here(config, "train.max_steps=3", resume="latest") == 0
    assert "an earlier version saved this state without its config" in capsys.readouterr().err


def test_moved_latents_are_told_by_their_content(begun, tmp_path):
    """Latents may lie elsewhere, but not be others."""
    _, config = begun(tmp_path)
    moved = shutil.copytree(LATENTS, tmp_path / "moved")
    there = ["train.max_steps=3", f"data.latents={moved}"]
    assert train_here(config, *there, resume="latest") == 0
    for path in moved.rglob("*.npz"):
        path.write_bytes(path.read_bytes() + b"\0")
    other = tmp_path / "other"
    moved.rename(other)
    with pytest.raises(ResumeError, match=r"data\.0\.latents fingerprint"):
        train_here(config, "train.max_steps=3", f"data.latents={other}", resume="latest")


@pytest.mark.parametrize("named", ["run", "run/checkpoints/step-00000002"])
def test_a_run_goes_on_without_a_config(begun, tmp_path, named):
    """--resume with a run's folder or a state takes its config, and goes on where it lies now."""
    run, _ = begun(tmp_path)
    path, overrides = config_to_resume(str(tmp_path / named))
    config = load_config(path, overrides)
    assert config.train.output_dir == run
    assert train_here(path, *overrides, "train.max_steps=3", resume=str(tmp_path / named)) == 0
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3]
