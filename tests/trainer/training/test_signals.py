import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from builders.runs import (
    ENVIRONMENT,
    command,
    metrics_of,
    rewrite_examples,
    settings_of,
    write_config,
)

from trainer.errors import BatchTimeoutError
from trainer.training import signals
from trainer.training.signals import Interrupts, exit_code

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such signals")

SHORT_WAIT = """
import trainer.training.signals
trainer.training.signals.LONGEST_WAIT_SECONDS = 2
from trainer.run import main
main()
"""


@pytest.fixture(scope="module")
def metadata(tmp_path_factory):
    """The rewritten examples."""
    return rewrite_examples(tmp_path_factory.mktemp("examples"))


def wait_for_steps(output_dir):
    """Wait until the run in a folder has trained a step."""
    end = time.monotonic() + 120
    while not ((output_dir / "metrics.jsonl").exists() and metrics_of(output_dir)):
        assert time.monotonic() < end
        time.sleep(0.05)


def assert_saved_at_the_end(output_dir):
    """Fail unless the state after the last logged step is saved."""
    last = metrics_of(output_dir)[-1]["step"]
    assert (output_dir / "checkpoints" / f"step-{last:08d}" / "state.json").exists()


def test_a_dropped_terminal_saves_and_exits(metadata, tmp_path):
    """A run whose terminal is gone, as after a dropped ssh, saves its state and exits with 129."""
    out = tmp_path / "run"
    config = write_config(
        tmp_path / "c.toml", settings_of(metadata, out, train={"max_steps": 100000, "workers": 1})
    )
    process, terminal = pty.fork()
    if process == 0:
        os.execve(sys.executable, command(config), ENVIRONMENT)
    wait_for_steps(out)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 129
    assert_saved_at_the_end(out)


def test_under_nohup_sighup_stays_ignored():
    """SIGHUP is noted with code 129, and left alone where it was ignored before."""
    with Interrupts() as noted:
        os.kill(os.getpid(), signal.SIGHUP)
    assert exit_code(noted.signal_number) == 129
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupts() as ignored:
            os.kill(os.getpid(), signal.SIGHUP)
        assert exit_code(ignored.signal_number) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_wait_ends_soon_after_a_signal(monkeypatch):
    """A wait is bounded from the signal on, whether it comes before the wait or during it."""
    monkeypatch.setattr(signals, "LONGEST_WAIT_SECONDS", 1)

    def hang():
        yield 1
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)

    with Interrupts() as interrupts:
        items = interrupts.bounded(hang())
        assert next(items) == 1
        start = time.monotonic()
        with pytest.raises(BatchTimeoutError):
            next(items)
        assert time.monotonic() - start < 20
        with pytest.raises(BatchTimeoutError):
            next(interrupts.bounded(time.sleep(60) for _ in "a"))
        assert list(interrupts.bounded(iter("ab"))) == ["a", "b"]
        # Outside of a wait nothing is cut short, however long a step takes.
        time.sleep(1.5)


def test_a_worker_that_hangs_does_not_keep_a_run_from_stopping(metadata, tmp_path):
    """SIGTERM while a worker hangs: the state is saved after a bounded wait, and the run exits."""
    out = tmp_path / "run"
    config = write_config(
        tmp_path / "c.toml", settings_of(metadata, out, train={"max_steps": 100000, "workers": 1})
    )
    with subprocess.Popen(
        [sys.executable, "-c", SHORT_WAIT, str(config)],
        env=ENVIRONMENT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        wait_for_steps(out)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for child in children:
            os.kill(int(child), signal.SIGSTOP)
        time.sleep(1)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=100)
    assert children
    assert process.returncode == 143, errors
    assert "Traceback" not in errors
    assert "found no batch within 2 seconds of a signal to stop" in errors
    assert "its state is saved. Continue with --resume latest." in errors
    assert_saved_at_the_end(out)
