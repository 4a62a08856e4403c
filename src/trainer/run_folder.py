"""The folder of a run: what stands in it, and that a new run never writes over an old one."""

import importlib.metadata
import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from capmerge.output import write_whole
from trainer.config import resolved_toml
from trainer.errors import ConfigError
from trainer.settings import Config

CONFIG_FILE = "config.toml"
METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"
PLANS_FOLDER = "plans"
MODEL_FOLDER = "model"
_RUN_FILE = "run.json"
_PACKAGES = ("capmerge", "torch", "accelerate", "diffusers", "transformers", "safetensors", "numpy", "tokenizers", "ftfy")


def check_new(output_dir: Path) -> None:
    """Raise `ConfigError` when the folder holds a run already."""
    if (output_dir / CONFIG_FILE).exists():
        raise ConfigError(
            f"{output_dir}: found the {CONFIG_FILE} of an earlier run, expected a new or empty folder. "
            "Go on with that run by --resume latest, or choose another train.output_dir."
        )


def write_run_files(config: Config, identity: Mapping[str, Any]) -> None:
    """Write the resolved config, and versions and fingerprints beside it."""
    folder = config.train.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    versions = {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in _PACKAGES}}
    write_whole(folder / _RUN_FILE, json.dumps({"versions": versions, "identity": dict(identity)}, indent=2) + "\n")
    write_whole(folder / CONFIG_FILE, resolved_toml(config))
