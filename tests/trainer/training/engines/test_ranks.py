import os
import shutil
import signal
import time

import pytest
import torch
from builders.ranks import TRAINER, run_ranks, started
from builders.runs import (
    LATENTS,
    assert_equal_bits,
    metrics_of,
    rewrite_examples,
    settings_of,
    state_of,
    train_here,
    write_config,
)

from trainer.training.engines.accelerator import problem_of_lost_rank

pytestmark = [pytest.mark.ranks, pytest.mark.slow]

ENDLESS = 100_000
"""More steps than any test trains."""


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The rewritten examples."""
    return rewrite_examples(tmp_path_factory.mktemp("examples"))


@pytest.fixture(scope="module")
def write(metadata):
    """A function that writes the config of a run with a global batch of 4 into a folder.

    The run goes to `run` in the folder, compares its ranks after each step, and saves its state
    after each third one.
    """

    def write(folder, batch_size, accumulation, **train):
        changes = {
            "train": {"batch_size": batch_size, "accumulation": accumulation, **train},
            "checkpoint": {"every_steps": 3, "keep": 9},
            "engine": {"check_ranks_every_steps": 1},
        }
        return write_config(folder / "c.toml", settings_of(metadata, folder / "run", **changes))

    return write


@pytest.fixture(scope="module")
def one_rank(write, tmp_path_factory):
    """The folder of 8 steps on one rank, each of one micro-batch of 4 samples."""
    folder = tmp_path_factory.mktemp("one_rank")
    assert train_here(write(folder, 4, 1)) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def two_ranks(write, tmp_path_factory):
    """The folder of 8 steps on two ranks, each of one micro-batch of 2 samples per rank."""
    folder = tmp_path_factory.mktemp("two_ranks")
    _train_on_two(folder, write(folder, 2, 1))
    return folder / "run"


def _train_on_two(folder, config, *arguments):
    """Train with two ranks, which have to end well."""
    for ended in run_ranks(folder, config, *arguments):
        assert ended.code == 0, ended.output
        assert "Traceback" not in ended.output


def _state(run, step):
    return run / "checkpoints" / f"step-{step:08d}"


def _assert_same_training(found, expected, *, after):
    """Fail unless a run that began after step `after` trained what the other run trained there.

    Weights and losses are the same up to rounding, samples and learning rates exactly.
    """
    start, ends, end = state_of(expected, after or 3), state_of(expected, 8), state_of(found, 8)
    assert end.keys() == ends.keys()
    for name, value in ends.items():
        torch.testing.assert_close(end[name], value, rtol=1e-2, atol=2e-4, msg=name)
        assert not torch.equal(end[name], start[name]), f"{name} did not move"
    for one, other in zip(metrics_of(found), metrics_of(expected)[after:], strict=True):
        assert one["step"] == other["step"]
        assert sorted(one["keys"]) == sorted(other["keys"])
        assert sorted(one["captions"]) == sorted(other["captions"])
        assert one["lr_unet"] == other["lr_unet"]
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-4)
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-2)


def test_two_ranks_train_what_one_rank_trains(one_rank, two_ranks):
    """Two ranks with a batch of 2 train the same as one rank with a batch of 4."""
    _assert_same_training(two_ranks, one_rank, after=0)


def test_two_ranks_train_the_flow_of_one_rank(metadata, tmp_path):
    """A flow with contrast, whose neighbours lie on the other rank too, is that of one rank."""
    changes = {
        "noise": {"prediction": "flow", "timestep_sampling": "logit_normal", "shift": 2.5},
        "loss": {"contrastive": 0.05},
        "checkpoint": {"every_steps": 3, "keep": 9},
        "engine": {"check_ranks_every_steps": 1},
    }
    runs = []
    for batch_size in (4, 2):
        folder = tmp_path / str(batch_size)
        folder.mkdir()
        sections = settings_of(
            metadata, folder / "run", train={"batch_size": batch_size}, **changes
        )
        config = write_config(folder / "c.toml", sections)
        if batch_size == 4:
            assert train_here(config) == 0
        else:
            _train_on_two(folder, config)
        runs.append(folder / "run")
    _assert_same_training(runs[1], runs[0], after=0)


@pytest.mark.parametrize(("batch_size", "accumulation"), [(2, 1), (1, 2)])
def test_a_run_moves_from_one_rank_to_two_and_back(
    write, one_rank, tmp_path, batch_size, accumulation
):
    """A run goes on as it began when it moves to two ranks, and then back to one.

    The state that it moves with is from step 3, so a count of micro-batches that went on over the
    resume would be off on one of the ranks.
    """
    there = write(tmp_path, batch_size, accumulation)
    _train_on_two(tmp_path, there, "--resume", _state(one_rank, 3))
    _assert_same_training(tmp_path / "run", one_rank, after=3)
    back = tmp_path / "back"
    back.mkdir()
    assert train_here(write(back, 4, 1), resume=str(_state(tmp_path / "run", 6))) == 0
    _assert_same_training(back / "run", one_rank, after=6)


def test_a_state_of_two_ranks_goes_on_with_any_split(write, two_ranks, tmp_path):
    """The state of two ranks goes on with one or two ranks and another accumulation."""
    resume = ("--resume", str(_state(two_ranks, 3)))
    for batch_size, accumulation in ((4, 1), (2, 2), (1, 2)):
        folder = tmp_path / str(batch_size)
        folder.mkdir()
        config = write(folder, batch_size, accumulation)
        if batch_size == 1:
            _train_on_two(folder, config, *resume)
        else:
            assert train_here(config, resume=resume[1]) == 0
        _assert_same_training(folder / "run", two_ranks, after=3)


@pytest.mark.parametrize(
    ("rank", "number", "code"),
    [(0, signal.SIGTERM, 143), (1, signal.SIGTERM, 143), (1, signal.SIGINT, 130)],
)
def test_a_signal_to_one_rank_stops_all(write, tmp_path, rank, number, code):
    """A signal to one rank lets all of them stop after the same step, with one exit code.

    The state is saved, and no model is written: it is not trained to the end.
    """
    run = tmp_path / "run"
    with started(tmp_path, write(tmp_path, 2, 1, max_steps=ENDLESS)) as group:
        group.wait_until(lambda: (run / "metrics.jsonl").exists() and metrics_of(run))
        group.send(rank, number)
        ends = group.wait()
    assert [ended.code for ended in ends] == [code, code], ends
    assert all("Traceback" not in ended.output for ended in ends)
    last = metrics_of(run)[-1]["step"]
    assert f"stopped after step {last:,} of 100,000; its state is saved." in ends[0].output
    assert (_state(run, last) / "state.json").exists()
    assert not (run / "model").exists()


PATCHED = """
import os, sys, threading
from datetime import timedelta
import torch
import trainer.training.engines.accelerator as accelerator
import trainer.training.states.due_saves as due_saves
import trainer.training.engines.heartbeat as heartbeat
import trainer.training.metrics as metrics
import trainer.training.signals as signals
import trainer.training.step as step
from accelerate import Accelerator
from trainer.run import main

