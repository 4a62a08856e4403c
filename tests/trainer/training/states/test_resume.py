import json
import shutil
import signal
import subprocess
import time

import pytest
import torch
from builders.runs import (
    ENVIRONMENT,
    assert_equal_bits,
    command,
    metrics_of,
    rewrite_examples,
    run,
    settings_of,
    state_of,
    train_here,
    write_config,
)

from trainer.errors import ConfigError, ResumeError


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The rewritten examples."""
    return rewrite_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def unbroken(metadata, tmp_path_factory):
    """The folder of a run of 8 steps without a break."""
    folder = tmp_path_factory.mktemp("unbroken")
    config = write_config(folder / "config_in.toml", settings_of(metadata, folder / "run"))
    done = run(config)
    assert done.returncode == 0, done.stderr
    return folder / "run"


def test_four_and_four_steps_are_eight(metadata, unbroken, tmp_path):
    """4 + resume + 4 steps give the weights, states, captions and metrics of 8, bit for bit."""
    out = tmp_path / "run"
    config = write_config(tmp_path / "c.toml", settings_of(metadata, out))
    assert run(config, "--set", "train.max_steps=4").returncode == 0
    assert len(metrics_of(out)) == 4
    done = run(config, "--resume", "latest")
    assert done.returncode == 0, done.stderr
    assert "resumes at step 4" in done.stderr
    assert_equal_bits(state_of(out, 8), state_of(unbroken, 8))
    assert metrics_of(out) == metrics_of(unbroken)


FLOW = {
    "noise": {"prediction": "flow", "timestep_sampling": "logit_normal", "shift": "resolution"},
    "loss": {"contrastive": 0.05},
    "checkpoint": {"every_steps": 2},
}


def test_a_flow_goes_on_bit_for_bit_with_any_number_of_workers(metadata, tmp_path, capsys):
    """2 + resume + 2 steps of a flow with contrast are 4 unbroken ones, with workers or without."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train = {"max_steps": 4, "output_dir": str(whole)}
    config = write_config(tmp_path / "c.toml", settings_of(metadata, whole, train=train, **FLOW))
    assert train_here(config) == 0
    moved = f"train.output_dir={parts}"
    assert train_here(config, moved, "train.max_steps=2", "train.workers=2") == 0
    assert train_here(config, moved, resume="latest") == 0
    assert "with the node ModelSamplingSD3 at shift 0.5." in capsys.readouterr().err
    assert_equal_bits(state_of(parts, 4), state_of(whole, 4))
    assert metrics_of(parts) == metrics_of(whole)
    with pytest.raises(ResumeError, match=r'noise.shift: saved "resolution", now 2.0'):
        train_here(config, "noise.shift=2.0", resume="latest")


@pytest.fixture(scope="module")
def unbroken_batches_of_4(metadata, tmp_path_factory):
    """The folder of 8 steps of one micro-batch of 4 samples, with the state after step 3."""
    folder = tmp_path_factory.mktemp("unbroken_4")
    changes = {
        "train": {"batch_size": 4, "accumulation": 1},
        "checkpoint": {"every_steps": 3, "keep": 9},
    }
    assert (
        train_here(
            write_config(folder / "c.toml", settings_of(metadata, folder / "run", **changes))
        )
        == 0
    )
    return folder / "run"


@pytest.mark.parametrize(("batch_size", "accumulation"), [(4, 1), (2, 2), (1, 4)])
def test_a_resume_with_another_accumulation_trains_on(
    metadata, unbroken_batches_of_4, tmp_path, batch_size, accumulation
):
    """Resuming with another split of the global batch ends at the same weights, up to rounding.

    The state is from step 3, a multiple of neither 2 nor 4, so a count of micro-batches that
    continued over the resume would be found out.
    """
    changes = {"train": {"batch_size": batch_size, "accumulation": accumulation}}
    config = write_config(tmp_path / "c.toml", settings_of(metadata, tmp_path / "run", **changes))
    assert (
        train_here(config, resume=str(unbroken_batches_of_4 / "checkpoints" / "step-00000003")) == 0
    )
    before, expected, found = (
        state_of(unbroken_batches_of_4, 3),
        state_of(unbroken_batches_of_4, 8),
        state_of(tmp_path / "run", 8),
    )
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-2, atol=2e-4, msg=name)
        assert not torch.equal(found[name], before[name]), f"{name} did not move"
    for one, other in zip(
        metrics_of(tmp_path / "run"), metrics_of(unbroken_batches_of_4)[3:], strict=True
    ):
        assert one["keys"] == other["keys"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)


