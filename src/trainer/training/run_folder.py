"""The folder of a run: the names of its files, and the guards against writing over another run."""

import errno
import importlib.metadata
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from capmerge.files.atomic import write_whole
from trainer.config.load import resolved_toml
from trainer.config.settings import Config
from trainer.errors import ConfigError

if sys.platform != "win32":
    import fcntl

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

    Raises `ConfigError` when another run has claimed it, or when it cannot be written. On Windows,
    and on file systems without locks, another run goes unnoticed.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        file = (output_dir / _LOCK_FILE).open("ab")
    except OSError as error:
        raise ConfigError(
            f"train.output_dir: {output_dir} cannot be written ({error.strerror}), expected a "
            "folder for the run. Check its permissions, or set another one."
        ) from error
    with file:
        if not _locked(file):
            raise ConfigError(
                f"train.output_dir: {output_dir} is in use by another run, expected a folder "
                "without one. Wait for it to end, stop it with Ctrl-C or SIGTERM (it saves its "
                "state), or set another train.output_dir."
            )
        yield


def _locked(file: BinaryIO) -> bool:
    """Lock the file until it is closed; False if another process has locked it.

    A lock of this kind is not inherited, so workers that outlive a killed run do not hold it.
    """
    if sys.platform != "win32":
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


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
