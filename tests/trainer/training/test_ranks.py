import signal

import pytest
import torch
from builders.ranks import TRAINER, run_ranks, started
from builders.runs import (
    metrics_of,
    rewrite_examples,
    settings_of,
    state_of,
    train_here,
    write_config,
)

from trainer.training.accelerator import problem_of_lost_rank

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

    The run goes to `run` in the folder and saves its state after each third step.
    """

    def write(folder, batch_size, accumulation, **train):
        changes = {
            "train": {"batch_size": batch_size, "accumulation": accumulation, **train},
            "checkpoint": {"every_steps": 3, "keep": 9},
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
    """The state of two ranks goes on with one rank and either accumulation."""
    for batch_size, accumulation in ((4, 1), (2, 2)):
        folder = tmp_path / str(batch_size)
        folder.mkdir()
        config = write(folder, batch_size, accumulation)
        assert train_here(config, resume=str(_state(two_ranks, 3))) == 0
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


SHORT_WAIT = (
    "-c",
    """
from datetime import timedelta
import trainer.training.accelerator as accelerator
from trainer.run import main
accelerator.LONGEST_WAIT = timedelta(seconds=15)
main()
""",
)
"""The arguments of Python that run the trainer, which waits 15 seconds for another process."""


@pytest.mark.parametrize(
    ("rank", "number", "python"),
    [
        (0, signal.SIGKILL, TRAINER),
        (1, signal.SIGKILL, TRAINER),
        # Rank 1 hangs: it keeps its connections, and does not answer.
        (1, signal.SIGSTOP, SHORT_WAIT),
    ],
)
def test_a_lost_rank_ends_the_other_with_one_message(write, tmp_path, rank, number, python):
    """When a rank is killed or hangs, the other names the newest state and ends within a minute."""
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
    assert f"the newest saved state is {newest}." in message
    assert not (run / "model").exists()


def test_a_rank_that_never_starts_is_told(write, tmp_path):
    """A process that waits in vain for the others says where, and for how many."""
    with started(tmp_path, write(tmp_path, 2, 1), python=SHORT_WAIT) as group:
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
