import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
from contextlib import nullcontext
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from builders.runs import (
    LATENTS,
    ROOT,
    assert_equal_bits,
    metrics_of,
    rewrite_examples,
    run,
    settings_of,
    state_of,
    train_here,
    write_config,
)
from safetensors.torch import load_file

from trainer.config.load import load_config
from trainer.data.datasets import open_datasets
from trainer.errors import ConfigError, LatentsError, NonFiniteError, ResumeError
from trainer.model.build import build_model
from trainer.training.dry_run import show
from trainer.training.loss import batch_loss
from trainer.training.run_log import RunLog


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The rewritten examples."""
    return rewrite_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture
def config(metadata, tmp_path):
    """A function that writes a small config into the test's folder; its run is in `run` there."""

    def write(**changes):
        return write_config(
            tmp_path / "config.toml", settings_of(metadata, tmp_path / "run", **changes)
        )

    return write


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_an_example_of_each_family_trains_from_end_to_end(family, metadata, tmp_path):
    """Each example config trains 20 steps with falling losses to a model that can be loaded."""
    out = tmp_path / "run"
    example = ROOT / "examples" / f"tiny_{family}.toml"
    done = run(
        example, "--set", f"data.metadata={metadata}", "--set", f"train.output_dir={out}", cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    lines = metrics_of(out)
    assert [line["step"] for line in lines] == list(range(1, 21))
    assert sum(line["loss"] for line in lines[-5:]) < sum(line["loss"] for line in lines[:5])
    assert (out / "loss.png").stat().st_size > 10_000
    trained = load_config(out / "config.toml")
    trained = trained.model_copy(
        update={"model": trained.model.model_copy(update={"path": str(out / "model")})}
    )
    assert {path.stat().st_mode & 0o044 for path in (out / "model").rglob("*.safetensors")} == {
        out.stat().st_mode & 0o044
    }
    saved = dict(build_model(trained).state_dict())
    state = state_of(out, 20)
    assert all(torch.equal(saved[name], state[name]) for name in saved)


def test_loss_falls_on_64_records(tmp_path_factory, tmp_path):
    """The loss falls when 64 records are trained again and again."""
    few = rewrite_examples(tmp_path_factory.mktemp("few"), n_records=64)
    train = {"max_steps": 80, "batch_size": 8}
    config = write_config(
        tmp_path / "c.toml",
        settings_of(few, tmp_path / "run", train=train, optimizer={"learning_rate": 3e-3}),
    )
    assert train_here(config) == 0
    losses = [line["loss"] for line in metrics_of(tmp_path / "run")]
    assert sum(losses[-8:]) < 0.7 * sum(losses[:8])


def test_accumulation_is_a_larger_batch(config, tmp_path):
    """2 micro-batches of 1 train the samples and weights of 1 micro-batch of 2, up to rounding."""
    assert train_here(config(train={"batch_size": 2, "accumulation": 1})) == 0
    whole = tmp_path / "run"
    whole = whole.rename(tmp_path / "whole")
    assert train_here(config(train={"batch_size": 1, "accumulation": 2})) == 0
    for one, two in zip(metrics_of(whole), metrics_of(tmp_path / "run"), strict=True):
        assert one["keys"] == two["keys"]
        assert one["captions"] == two["captions"]
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-4)
    one, two = state_of(whole, 8), state_of(tmp_path / "run", 8)
    for name, value in one.items():
        torch.testing.assert_close(value, two[name], rtol=1e-2, atol=2e-4, msg=name)


def test_only_the_newest_states_are_kept(config, tmp_path):
    """With a state saved per step, only the newest `checkpoint.keep` remain."""
    assert train_here(config(train={"max_steps": 5}, checkpoint={"every_steps": 1, "keep": 2})) == 0
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step-00000004",
        "step-00000005",
    ]


