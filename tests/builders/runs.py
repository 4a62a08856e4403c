"""Small runs for tests: the example data rewritten once, and a config as text."""

import json
import os
import subprocess
import sys

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from builders.paths import ROOT
from trainer.config.load import load_config
from trainer.training.loop import train

LATENTS = ROOT / "examples" / "latents"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TIMINGS = {"samples_per_second", "data_wait", "memory_bytes", "seconds"}
"""Fields of metrics.jsonl that tell of the machine, not of the training."""


def rewrite_examples(folder, n_records=None):
    """The path of the rewritten example metadata, or of its first records."""
    out = folder / "meta.json"
    subprocess.run(
        [
            sys.executable,
            "-m",
            "capmerge",
            "rewrite",
            str(ROOT / "examples" / "meta_lat.json"),
            "-o",
            str(out),
        ],
        check=True,
    )
    if n_records:
        records = json.loads(out.read_text(encoding="utf-8"))
        out.write_text(
            json.dumps(dict(list(records.items())[:n_records]), indent=2), encoding="utf-8"
        )
    return out


def settings_of(metadata, output_dir, **changes):
    """The `--set` values of a small SD1 run; `changes` are sections with their settings, `data` that of the first set."""
    sections = {
        "model": {"family": "sd1", "path": "random"},
        "data": {"metadata": str(metadata), "latents": str(LATENTS)},
        "train": {
            "output_dir": str(output_dir),
            "max_steps": 8,
            "seed": 7,
            "batch_size": 2,
            "workers": 0,
        },
        "optimizer": {"learning_rate": 1e-3, "text_learning_rate": 1e-3},
        "text": {"max_tokens": 75},
        "log": {"samples": True},
    }
    for section, values in changes.items():
        sections[section] = sections.get(section, {}) | values
    return sections


def write_config(path, sections):
    """The config file of `settings_of`'s sections."""
    lines = []
    for section, values in sections.items():
        lines.append("[[data]]" if section == "data" else f"[{section}]")
        lines += [
            f"{name} = {json.dumps(value)}" for name, value in values.items() if value is not None
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def command(config, *arguments):
    """The command that trains `config`."""
    return [sys.executable, "-m", "trainer.run", str(config), *arguments]


def run(config, *arguments, **options):
    """Train in a process of its own; its result with text output."""
    return subprocess.run(
        command(config, *arguments),
        capture_output=True,
        text=True,
        env=ENVIRONMENT,
        check=False,
        **options,
    )


def train_here(config, *overrides, resume=None, allow_change=False):
    """Train in this process, which spares the seconds of imports; the exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.set_num_threads(
        1
    )  # as in the runs of their own: the number of threads decides how sums are rounded
    return train(load_config(config, overrides), resume=resume, allow_change=allow_change)


def metrics_of(output_dir):
    """The lines of a run's metrics, without what tells of the machine."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMINGS}
        for line in lines
    ]


def state_of(output_dir, step):
    """Weights and optimizer state of a saved step, as (name, tensor)."""
    folder = output_dir / "checkpoints" / f"step-{step:08d}"
    optimizer = torch.load(folder / "optimizer.bin", weights_only=True)
    found = dict(load_file(folder / "model.safetensors"))
    for number, slots in optimizer["state"].items():
        found |= {
            f"optimizer {number} {name}": torch.as_tensor(value) for name, value in slots.items()
        }
    return found


def assert_equal_bits(one, other):
    """Two states hold the same names and the very same numbers."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []
