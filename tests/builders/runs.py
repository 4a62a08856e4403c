"""Small training runs for tests: rewritten example data, and a config as text."""

import json
import os
import subprocess
import sys
from io import BytesIO, TextIOWrapper

import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

from builders import preloaded
from builders.paths import ROOT
from trainer.config.load import load_config
from trainer.training.loop import train

LATENTS = ROOT / "examples" / "latents"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
TIMINGS = {"samples_per_second", "data_wait", "memory_bytes", "seconds", "ranks"}
"""The fields of metrics.jsonl that depend on the machine and not on the training."""


def rewrite_examples(folder, n_records=None):
    """Rewrite the example metadata, or its first records, and return the path."""
    out = folder / "meta.json"
    done = preloaded.run(
        "capmerge", "rewrite", str(ROOT / "examples" / "meta_lat.json"), "-o", str(out)
    )
    assert done.returncode == 0, done.stderr.decode()
    if n_records:
        records = json.loads(out.read_text(encoding="utf-8"))
        out.write_text(
            json.dumps(dict(list(records.items())[:n_records]), indent=2), encoding="utf-8"
        )
    return out


def settings_of(metadata, output_dir, **changes):
    """The settings of a small SD1 run, by sections.

    `changes` are sections with further settings; `data` is the section of the first data set.
    """
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
    """Write the config file of the sections that `settings_of` returns; its path."""
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


def run(config, *arguments, cwd=None, preexec_fn=None):
    """Train in a separate process, and return its result with the output as text."""
    if preexec_fn is None:
        done = preloaded.run("trainer.run", str(config), *arguments, cwd=cwd, env=ENVIRONMENT)
    else:
        done = subprocess.run(
            command(config, *arguments),
            capture_output=True,
            env=ENVIRONMENT,
            check=False,
            cwd=cwd,
            preexec_fn=preexec_fn,
        )
    # Bars of progress hold "\r", which text mode reads as the end of a line.
    done.stdout, done.stderr = (
        TextIOWrapper(BytesIO(data), encoding="utf-8").read() for data in (done.stdout, done.stderr)
    )
    return done


def train_here(config, *overrides, resume=None, allow_change=False):
    """Train in this process, which saves the seconds of imports, and return the exit code."""
    AcceleratorState._reset_state(reset_partial_state=True)
    # As in separate processes, because the number of threads decides how sums are rounded.
    torch.set_num_threads(1)
    return train(load_config(config, overrides), resume=resume, allow_change=allow_change)


def metrics_of(output_dir):
    """The lines of a run's metrics, without the fields that depend on the machine."""
    lines = (output_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if name not in TIMINGS}
        for line in lines
    ]


def state_of(output_dir, step):
    """The weights and the optimizer state of a saved step, as tensors by name."""
    folder = output_dir / "checkpoints" / f"step-{step:08d}"
    optimizer = torch.load(folder / "optimizer.bin", weights_only=True)
    found = dict(load_file(folder / "model.safetensors"))
    for number, slots in optimizer["state"].items():
        found |= {
            f"optimizer {number} {name}": torch.as_tensor(value) for name, value in slots.items()
        }
    return found


def assert_equal_bits(one, other):
    """Fail unless two states hold the same names and the same numbers, bit by bit."""
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert different == []