def test_a_killed_run_goes_on_as_if_it_had_not_been(metadata, tmp_path):
    """A killed and resumed run gives the same weights, states and metrics as a whole one."""
    sections = settings_of(
        metadata,
        tmp_path / "killed",
        train={"max_steps": 120, "workers": 1},
        checkpoint={"every_steps": 3},
    )
    killed = write_config(tmp_path / "killed.toml", sections)
    sections["train"]["output_dir"] = str(tmp_path / "whole")
    whole = write_config(tmp_path / "whole.toml", sections)
    with subprocess.Popen(command(killed), env=ENVIRONMENT, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not list(
            (tmp_path / "killed").glob("checkpoints/step-*6")
        ):
            time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL
    resumed_at = max(
        int(path.name[5:]) for path in (tmp_path / "killed").glob("checkpoints/step-*")
    )
    assert 6 <= resumed_at < 120
    done = run(killed, "--resume", "latest")
    assert done.returncode == 0, done.stderr
    assert f"resumes at step {resumed_at}" in done.stderr
    assert run(whole).returncode == 0
    assert_equal_bits(state_of(tmp_path / "killed", 120), state_of(tmp_path / "whole", 120))
    assert metrics_of(tmp_path / "killed") == metrics_of(tmp_path / "whole")


# The warning comes on a machine with two cores.
@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [1, 3])
def test_any_number_of_workers_gives_the_same_samples(metadata, unbroken, tmp_path, workers):
    """0, 1 and 3 workers train the same samples to the same losses."""
    config = write_config(
        tmp_path / "c.toml", settings_of(metadata, tmp_path / "run", train={"workers": workers})
    )
    assert train_here(config) == 0
    assert metrics_of(tmp_path / "run") == metrics_of(unbroken)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_exits(metadata, tmp_path, number, code):
    """SIGTERM and Ctrl-C end the run after the current step, saved and with an exit code each."""
    out = tmp_path / "run"
    config = write_config(
        tmp_path / "c.toml", settings_of(metadata, out, train={"max_steps": 100000})
    )
    with subprocess.Popen(
        command(config), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True
    ) as process:
        while process.poll() is None and not ((out / "metrics.jsonl").exists() and metrics_of(out)):
            time.sleep(0.05)
        process.send_signal(number)
        _, errors = process.communicate()
    assert process.returncode == code, errors
    assert "Traceback" not in errors
    last = metrics_of(out)[-1]["step"]
    assert (
        f"stopped after step {last:,} of 100,000; its state is saved. "
        "Continue with --resume latest."
    ) in errors
    assert (out / "checkpoints" / f"step-{last:08d}" / "state.json").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"train": {"seed": 8}}, "train.seed: saved 7, now 8"),
        ({"train": {"batch_size": 4}}, "global batch size: saved 2, now 4"),
        ({"data": {"repeats": 2}}, "data.0.repeats: saved 1, now 2"),
    ],
)
def test_another_run_is_refused_by_name(metadata, unbroken, changes, named):
    """A state is not resumed with another seed, global batch or data unless allowed."""
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")}
    config = write_config(
        unbroken.parent / "changed.toml", settings_of(metadata, unbroken, **changes)
    )
    with pytest.raises(ResumeError, match=r".*--allow-change") as refused:
        train_here(config, resume="latest")
    assert named in str(refused.value)
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*")} == before


def test_changed_metadata_is_refused_and_can_be_allowed(metadata, tmp_path, capsys):
    """Changed metadata is refused by its fingerprint; --allow-change names it and trains."""
    copy = tmp_path / "meta.json"
    copy.write_bytes(metadata.read_bytes())
    config = write_config(tmp_path / "c.toml", settings_of(copy, tmp_path / "run"))
    assert train_here(config, "train.max_steps=2") == 0
    records = json.loads(copy.read_text(encoding="utf-8"))
    records.popitem()
    copy.write_text(json.dumps(records, indent=2), encoding="utf-8")
    with pytest.raises(ResumeError, match=r"data\.0\.metadata fingerprint"):
        train_here(config, resume="latest")
    capsys.readouterr()
    assert train_here(config, "train.max_steps=3", resume="latest", allow_change=True) == 0
    assert "data.0.metadata fingerprint" in capsys.readouterr().err
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2, 3]


def test_latest_needs_a_run_but_no_state(metadata, tmp_path, capsys):
    """--resume latest restarts a run without a saved state, and refuses a folder without a run."""
    config = write_config(
        tmp_path / "c.toml", settings_of(metadata, tmp_path / "run", train={"seed": None})
    )
    with pytest.raises(ResumeError, match="found no run there"):
        train_here(config, resume="latest")
    assert train_here(config, "train.max_steps=1") == 0
    (first,) = metrics_of(tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert train_here(config, "train.max_steps=2", resume="latest") == 0
    assert metrics_of(tmp_path / "run")[0] == first  # with the seed that was drawn then
    assert "no state was saved yet" in capsys.readouterr().err
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [1, 2]


def test_going_on_from_an_older_state_keeps_the_later_ones(metadata, tmp_path):
    """Resuming from an older state trains the same steps again and keeps the later states."""
    out = tmp_path / "run"
    config = write_config(
        tmp_path / "c.toml",
        settings_of(
            metadata, out, train={"max_steps": 3}, checkpoint={"every_steps": 1, "keep": 9}
        ),
    )
    assert train_here(config) == 0
    before, lines = state_of(out, 3), metrics_of(out)
    assert train_here(config, resume=str(out / "checkpoints" / "step-00000002")) == 0
    assert_equal_bits(state_of(out, 3), before)
    assert metrics_of(out) == lines
    assert (out / "checkpoints" / "before-resume-step-00000003" / "state.json").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.bin", "state.json"])
@pytest.mark.parametrize("kept_bytes", [0, 100])
def test_a_damaged_state_is_told(metadata, unbroken, tmp_path, name, kept_bytes):
    """A truncated state is refused in one message, and the files of the run stay as they are."""
    out = shutil.copytree(unbroken, tmp_path / "run")
    broken = out / "checkpoints" / "step-00000008"
    (broken / name).write_bytes((broken / name).read_bytes()[:kept_bytes])
    config = write_config(tmp_path / "c.toml", settings_of(metadata, out, log={"every_steps": 2}))
    before = (out / "config.toml").read_bytes()
    with pytest.raises(ResumeError, match=r"step-00000008: .*(damaged|no complete state)"):
        train_here(config, resume="latest")
    assert (out / "config.toml").read_bytes() == before


def test_a_state_that_tells_nothing_is_none(metadata, unbroken, tmp_path):
    """A state.json with values of the wrong types is refused."""
    state = shutil.copytree(unbroken / "checkpoints" / "step-00000008", tmp_path / "state")
    (state / "state.json").write_text('{"step": "8", "identity": []}')
    config = write_config(tmp_path / "c.toml", settings_of(metadata, tmp_path / "run"))
    with pytest.raises(ResumeError, match="no complete state"):
        train_here(config, resume=str(state))


def test_the_state_of_another_run_goes_into_a_new_folder(metadata, unbroken, tmp_path):
    """A run can begin from another run's state, but not in the folder of a third run."""
    state = str(unbroken / "checkpoints" / "step-00000008")
    config = write_config(
        tmp_path / "c.toml", settings_of(metadata, tmp_path / "run", train={"max_steps": 9})
    )
    assert train_here(config, resume=state) == 0
    assert [line["step"] for line in metrics_of(tmp_path / "run")] == [9]
    with pytest.raises(ConfigError, match=r"the run\.json of an earlier run"):
        train_here(config, resume=state)