def test_states_are_saved_by_epochs_and_by_the_clock(config, tmp_path):
    """`every_epochs` saves at the ends of epochs, `every_minutes` after that much time."""
    assert (
        train_here(
            config(
                train={"max_steps": None, "max_epochs": 2, "batch_size": 64},
                checkpoint={"every_epochs": 1, "keep": 9},
            )
        )
        == 0
    )
    steps = len(metrics_of(tmp_path / "run"))
    found = sorted(int(path.name[5:]) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert found == [steps // 2, steps]
    shutil.rmtree(tmp_path / "run")
    assert (
        train_here(config(train={"max_steps": 3}, checkpoint={"every_minutes": 1e-6, "keep": 9}))
        == 0
    )
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize(("minutes", "saves"), [(None, [3, 6, 8]), (0, [8])])
def test_the_default_saves_every_half_hour(config, monkeypatch, minutes, saves):
    """With default settings a state is saved every 30 minutes; 0 leaves only the one at the end."""
    ten_minutes = count(step=600)
    clock = SimpleNamespace(monotonic=lambda: next(ten_minutes))
    monkeypatch.setattr("trainer.training.states.due_saves.time", clock)
    saved = []

    def save(_, folder, step, *_rest, **_keep):
        saved.append(step)
        return folder, ""

    monkeypatch.setattr("trainer.training.states.due_saves.save_state", save)
    assert train_here(config(checkpoint={"every_minutes": minutes})) == 0
    assert saved == saves


# Bytes of a file: 300 kB are enough for metrics and plans, not for the weights, and 6 MB are enough
# for the weights, not for the optimizer's state.
@pytest.mark.parametrize(("limit", "code"), [(300_000, 1), (6_000_000, 0)])
def test_a_full_disk_is_said_and_the_run_goes_on(config, tmp_path, limit, code):
    """A state that cannot be written leaves nothing behind; the run continues with a warning.

    The warning comes once, and a count at the end.
    """
    done = run(
        config(train={"max_steps": 3}, checkpoint={"every_steps": 1}),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert "WARNING: the state after step 1 could not be saved" in done.stderr
    assert "unexpected pos" not in done.stderr
    assert done.stderr.count("could not be saved") == 2
    assert "WARNING: 3 states could not be saved in this run." in done.stderr
    assert "Traceback" not in done.stderr
    assert len(metrics_of(tmp_path / "run")) == 3
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []
    assert done.returncode == code  # 1: the model itself could not be written


@pytest.mark.parametrize("asked", ["skip", "stop"])
def test_a_gradient_that_is_no_number(config, tmp_path, asked):
    """A step with such a gradient is skipped and marked, or stops the run with the state before."""
    written = config(
        optimizer={"name": "SGD", "learning_rate": 1e30, "text_learning_rate": None},
        train={"on_nonfinite": asked},
    )
    if asked == "skip":
        assert train_here(written) == 0
        assert [line.get("skipped", False) for line in metrics_of(tmp_path / "run")] == [False] + [
            True
        ] * 7
    else:
        with pytest.raises(NonFiniteError, match=r"step 2: .*The state after step 1 is saved"):
            train_here(written)
        assert (tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json").exists()


def test_spoilt_weights_stop_the_run_and_leave_the_states_before(config, tmp_path, capsys):
    """Too many skipped steps in a row end the run, and do not push out the state before them."""
    optimizer = {"name": "SGD", "learning_rate": 1e30, "text_learning_rate": None}
    with pytest.raises(
        NonFiniteError, match=r"step 21: found no finite gradient in 20 steps in a row"
    ):
        train_here(
            config(
                optimizer=optimizer,
                train={"max_steps": 40, "batch_size": 1},
                checkpoint={"every_steps": 1, "keep": 1},
            )
        )
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]
    warning = "WARNING: step 2 was skipped: its gradient norm is nan."
    assert capsys.readouterr().err.count(warning) == 1


def test_a_spoilt_model_is_not_written(config, tmp_path):
    """Weights that are not finite end the run without a model, and all states are kept."""
    optimizer = {"name": "SGD", "learning_rate": 1e38, "text_learning_rate": None}
    written = config(
        optimizer=optimizer, train={"max_steps": 3}, checkpoint={"every_steps": 1, "keep": 1}
    )
    with pytest.raises(NonFiniteError, match=r"step 3: the weights are not finite"):
        train_here(written, "optimizer.arguments.weight_decay=1000.0")
    assert not (tmp_path / "run" / "model").exists()
    assert (tmp_path / "run" / "checkpoints" / "step-00000001" / "state.json").exists()


def test_a_file_that_vanished_is_replaced_or_stops_the_run(metadata, tmp_path):
    """`on_missing = "skip"` trains the next record of the bucket, "stop" names the file."""
    latents = tmp_path / "latents"
    shutil.copytree(LATENTS, latents)
    data = {"latents": str(latents)}
    sections = settings_of(
        metadata,
        tmp_path / "first",
        data=data,
        train={"max_steps": None, "max_epochs": 1, "batch_size": 8},
    )
    config = write_config(tmp_path / "c.toml", sections)
    assert train_here(config, "train.max_steps=1") == 0
    gone = next(latents.rglob("danbooru/1003817*.npz"))
    gone.write_bytes(gone.read_bytes()[:100])
    with pytest.raises(LatentsError, match=gone.name):
        train_here(config, f"train.output_dir={tmp_path / 'stopped'}")
    assert (
        train_here(config, "data.on_missing=skip", f"train.output_dir={tmp_path / 'skipped'}") == 0
    )
    lines = metrics_of(tmp_path / "skipped")
    assert sum(line.get("replaced", 0) for line in lines) == 1
    assert "danbooru/1003817" not in [key for line in lines for key in line["keys"]]


def break_after(steps, broken, settings, folder):
    """Break the latents that step `steps` + 1 needs, but none of the steps before.

    `settings` are those of a run over all latents with batches of one; the latents are copied to
    `folder`, and `broken` is called with the path of the file.
    """
    shutil.copytree(LATENTS, folder)
    output_dir = folder.parent / "whole"
    sections = settings | {"train": settings["train"] | {"output_dir": str(output_dir)}}
    assert train_here(write_config(folder.parent / "whole.toml", sections)) == 0
    (key,) = metrics_of(output_dir)[steps]["keys"]
    broken(next(folder.glob(f"{key.rpartition('.')[0] or key}*.npz")))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_file_ends_the_run_with_its_state_saved(metadata, tmp_path, capsys, workers):
    """A broken latents file under `on_missing = "stop"` costs no step: the state is saved first.

    Once the file is mended, the run goes on to the weights of a run that was never interrupted.
    """
    latents = tmp_path / "latents"
    settings = settings_of(
        metadata,
        tmp_path / "run",
        data={"latents": str(latents)},
        train={"max_steps": 4, "batch_size": 1, "workers": workers},
    )
    whole = []

    def cut(path):
        whole.append((path, path.read_bytes()))
        path.write_bytes(path.read_bytes()[:100])

    break_after(2, cut, settings, latents)
    config = write_config(tmp_path / "c.toml", settings)
    with pytest.raises(LatentsError):
        train_here(config)
    said = "The run ends after step 2 of 4: the state after step 2 is saved. Continue with --resume"
    assert capsys.readouterr().err.count(said) == 1
    for path, data in whole:
        path.write_bytes(data)
    assert train_here(config, resume="latest") == 0
    assert_equal_bits(state_of(tmp_path / "run", 4), state_of(tmp_path / "whole", 4))


@pytest.mark.parametrize("fails", [False, True])
def test_a_worker_that_hangs_keeps_no_run_from_ending(config, monkeypatch, fails):
    """A worker that hangs when the last batch is out, or at an error, is not waited for."""
    log_step = RunLog.log_step

    def hang(log, step, result):
        log_step(log, step, result)
        for worker in multiprocessing.active_children():
            os.kill(worker.pid, signal.SIGSTOP)
        if fails:
            raise ConnectionError("the tracker is gone")

    monkeypatch.setattr(RunLog, "log_step", hang)
    with pytest.raises(ConnectionError) if fails else nullcontext():
        assert train_here(config(train={"max_steps": 1, "workers": 1})) == 0
    assert multiprocessing.active_children() == []


def test_an_error_before_the_first_step_saves_nothing(metadata, tmp_path):
    """Weights that are still those of `model.path` are not worth a state."""
    latents = tmp_path / "latents"
    shutil.copytree(LATENTS, latents)
    settings = settings_of(metadata, tmp_path / "run", data={"latents": str(latents)})
    for path in latents.rglob("*.npz"):
        path.write_bytes(b"")
    with pytest.raises(LatentsError):
        train_here(write_config(tmp_path / "c.toml", settings))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_error_of_the_device_ends_the_run_with_its_state_saved(config, tmp_path, monkeypatch):
    """Memory that runs out in the middle of a step saves the state before the step."""
    steps = 0

    def fail(*arguments):
        nonlocal steps
        steps += 1
        if steps == 3:
            raise torch.OutOfMemoryError("no memory")
        return batch_loss(*arguments)

    monkeypatch.setattr("trainer.training.step.batch_loss", fail)
    with pytest.raises(torch.OutOfMemoryError):
        train_here(config())
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000002"]


def test_a_save_that_fails_is_told_and_hides_no_error(config, monkeypatch, capsys):
    """If the save before the end fails too, its reason is told, and the first error is raised."""

    def fail(*_, **__):
        raise TypeError("a bug of the save")

    def out_of_memory(*arguments):
        if counted.steps == 2:
            raise torch.OutOfMemoryError("no memory")
        counted.steps += 1
        return batch_loss(*arguments)

    counted = SimpleNamespace(steps=0)
    monkeypatch.setattr("trainer.training.step.batch_loss", out_of_memory)
    monkeypatch.setattr("trainer.training.states.due_saves.save_state", fail)
    with pytest.raises(torch.OutOfMemoryError):
        train_here(config())
    told = capsys.readouterr().err
    assert "step 2 could not be saved: TypeError: a bug of the save" in told
    assert "The run ends after step 2 of 8: there is no saved state yet." in told


def test_weights_that_are_half_stepped_are_not_saved(config, tmp_path, monkeypatch, capsys):
    """An error while the optimizer steps leaves the older states as they are."""

    def fail(*_):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("trainer.training.engines.torch_step.guarded_step", fail)
    with pytest.raises(torch.OutOfMemoryError):
        train_here(config())
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert "The run ends after step 0 of 8: there is no saved state yet." in capsys.readouterr().err


def test_too_many_replaced_samples_stop_the_run(metadata, tmp_path):
    """More than 1% of an epoch without usable latents stops the run, with its state saved."""
    latents = tmp_path / "latents"
    shutil.copytree(LATENTS, latents)
    sections = settings_of(
        metadata,
        tmp_path / "run",
        data={"latents": str(latents), "on_missing": "skip"},
        train={"max_steps": 60, "batch_size": 4},
    )
    config = write_config(tmp_path / "c.toml", sections)
    open_datasets(load_config(config))  # lists the files, which are broken afterwards
    for path in list(latents.rglob("danbooru/*.npz"))[:20]:
        path.write_bytes(b"")
    with pytest.raises(LatentsError, match=r"expected at most 1% of 213"):
        train_here(config)
    assert list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_run_is_never_written_over(config, tmp_path):
    """A folder that holds a run is refused without --resume, and left as it is."""
    written = config(train={"max_steps": 1})
    assert train_here(written) == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")}
    with pytest.raises(ConfigError, match="--resume latest"):
        train_here(written)
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*")} == before


@pytest.mark.parametrize(
    "name", ["config.toml", "metrics.jsonl", "run.json", "loss.png", "model/unet/a.bin"]
)
def test_files_of_others_are_never_written_over(config, tmp_path, name):
    """Files of a run's names that no run wrote are refused by name, and left as they are."""
    mine = tmp_path / "run" / name
    mine.parent.mkdir(parents=True)
    mine.write_text('{"step": 99}\nmine\n')
    with pytest.raises(ConfigError, match=rf"holds {name.split('/')[0]}, and no run\.json of a"):
        train_here(config())
    with pytest.raises(ResumeError, match=r"found no run there"):
        train_here(config(), resume="latest")
    assert mine.read_text() == '{"step": 99}\nmine\n'
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_file()] == [mine]


def test_a_config_that_the_user_put_into_a_run_is_kept(config, tmp_path):
    """A config.toml that was put into the folder of a run is kept under another name."""
    written = config(train={"max_steps": 1})
    assert train_here(written) == 0
    (tmp_path / "run" / "config.toml").write_text("# mine\n")
    assert train_here(written, "train.max_steps=2", resume="latest") == 0
    assert (tmp_path / "run" / "config.1.toml").read_text() == "# mine\n"


def test_the_folder_tells_how_it_was_made(config, tmp_path):
    """The folder holds the resolved config with the drawn seed, versions and fingerprints."""
    assert train_here(config(train={"seed": None, "max_steps": 1})) == 0
    again = load_config(tmp_path / "run" / "config.toml", [])
    assert again.train.seed is not None
    told = json.loads((tmp_path / "run" / "run.json").read_text(encoding="utf-8"))
    assert told["versions"]["torch"] == torch.__version__
    assert told["identity"]["train.seed"] == again.train.seed
    assert len(told["identity"]["data.0.metadata fingerprint"]) >= 16


def test_full_bf16_warns_and_tells_what_moved(config, capsys):
    """A run with bf16 weights tells how it rounds them, and once what share of them moved.

    It warns where it rounds them to the nearest number.
    """
    written = config(train={"max_steps": 2, "batch_size": 1, "precision": "full_bf16"})
    for chance, told_once in (
        ("true", "are rounded up or down by chance (optimizer.stochastic_rounding)"),
        ("false", 'WARNING: train.precision = "full_bf16"'),
    ):
        folder = f"train.output_dir={written.parent / chance}"
        assert train_here(written, folder, f"optimizer.stochastic_rounding={chance}") == 0
        told = capsys.readouterr().err
        assert told.count(told_once) == 1
        assert ("WARNING" in told) == (chance == "false")
    assert len(re.findall(r"[0-9.]+% of the weights moved up to step 2\b", told)) == 1
    assert (
        train_here(
            written, "train.precision=bf16", "train.output_dir=" + str(written.parent / "other")
        )
        == 0
    )
    assert "weights moved" not in capsys.readouterr().err


def test_a_compiled_model_is_saved_under_its_own_names(config, tmp_path, monkeypatch):
    """With torch.compile asked for by the environment, state and model hold the same tensors."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "EAGER")
    written = config(train={"max_steps": 1, "batch_size": 1}, optimizer={"text_learning_rate": 0})
    assert train_here(written) == 0
    state = state_of(tmp_path / "run", 1)
    saved = load_file(tmp_path / "run/model/unet/diffusion_pytorch_model.safetensors")
    assert saved
    assert all(torch.equal(state[f"unet.{name}"], tensor) for name, tensor in saved.items())
    assert train_here(written, "train.max_steps=2", resume="latest") == 0


def test_dry_run_shows_what_will_train(config, tmp_path):
    """--dry-run prints a config that loads, numbers and the first samples, and writes no run."""
    written = config(train={"batch_size": 4, "max_steps": 2})
    shown = run(written, "--dry-run")
    assert shown.returncode == 0, shown.stderr
    assert not (tmp_path / "run").exists()
    (tmp_path / "shown.toml").write_text(shown.stdout.partition("\n# records")[0], encoding="utf-8")
    assert load_config(tmp_path / "shown.toml", []) == load_config(written, [])
    assert "# global batch: 4 = 4 x 1 (accumulation) x 1 (ranks)" in shown.stdout
    assert "unet: " in shown.stdout
    assert train_here(written) == 0
    captions = [caption for line in metrics_of(tmp_path / "run") for caption in line["captions"]]
    described = shown.stdout.split("\n# sample ")[1:]
    assert [sample.splitlines()[1] for sample in described] == captions


@pytest.mark.parametrize(
    ("optimizer", "named"),
    [
        ({"name": "AdamWW"}, "optimizer.name: unknown optimizer `AdamWW`"),
        ({"arguments": "{weight_decy = 1}"}, "optimizer.arguments: unknown argument `weight_decy`"),
        ({"arguments": "{weight_decay = nan}"}, "optimizer.arguments: `weight_decay` is nan"),
        ({"arguments": "{weight_decay = 'abc'}"}, "AdamW .*cannot train here"),
        ({"arguments": "{betas = [0.9]}"}, "AdamW .*cannot train here"),
        (
            {"schedule": "polynomial", "schedule_arguments": "{lr_end = 1}"},
            "optimizer.schedule: polynomial cannot move a rate",
        ),
    ],
)
def test_dry_run_knows_the_optimizer(config, optimizer, named):
    """--dry-run raises the errors that the run would raise about optimizer and schedule."""
    with pytest.raises(ConfigError, match=named):
        show(
            load_config(config(), [f"optimizer.{key}={value}" for key, value in optimizer.items()])
        )


def test_dry_run_knows_the_engine(config, capsys, monkeypatch):
    """--dry-run names the engine and what is not installed, and refuses what cannot be divided."""
    engine = ["engine.kind=deepspeed", "engine.offload_optimizer_device=cpu"]
    monkeypatch.setattr("trainer.training.dry_run.find_spec", lambda _: None)
    show(load_config(config(), engine), ranks=4)
    shown = capsys.readouterr().out
    assert "\n# engine: DeepSpeed ZeRO-2, optimizer in cpu on 4 ranks\n" in shown
    assert "\n# deepspeed is not installed here; the machine that trains needs it.\n" in shown
    with pytest.raises(ConfigError, match=r"optimizer\.name = Adafactor: it looks at whole"):
        show(load_config(config(), [*engine, "optimizer.name=Adafactor"]))
    show(load_config(config(), []))
    shown = capsys.readouterr().out
    assert "\n# engine: one device\n" in shown
    assert "is not installed here" not in shown


def test_a_mistake_in_the_config_shows_no_traceback(config):
    """A mistake in the config ends with exit code 2 and one line."""
    done = run(config(train={"max_stepz": 4}))
    assert done.returncode == 2
    assert "Did you mean `max_steps`?" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="there are no such locks")
def test_two_runs_do_not_share_a_folder(config, tmp_path):
    """While a run uses a folder, another one in it is refused, also with --resume."""
    written = config(train={"max_steps": 1})
    assert train_here(written) == 0
    lock = str(tmp_path / "run" / ".lock")
    holding = (
        f"import fcntl; f = open({lock!r}, 'ab'); fcntl.lockf(f, fcntl.LOCK_EX); "
        "print(flush=True); input()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", holding], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        other.stdout.readline()
        with pytest.raises(ConfigError, match="in use by another run"):
            train_here(written, "train.max_steps=2", resume="latest")
        other.communicate(b"\n")
    assert train_here(written, "train.max_steps=2", resume="latest") == 0


def test_a_folder_that_cannot_be_made_is_told(config, tmp_path):
    """An output folder below a file is a mistake of the settings."""
    (tmp_path / "run").write_text("a file")
    for folder in ("run", "run/below"):
        with pytest.raises(ConfigError, match=r"train\.output_dir: .* cannot be written \("):
            train_here(config(train={"output_dir": str(tmp_path / folder)}))
