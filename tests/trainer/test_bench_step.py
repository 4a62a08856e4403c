"""`scripts/bench_step` runs on any machine, in one call, and measures what a run would do."""

import re
import subprocess
import sys

from builders.paths import ROOT
from builders.runs import ENVIRONMENT

OPTIONAL = (
    "bitsandbytes",
    "deepspeed",
    "matplotlib",
    "pytorch_optimizer",
    "tensorboard",
    "wandb",
    "xformers",
)
"""Packages that a machine which measures need not have."""
BENCH = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({OPTIONAL!r}))  # an import of them fails
sys.argv = ["bench_step", *sys.argv[1:]]
sys.path.insert(0, {str(ROOT / "scripts")!r})
runpy.run_path({str(ROOT / "scripts" / "bench_step")!r}, run_name="__main__")
"""


def bench(folder, *arguments):
    """What the script prints."""
    done = subprocess.run(
        [sys.executable, "-c", BENCH, *arguments],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def rows_of(printed):
    """The cells of all rows of its tables, by the first of them."""
    rows = [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("|")]
    return {cells[0]: cells for cells in rows}


def test_sizes_and_switches(tmp_path):
    """The estimate stands beside the peak, and bf16 weights are rounded as in a run of theirs."""
    sizes = ("--family", "sd1", "--batch-sizes", "1", "--chunks", "1", "--steps", "1")
    rows = rows_of(bench(tmp_path, *sizes, "--switches", "bf16 weights,stochastic rounding"))
    header = rows["step"]
    place = header.index("estimated GiB")
    assert header[place - 1] == "peak GiB"
    assert float(rows["trainer"][place]) > 0
    nearest = rows["train.precision = full_bf16; optimizer.stochastic_rounding = false"]
    by_chance = rows["train.precision = full_bf16"]
    assert nearest[5] == by_chance[5]  # the first loss, from before any rounding
    assert nearest[6] != by_chance[6]


def test_the_overhead(tmp_path):
    """The loop is measured beside a bare one."""
    printed = bench(tmp_path, "--overhead", "--steps", "1")
    rows = rows_of(printed)
    assert float(rows["the trainer"][2]) > 0
    assert float(rows["a bare loop"][2]) > 0
    assert re.search(r"waiting for the loader: [\d.]+% of the trainer's time", printed)