accelerator.LONGEST_WAIT = timedelta(seconds=15)
heartbeat.INTERVAL_SECONDS = 0.2
signals.LONGEST_WAIT_SECONDS = 2

def fails_at(call, number, error):
    calls = iter(range(1, 1_000_000))
    def called(*arguments, **options):
        if next(calls) == number:
            raise error
        return call(*arguments, **options)
    return called

PATCH
main()
"""
"""The trainer in a process that waits 15 seconds for another one, 4 for its beats, and 2 for data.

`PATCH` stands for more changes to it.
"""


def patched(patch=""):
    """The arguments of Python that run the trainer with a change of its code."""
    return ("-c", PATCHED.replace("PATCH", patch))


@pytest.mark.parametrize(
    ("rank", "number", "python"),
    [
        (0, signal.SIGKILL, TRAINER),
        (1, signal.SIGKILL, TRAINER),
        # The rank keeps its connections, and does not answer.
        (0, signal.SIGSTOP, patched()),
        (1, signal.SIGSTOP, patched()),
    ],
)
def test_a_lost_rank_ends_the_other_with_one_message(write, tmp_path, rank, number, python):
    """When a rank is killed or stopped, the other names the newest state and ends soon."""
    run = tmp_path / "run"
    config = write(tmp_path, 2, 1, max_steps=ENDLESS)
    with started(tmp_path, config, python=python) as group:
        group.wait_until((_state(run, 3) / "state.json").exists)
        group.send(rank, number)
        (ended,) = group.wait(1 - rank, seconds=60)
    assert ended.code == 1, ended.output
    assert "Traceback" not in ended.output
    newest = max(run.glob("checkpoints/step-*"))
    (message,) = [line for line in ended.output.splitlines() if "--resume" in line]
    assert message.startswith(f"rank {1 - rank}: lost another process of the run (")
    if number == signal.SIGSTOP:
        assert "has not answered for 4 seconds)" in message
    assert f"the newest saved state is {newest}." in message
    assert not (run / "model").exists()


BUSY = """
def busy(*arguments, **options):
    # The bytecode of a loop, then a call that waits in C, each for longer than the limit.
    end = heartbeat.time.monotonic() + 5
    while heartbeat.time.monotonic() < end:
        pass
    heartbeat.time.sleep(5)
    return save_state(*arguments, **options)

