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


@pytest.mark.parametrize(
    ("before", "changes", "told", "kept", "group"),
    [
        (
            [],
            ["optimizer.arguments.amsgrad=true"],
            "AdamW needs more with these arguments than it had kept, and begins anew",
            {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"},
            {"amsgrad": True},
        ),
        (
            ["optimizer.name=RMSprop"],
            ["optimizer.arguments.momentum=0.9"],
            "RMSprop needs more with these arguments than it had kept, and begins anew",
            {"step", "square_avg", "momentum_buffer"},
            {"momentum": 0.9},
        ),
        # AdamW's own options would make an AdamW of Adam.
        (
            [],
            ["optimizer.name=Adam"],
            "the state of AdamW is of no use to Adam, which begins anew",
            {"step", "exp_avg", "exp_avg_sq"},
            {"weight_decay": 0, "decoupled_weight_decay": False},
        ),
        (
            [],
            ["optimizer.name=SGD"],
            "the state of AdamW is of no use to SGD, which begins anew",
            set(),
            {"momentum": 0},
        ),
    ],
)
def test_an_optimizer_that_cannot_go_on_begins_anew(
    begun, tmp_path, capsys, before, changes, told, kept, group
):
    """With --allow-change, what the saved optimizer lacks or means differently is left behind."""
    run, config = begun(tmp_path)
    if before:
        run = tmp_path / "other"
        before = [*before, f"train.output_dir={run}"]
        assert train_here(config, *before) == 0
    capsys.readouterr()
    overrides = [*before, *changes, "train.max_steps=3"]
    assert train_here(config, *overrides, resume="latest", allow_change=True) == 0
    assert f"changed since the state was saved: {told}" in capsys.readouterr().err
    path = run / "checkpoints" / "step-00000003" / "optimizer.bin"
    saved = torch.load(path, weights_only=True)
    assert {name for one in saved["state"].values() for name in one} == kept
    assert {int(one["step"]) for one in saved["state"].values()} <= {1}
    for one in saved["param_groups"]:
        assert group.items() <= one.items()


def test_an_optimizer_that_can_go_on_does_so(begun, tmp_path):
    """Arguments that need nothing more keep the state of the optimizer."""
    run, config = begun(tmp_path)
    overrides = ["optimizer.arguments.betas=[0.8, 0.9]", "train.max_steps=3"]
    assert train_here(config, *overrides, resume="latest", allow_change=True) == 0
    path = run / "checkpoints" / "step-00000003" / "optimizer.bin"
    saved = torch.load(path, weights_only=True)
    assert {int(one["step"]) for one in saved["state"].values()} == {3}
    assert {one["betas"] for one in saved["param_groups"]} == {(0.8, 0.9)}


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


def test_a_moved_model_is_told_by_its_content(begun, tmp_path):
    """A model may lie elsewhere, but not be another one."""
    run, config = begun(tmp_path)
    model = run.rename(tmp_path / "first") / "model"
    assert train_here(config, f"model.path={model}") == 0
    moved = model.rename(tmp_path / "moved")
    there = [f"model.path={moved}", "train.max_steps=3"]
    assert train_here(config, *there, resume="latest") == 0
    part = moved / "text_encoder" / "config.json"
    part.write_bytes(part.read_bytes() + b"\n")
    with pytest.raises(ResumeError, match=r"model fingerprint: saved .*, now "):
        train_here(config, f"model.path={moved}", "train.max_steps=4", resume="latest")


def test_metadata_of_the_same_size_are_told_by_their_content(begun, tmp_path):
    """An edit that keeps the size of the metadata is seen; metadata that were moved may go on."""
    run, config = begun(tmp_path)
    before = load_config(run / "config.toml").data[0].metadata
    moved = tmp_path / "moved.json"
    shutil.copy(before, moved)
    there = [f"data.metadata={moved}", "train.max_steps=3"]
    assert train_here(config, *there, resume="latest") == 0
    data = moved.read_bytes()
    caption = data.index(b'"caption": "') + len(b'"caption": "')
    moved.write_bytes(data[:caption] + data[caption : caption + 9].swapcase() + data[caption + 9 :])
    assert moved.stat().st_size == len(data)
    with pytest.raises(ResumeError, match=r"data\.0\.records fingerprint: saved .*, now "):
        train_here(config, f"data.metadata={moved}", "train.max_steps=4", resume="latest")


@pytest.mark.parametrize("named", ["run", "run/checkpoints/step-00000002"])
def test_a_run_goes_on_without_a_config(begun, tmp_path, named):
    """--resume with a run's folder or a state takes its config, and goes on where it lies now."""
    run, _ = begun(tmp_path)
    path, overrides = config_to_resume(str(tmp_path / named))
    config = load_config(path, overrides)
    assert config.train.output_dir == run
    assert train_here(path, *overrides, "train.max_steps=3", resume=str(tmp_path / named)) == 0
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3]
