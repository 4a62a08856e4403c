"""The folder of a run: the names of its files, and the guards against writing over another run."""

import importlib.metadata
import json
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from capmerge.files.atomic import write_whole
from capmerge.files.lock import open_locked
from trainer.config.load import resolved_toml
from trainer.config.settings import Config
from trainer.errors import ConfigError

CONFIG_FILE = "config.toml"
METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "loss.png"
PLANS_FOLDER = "plans"
MODEL_FOLDER = "model"
_RUN_FILE = "run.json"
_LOCK_FILE = ".lock"
_PACKAGES = (
    "capmerge",
    "torch",
    "accelerate",
    "diffusers",
    "transformers",
    "safetensors",
    "numpy",
    "tokenizers",
    "ftfy",
)


def check_new(output_dir: Path) -> None:
    """Raise `ConfigError` if the folder already holds a run."""
    if (output_dir / CONFIG_FILE).exists():
        raise ConfigError(
            f"{output_dir}: found the {CONFIG_FILE} of an earlier run, expected a new or empty "
            "folder. Continue that run with --resume latest, or choose another train.output_dir."
        )


@contextmanager
def claimed(output_dir: Path) -> Iterator[None]:
    """Inside the context, the folder exists and belongs to this run alone.

    Raises `ConfigError` when another run has claimed it, or when it cannot be written. On file
    systems without locks another run goes unnoticed.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = open_locked(output_dir / _LOCK_FILE)
    except BlockingIOError as error:
        raise ConfigError(
            f"train.output_dir: {output_dir} is in use by another run, expected a folder "
            "without one. Wait for it to end, stop it with Ctrl-C or SIGTERM (it saves its "
            "state), or set another train.output_dir."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"train.output_dir: {output_dir} cannot be written ({error.strerror}), expected a "
            "folder for the run. Check its permissions, or set another one."
        ) from error
    with file:
        yield


def begun_seed(output_dir: Path) -> int | None:
    """The seed with which the run in the folder began, given or drawn; None if none can be read."""
    try:
        run = json.loads((output_dir / _RUN_FILE).read_text(encoding="utf-8"))
        seed = run["identity"]["train.seed"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return seed if isinstance(seed, int) else None


def write_run_files(config: Config, identity: Mapping[str, Any]) -> None:
    """Write the resolved config, and beside it the versions and the identity of the run."""
    folder = config.train.output_dir
    versions = {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    write_whole(
        folder / _RUN_FILE,
        json.dumps({"versions": versions, "identity": dict(identity)}, indent=2) + "\n",
    )
    write_whole(folder / CONFIG_FILE, resolved_toml(config))