save_state = due_saves.save_state
accelerator.LONGEST_WAIT = timedelta(seconds=60)
if os.environ["RANK"] == "1":
    due_saves.save_state = busy
"""


def test_a_rank_that_works_for_long_is_not_lost(write, tmp_path):
    """A rank whose main thread computes or waits for longer than the limit beats on."""
    config = write(tmp_path, 2, 1, max_steps=2)
    with started(tmp_path, config, python=patched(BUSY)) as group:
        assert [ended.code for ended in group.wait()] == [0, 0], group.outputs()


def test_a_broken_file_of_one_rank_saves_with_all(metadata, two_ranks, tmp_path):
    """A broken latents file ends both ranks with its message, and costs no step.

    Once the file is mended, the run goes on to the weights of a run that was never interrupted.
    """
    latents, run = tmp_path / "latents", tmp_path / "run"
    shutil.copytree(LATENTS, latents)
    *_, key = metrics_of(two_ranks)[4]["keys"]
    path = next(latents.glob(f"{key.rpartition('.')[0] or key}*.npz"))
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    changes = {"data": {"latents": str(latents)}, "train": {"workers": 1}}
    config = write_config(tmp_path / "c.toml", settings_of(metadata, run, **changes))
    ends = run_ranks(tmp_path, config)
    assert [ended.code for ended in ends] == [1, 1], ends
    output = "".join(ended.output for ended in ends)
    assert "Traceback" not in output
    assert [path.name in ended.output for ended in ends] == [False, True]
    assert output.count("An error of rank 1 ends all 2 processes of the run.") == 1
    said = "The run ends after step 4 of 8: the state after step 4 is saved. Continue with"
    assert output.count(said) == 1
    path.write_bytes(whole)
    _train_on_two(tmp_path, config, "--resume", "latest")
    assert_equal_bits(state_of(run, 8), state_of(two_ranks, 8))


FORWARD = """
if os.environ["RANK"] == "1":
    error = torch.OutOfMemoryError("no memory at all")
    step.batch_loss = fails_at(step.batch_loss, 5, error)
"""
LOGGING = """
if os.environ["RANK"] == "0":
    error = ConnectionError("the tracker is gone")
    metrics.MetricsFile.write = fails_at(metrics.MetricsFile.write, 2, error)
