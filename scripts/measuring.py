"""Timing and memory of whole commands, for the benchmarks.

Runs of the compared commands are interleaved, so that noise of the machine reaches all of them.
With `--against PATH`, the code of another checkout of this project, such as that of the previous
commit, runs the same commands in the same rounds:

    git worktree add /tmp/before HEAD~1
    .venv/bin/python scripts/bench_rewrite --against /tmp/before
"""

import argparse
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parent.parent
PYTHON = sys.executable
_Name = TypeVar("_Name", bound=Hashable)


@dataclass(frozen=True)
class Run:
    """One finished command."""

    seconds: float
    cpu_seconds: float
    """CPU time of the command and all processes that it started."""


def run(command: Sequence[str]) -> Run:
    """Run a command, throw its output away, and return what it took."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(
        command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, cwd=ROOT
    )
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def medians(commands: dict[_Name, list[str]], repeats: int) -> dict[_Name, Run]:
    """The median of each command over `repeats` rounds, in which each command runs once."""
    runs: dict[_Name, list[Run]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            runs[name].append(run(command))
    return {
        name: Run(
            statistics.median(r.seconds for r in found),
            statistics.median(r.cpu_seconds for r in found),
        )
        for name, found in runs.items()
    }


def capmerge(*arguments: str, checkout: Path = ROOT) -> list[str]:
    """The command that runs `capmerge` with the code of a checkout. Not for Windows.

    Bytecode is kept even if the environment says otherwise: an installed package has it, and to
    compile the code again in each run takes as long as all of the start besides.
    """
    environment = ("env", "-u", "PYTHONDONTWRITEBYTECODE", f"PYTHONPATH={checkout / 'src'}")
    return [*environment, PYTHON, "-m", "capmerge", *arguments]


def add_against(parser: argparse.ArgumentParser) -> None:
    """Add the option `--against`, whose value `medians_beside` takes; None without it."""
    parser.add_argument(
        "--against",
        type=_checkout,
        metavar="PATH",
        help="another checkout of the project, whose times are printed beside",
    )


def _checkout(text: str) -> Path:
    path = Path(text).resolve()
    if not (path / "src" / "capmerge").is_dir():
        raise argparse.ArgumentTypeError(f"{text}: found no src/capmerge in it")
    return path


def medians_beside(
    commands: Callable[[Path], dict[str, list[str]]], repeats: int, against: Path | None
) -> tuple[dict[str, Run], dict[str, Run]]:
    """The medians of the commands of this checkout, and of those of `against`, by their names.

    `commands` makes them for a checkout. The second dict is empty without `against`; names that it
    lacks were not measured there.
    """
    here = commands(ROOT)
    there = commands(against) if against else {}
    changed = {name: command for name, command in there.items() if command != here.get(name)}
    both = {("here", name): command for name, command in here.items()}
    both |= {("there", name): command for name, command in changed.items()}
    runs = medians(both, repeats)
    return (
        {name: runs["here", name] for name in here},
        {name: runs["there", name] for name in changed},
    )


def peak_pss_mb(command: Sequence[str]) -> tuple[float, float]:
    """The peak memory of a command in MB (10^6 bytes), and its CPU seconds. Linux only.

    Memory is the proportional set size, summed over the command's processes.
    """
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=ROOT)
    peak = 0

    def watch() -> None:
        nonlocal peak
        while process.poll() is None:
            peak = max(peak, sum(_pss_kb(pid) for pid in _family(process.pid)))
            time.sleep(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    process.wait()
    watcher.join()
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, list(command))
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return peak * 1024 / 1e6, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _family(pid: int) -> list[int]:
    """The ids of a process and of all processes below it."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it ended in the meantime
        return []
    return [pid, *(below for child in children for below in _family(int(child)))]


def _pss_kb(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:  # it ended in the meantime
        return 0
    return sum(int(line.split()[1]) for line in lines if line.startswith("Pss:"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
