"""A training run of several processes on this machine, as a launcher starts them, for tests.

The processes exchange values with gloo on the CPU. Each has a session of its own, so that its
loader workers end with it, and none is left behind when a test fails.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from builders import preloaded
from builders.runs import ENVIRONMENT

Started = subprocess.Popen[bytes] | preloaded.Process

LONGEST = 120
"""Seconds after which a test gives up waiting for the processes."""
TRAINER = ("-m", "trainer.run")
"""The arguments of Python that run the trainer."""


class Ended(NamedTuple):
    """The end of one rank."""

    code: int
    """Its exit code, negative for a signal that killed it."""
    output: str
    """What it wrote to standard output and standard error, in the order of writing."""


class Ranks:
    """The running processes of a run, by rank."""

    def __init__(self, processes: list[Started], outputs: list[Path]) -> None:
        self._processes, self._outputs = processes, outputs

    def send(self, rank: int, number: int) -> None:
        """Send a signal to the process of one rank, without its loader workers."""
        self._processes[rank].send_signal(number)

    def children(self, rank: int) -> list[int]:
        """The loader workers of one rank."""
        pid = self._processes[rank].pid
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text(encoding="ascii")
        return [int(child) for child in text.split()]

    def wait_until(self, condition, seconds: float = LONGEST) -> None:
        """Wait until `condition()` holds; fail when a process ends before, or after `seconds`."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert all(process.poll() is None for process in self._processes), self.outputs()
            assert time.monotonic() < deadline, self.outputs()
            time.sleep(0.05)

    def wait(self, *ranks: int, seconds: float = LONGEST) -> list[Ended]:
        """The ends of the given ranks, or of all; fail when one still runs after `seconds`."""
        deadline = time.monotonic() + seconds
        wanted = ranks or range(len(self._processes))
        for rank in wanted:
            try:
                self._processes[rank].wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise AssertionError(f"rank {rank} still runs: {self.outputs()}") from None
        outputs = self.outputs()
        return [Ended(self._processes[rank].returncode, outputs[rank]) for rank in wanted]

    def outputs(self) -> list[str]:
        """The output of each rank so far."""
        return [path.read_text(encoding="utf-8", errors="replace") for path in self._outputs]

    def kill(self) -> None:
        """End all processes of all ranks at once."""
        for process in self._processes:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        for process in self._processes:
            process.wait()


@contextmanager
def started(folder: Path, *arguments: object, ranks=2, python=TRAINER, env=None) -> Iterator[Ranks]:
    """The processes of `python -m trainer.run ARGUMENTS`, which end with the context at the latest.

    Their outputs are written to `rank-N.txt` in `folder`. `python` replaces `-m trainer.run` by
    `-c` and a text of Python. `env` has further variables of the environment.
    """
    shared = (
        ENVIRONMENT
        | (env or {})
        | {
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(_free_port()),
        }
    )
    outputs = [folder / f"rank-{rank}.txt" for rank in range(ranks)]
    processes: list[Started] = []
    group = Ranks(processes, outputs)
    try:
        for rank, path in enumerate(outputs):
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with path.open("wb") as output, Path(os.devnull).open("rb") as nothing:
                processes.append(_start(python, arguments, own, nothing, output))
        yield group
    finally:
        group.kill()


def _start(python, arguments, env, stdin, output) -> Started:
    words = list(map(str, arguments))
    if preloaded.can_start("trainer.run", env):
        streams = [stdin.fileno(), output.fileno(), output.fileno()]
        code = None if python == TRAINER else python[1]
        return preloaded.start("trainer.run", words, streams, env=env, new_session=True, code=code)
    return subprocess.Popen(
        [sys.executable, *python, *words],
        env=env,
        stdin=stdin,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def run_ranks(folder: Path, *arguments: object, ranks=2, python=TRAINER, env=None) -> list[Ended]:
    """Train with several processes to the end, and return how each of them ended."""
    with started(folder, *arguments, ranks=ranks, python=python, env=env) as group:
        return group.wait()


def _free_port() -> int:
    """A port of this machine that no process uses at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