"""


@pytest.mark.parametrize(
    ("patch", "rank", "error", "saved"),
    [
        (FORWARD, 1, "OutOfMemoryError: no memory at all", 2),
        (LOGGING, 0, "ConnectionError: the tracker is gone", 2),
    ],
)
def test_an_error_of_one_rank_saves_with_all(write, tmp_path, patch, rank, error, saved):
    """A rank without memory, or whose tracker fails, lets all ranks save before they end."""
    with started(tmp_path, write(tmp_path, 1, 2), python=patched(patch)) as group:
        ends = group.wait()
    assert [ended.code for ended in ends] == [1, 1], ends
    assert [error in ended.output for ended in ends] == [rank == 0, rank == 1], ends
    assert (_state(tmp_path / "run", saved) / "state.json").exists()
    assert f"the state after step {saved} is saved" in ends[0].output


BACKWARD = """
if os.environ["RANK"] == "RANK_THAT_FAILS":
    Accelerator.backward = fails_at(Accelerator.backward, 5, OSError("a device is gone"))
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_that_no_rank_can_share_is_named(write, tmp_path, rank):
    """When a rank fails in the exchange of gradients itself, the other tells its error."""
    patch = BACKWARD.replace("RANK_THAT_FAILS", str(rank))
    with started(tmp_path, write(tmp_path, 2, 1), python=patched(patch)) as group:
        ends = group.wait()
    assert [ended.code for ended in ends] == [1, 1], ends
    (message,) = [line for line in ends[1 - rank].output.splitlines() if "--resume" in line]
    assert f"rank {rank} ended: OSError: a device is gone" in message
    assert f"the newest saved state is {_state(tmp_path / 'run', 3)}." in message


def _wait_until_still(path):
    """Wait until a file has not grown for two seconds."""
    size = -1
    while size != (size := path.stat().st_size):
        time.sleep(2)


def test_a_signal_stops_ranks_whose_data_hang(write, tmp_path):
    """SIGTERM while the loader of one rank hangs: all save the last whole step, and exit alike.

    What hangs is the batch of the next step, which is fetched ahead, so nobody misses it.
    """
    run = tmp_path / "run"
    config = write(tmp_path, 2, 1, max_steps=ENDLESS, workers=1)
    with started(tmp_path, config, python=patched()) as group:
        group.wait_until(lambda: (run / "metrics.jsonl").exists() and metrics_of(run))
        for child in group.children(1):
            os.kill(child, signal.SIGSTOP)
        _wait_until_still(run / "metrics.jsonl")
        group.send(1, signal.SIGTERM)
        ends = group.wait()
    assert [ended.code for ended in ends] == [143, 143], ends
    assert all("Traceback" not in ended.output for ended in ends)
    last = metrics_of(run)[-1]["step"]
    assert f"stopped after step {last:,} of 100,000; its state is saved." in ends[0].output


def test_a_rank_that_never_starts_is_told(write, tmp_path):
    """A process that waits in vain for the others says where, and for how many."""
    patch = "accelerator.LONGEST_WAIT = timedelta(seconds=3)"
    with started(tmp_path, write(tmp_path, 2, 1), python=patched(patch)) as group:
        group.send(1, signal.SIGKILL)
        (ended,) = group.wait(0)
    assert ended.code == 1, ended.output
    assert "Traceback" not in ended.output
    assert "rank 0: found no way to meet the other processes at 127.0.0.1:" in ended.output
    assert "expected all 2 of them" in ended.output


def test_only_a_lost_process_counts_as_lost():
    """Other errors of torch, of files and of the network keep their own messages."""
    closed = "[/src/gloo/pair.cc:553] Connection closed by peer [127.0.0.1]:3718. This is typical."
    found = problem_of_lost_rank(RuntimeError(closed))
    assert found.endswith("of the run (Connection closed by peer [127.0.0.1]:3718)")
    wrapped = ValueError("the saved state is damaged")
    wrapped.__cause__ = RuntimeError(closed)
    assert problem_of_lost_rank(wrapped) == found
    for other in (RuntimeError("CUDA out of memory"), BrokenPipeError("broken pipe")):
        assert problem_of_lost_rank(other) == ""
