"""The folder of a run: what stands in it, that a new run never writes over an old one, and that no two write into it at once."""

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
    """Raise `ConfigError` when the folder holds a run already."""
    if (output_dir / CONFIG_FILE).exists():
        raise ConfigError(
            f"{output_dir}: found the {CONFIG_FILE} of an earlier run, expected a new or empty folder. "
            "Go on with that run by --resume latest, or choose another train.output_dir."
        )


@contextmanager
def claimed(output_dir: Path) -> Iterator[None]:
    """Inside, the folder is there, and no other process that asks for it has it.

    Raises `ConfigError` when another one has it, or it cannot be written. On file systems without
    locks nobody is told.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = open_locked(output_dir / _LOCK_FILE)
    except BlockingIOError as error:
        raise ConfigError(
            f"train.output_dir: {output_dir} is in use by a run that is still on its way, "
            "expected that it has ended. Wait for it, stop it (Ctrl-C or SIGTERM: it saves its "
            "state), or set another train.output_dir."
        ) from error
    except OSError as error:
        raise ConfigError(
            f"train.output_dir: {output_dir} cannot be written ({error.strerror}), expected a folder for the run. "
            "Check its permissions, or set another one."
        ) from error
    with file:
        yield


def begun_seed(output_dir: Path) -> int | None:
    """The seed of the run in the folder, which may have been drawn; None when there is none to read."""
    try:
        seed = json.loads((output_dir / _RUN_FILE).read_text(encoding="utf-8"))["identity"][
            "train.seed"
        ]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return seed if isinstance(seed, int) else None


def write_run_files(config: Config, identity: Mapping[str, Any]) -> None:
    """Write the resolved config, and versions and fingerprints beside it."""
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
