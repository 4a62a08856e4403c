import json
import os
import shutil
import sys

import pytest
from builders.runs import metrics_of, rewrite_examples, settings_of, train_here, write_config

from trainer.errors import ConfigError, ResumeError
from trainer.training.states import checkpoint, saving


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A function that gives a copy of a run with the states after steps 1, 2 and 3."""
    folder = tmp_path_factory.mktemp("begun")
    metadata = rewrite_examples(folder, n_records=24)
    sections = settings_of(
        metadata,
        folder / "run",
        train={"max_steps": 3},
        checkpoint={"every_steps": 1, "keep": 3},
    )
    assert train_here(write_config(folder / "c.toml", sections)) == 0

    def copy(to):
        shutil.copytree(folder / "run", to / "run")
        sections["train"]["output_dir"] = str(to / "run")
        return to / "run", write_config(to / "c.toml", sections)

    return copy


def state(run, step):
    """The folder of a saved state."""
    return run / "checkpoints" / f"step-{step:08d}"


def flip_a_bit(path):
    """Change one bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit(run, step, values):
    """Change values in the state.json of a saved state; None removes one."""
    path = state(run, step) / "state.json"
    told = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps({name: one for name, one in told.items() if one is not None}))


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "config.toml"])
def test_a_flipped_bit_falls_back_to_the_state_before(begun, tmp_path, capsys, name):
    """A newest state with a changed byte is told, set aside, and the state before it trains on."""
    run, config = begun(tmp_path)
    before = metrics_of(run)
    flip_a_bit(state(run, 3) / name)
    assert train_here(config, resume="latest") == 0
    said = capsys.readouterr().err
    assert f"WARNING: {state(run, 3)}: the saved state is damaged: {name} is not as it was" in said
    assert "resumes at step 2" in said
    assert (run / "checkpoints" / "before-resume-step-00000003").is_dir()
    assert metrics_of(run) == before


@pytest.mark.parametrize(
    "damage",
    [
        {"step": -1},
        {"step": 10**20},
        {"step": True},
        {"identity": None},
        {"identity": {}},
        {"identity": {"train.seed": -1}},
        {"identity": {"train.seed": 1 << 63}},
        {"files": []},
        {"files": {}},
        {"files": None},
        {"files": {"model.safetensors": 1}},
    ],
)
def test_values_that_no_save_writes_are_refused(begun, tmp_path, damage):
    """A state.json with an impossible step, identity or checksum falls back to the state before."""
    run, _ = begun(tmp_path)
    edit(run, 3, damage)
    with pytest.raises(ResumeError, match="no complete state"):
        checkpoint.find_states(run, str(state(run, 3)))
    saved, (problem,) = checkpoint._newest_sound(checkpoint.find_states(run, "latest"))
    assert saved.step == 2
    assert problem.startswith(f"{state(run, 3)}: no complete state (state.json: ")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no named pipes in folders")
@pytest.mark.parametrize("name", ["state.json", "optimizer.bin"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir])
def test_a_pipe_or_a_folder_in_a_state_is_damage(begun, tmp_path, name, make):
    """A file of a state that is no regular file is told, and is not waited for."""
    run, _ = begun(tmp_path)
    (state(run, 3) / name).unlink()
    make(state(run, 3) / name)
    saved, (problem,) = checkpoint._newest_sound(checkpoint.find_states(run, "latest"))
    assert saved.step == 2
    assert "it is no regular file" in problem


@pytest.mark.parametrize("wanted", ["", "nope", "n" * 300, "c.toml", "nope/latest"])
def test_a_path_that_is_no_folder_is_a_mistake_of_the_command(begun, tmp_path, wanted):
    """A wrong path to resume from is told in words, and ends with the exit code of a wrong path."""
    run, config = begun(tmp_path)
    wanted = str(config) if wanted == "c.toml" else wanted
    with pytest.raises(ConfigError, match=r"found a file|there is no such folder") as refused:
        train_here(config, resume=wanted)
    assert str(refused.value).startswith(f"--resume {wanted}: ")
    assert "Errno" not in str(refused.value)
    with pytest.raises(
        ResumeError, match=r"no complete state \(state\.json: No such file"
    ) as refused:
        train_here(config, resume=str(run / "checkpoints"))
    assert "Errno" not in str(refused.value)


def test_a_run_that_lost_its_run_json_goes_on_from_its_state(begun, tmp_path):
    """Without a run.json, --resume latest names the newest state, which the run goes on from."""
    run, config = begun(tmp_path)
    (run / "run.json").write_text('{"identity": ')
    with pytest.raises(ResumeError, match=r"found no run there.*--resume .*step-00000003\."):
        train_here(config, resume="latest")
    assert train_here(config, "train.max_steps=4", resume=str(state(run, 3))) == 0
    assert [line["step"] for line in metrics_of(run)] == [1, 2, 3, 4]
    assert checkpoint.find_states(run, "latest")[0] == state(run, 4)


def test_a_run_without_a_sound_state_is_not_begun_again(begun, tmp_path):
    """When every state is damaged, all are named; the run does not start from step 0 instead."""
    run, config = begun(tmp_path)
    flip_a_bit(state(run, 1) / "model.safetensors")
    (state(run, 2) / "optimizer.bin").unlink()
    (state(run, 3) / "state.json").unlink()
    with pytest.raises(ResumeError) as refused:
        train_here(config, resume="latest")
    for step in (1, 2, 3):
        assert str(state(run, step)) in str(refused.value)


def test_a_state_that_is_named_does_not_fall_back(begun, tmp_path):
    """With the path of a damaged state, the run is refused."""
    run, config = begun(tmp_path)
    flip_a_bit(state(run, 2) / "model.safetensors")
    with pytest.raises(ResumeError, match=r"step-00000002: .*damaged: model\.safetensors"):
        train_here(config, resume=str(state(run, 2)))


def test_a_run_that_would_end_before_its_state_is_refused(begun, tmp_path):
    """`max_steps` below the state's step is a mistake; the model is not written again."""
    run, config = begun(tmp_path)
    shutil.rmtree(run / "model")
    with pytest.raises(ConfigError, match=r"train\.max_steps: .*end at step 2, .*after step 3"):
        train_here(config, "train.max_steps=2", resume="latest")
    assert not (run / "model").exists()


def test_a_kill_while_a_state_is_replaced_leaves_one_of_them(begun, tmp_path):
    """A state that was being replaced keeps its name if the new one has not got it yet."""
    run, _ = begun(tmp_path)
    folder = run / "checkpoints"
    state(run, 1).rename(folder / ".step-00000001.replaced")
    shutil.copytree(state(run, 2), folder / ".step-00000002.replaced")
    saving._tidy(folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("step-00000001", "step-00000002", "step-00000003")
    ]


def test_a_kill_while_a_state_is_removed_leaves_nothing_for_ever(begun, tmp_path, monkeypatch):
    """A removal that is cut short leaves no half state, and the next save removes the rest."""
    run, config = begun(tmp_path)
    left = run / "checkpoints" / ".step-00000001.replaced"
    shutil.copytree(state(run, 1), left)

    def killed(folder, **_):
        if folder.name == ".unfinished-step-00000001":
            (folder / "state.json").unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(saving.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            train_here(config, "train.max_steps=4", resume="latest")
    assert not state(run, 1).exists()
    assert (run / "checkpoints" / ".unfinished-step-00000001").is_dir()
    assert train_here(config, "train.max_steps=5", resume="latest") == 0
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        *("step-00000003", "step-00000004", "step-00000005")
    ]
