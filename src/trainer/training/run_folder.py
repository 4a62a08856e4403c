"""The folder of a run: the names of its files, and the guards against writing over another run."""

import importlib.metadata
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

from capmerge.errors import UsageError, printable
from capmerge.files.atomic import write_whole
from capmerge.files.lock import open_locked
from capmerge.toml import to_toml
from trainer.config.load import resolved_toml
from trainer.config.settings import Config
from trainer.errors import ConfigError

CONFIG_FILE = "config.toml"
METRICS_FILE = "metrics.jsonl"
VALIDATION_FILE = "validation.jsonl"
PLOT_FILE = "loss.png"
PLANS_FOLDER = "plans"
MODEL_FOLDER = "model"
SINGLE_FILE = "model.safetensors"
EMA_FOLDER = "model-ema"
EMA_FILE = "model-ema.safetensors"
CHECKPOINTS_FOLDER = "checkpoints"
SAMPLES_FOLDER = "samples"
SAMPLES_FILE = "samples.jsonl"
"""In the folder of each set of samples: a line for each picture."""
RUN_FILE = "run.json"
_LOCK_FILE = ".lock"
_WRITTEN = (
    *(RUN_FILE, CONFIG_FILE, METRICS_FILE, VALIDATION_FILE, PLOT_FILE, PLANS_FOLDER),
    *(MODEL_FOLDER, SINGLE_FILE, EMA_FOLDER, EMA_FILE, CHECKPOINTS_FOLDER, SAMPLES_FOLDER),
)
"""The names of what a run writes, replaces or cuts in its folder."""
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


def holds_run(folder: Path) -> bool:
    """True if a run has begun in the folder: its `run.json` tells it, not files of common names."""
    try:
        return isinstance(read_object(folder / RUN_FILE).get("identity"), dict)
    except (OSError, ValueError):
        return False


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a regular file; raises `OSError` or `ValueError` when there is none."""
    check_regular(path)
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError as error:
        raise ValueError("it nests too deeply") from error
    if not isinstance(found, dict):
        raise ValueError("it holds no JSON object")  # noqa: TRY004 -- of the file, not of the call
    return found


def check_regular(path: Path) -> None:
    """Raise `ValueError` for a folder or a pipe, to which nobody may ever write."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no regular file")


def is_seed(value: Any) -> bool:
    """True if a value that was read is a seed as `train.seed` may have it."""
    return type(value) is int and 0 <= value < 1 << 63


def check_new(output_dir: Path) -> None:
    """Raise `ConfigError` if the folder already holds a run, or files that a run would replace."""
    if holds_run(output_dir):
        raise ConfigError(
            f"{output_dir}: found the {RUN_FILE} of an earlier run, expected a new or empty "
            "folder. Continue that run with --resume latest, or choose another train.output_dir."
        )
    foreign = [name for name in _WRITTEN if os.path.lexists(output_dir / name)]
    if foreign:
        raise ConfigError(
            f"train.output_dir: {output_dir} holds {', '.join(foreign)}, and no {RUN_FILE} of a "
            "run that wrote it; expected a folder without files of these names, which the run "
            "would replace. Move them, or set another train.output_dir."
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
        seed = read_object(output_dir / RUN_FILE)["identity"]["train.seed"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return seed if is_seed(seed) else None


def write_run_files(config: Config, identity: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write the resolved config, and beside it versions, identity and `facts` of the run.

    The facts are for its report alone: no resumed run is compared with them.
    """
    folder = config.train.output_dir
    versions = {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in _PACKAGES},
    }
    write_whole(
        folder / RUN_FILE,
        json.dumps({"versions": versions, "identity": dict(identity), **facts}, indent=2) + "\n",
    )
    _write_config(folder / CONFIG_FILE, resolved_toml(config))


def _write_config(path: Path, text: str) -> None:
    """Write the resolved config; an older one with another content stays as `config.1.toml`, ..."""
    if path.exists() and path.read_bytes() != text.encode():
        numbers = count(1)
        while (older := path.with_name(f"{path.stem}.{next(numbers)}.toml")).exists():
            pass
        path.rename(older)
    write_whole(path, text)


def config_to_resume(resume: str) -> tuple[Path, list[str]]:
    """The config of a saved state or of the folder of a run, and the overrides that it needs.

    They let the run go on in the folder where the state lies now. Raises `UsageError` when there is
    neither.
    """
    path, found = Path(resume), "no CONFIG and no saved config there"
    try:
        if not resume:
            found = "an empty path"
        elif holds_run(path):
            return path / CONFIG_FILE, [f"train.output_dir={to_toml(path)}"]
        else:
            folder = path.resolve().parent.parent
            moved = [f"train.output_dir={to_toml(_shortest(folder))}"] if holds_run(folder) else []
            if (path / CONFIG_FILE).exists():
                return path / CONFIG_FILE, moved
            if path.is_dir() and moved:
                return folder / CONFIG_FILE, moved
    except OSError as error:  # a name that is too long, a folder that may not be read
        found = f"a path that cannot be followed ({error.strerror})"
    except RuntimeError:  # Python 3.11 and 3.12 raise it for a loop of links
        found = "a loop of links"
    raise UsageError(
        f"--resume {printable(resume)}: found {found}, expected the "
        "folder of a run, such as runs/mine, or a state in it. Name one of them, or give the "
        "config of the run before --resume."
    )


def _shortest(folder: Path) -> Path:
    """The path from the current directory where `folder` is below it, else as it is."""
    here = Path.cwd()
    return folder.relative_to(here) if folder.is_relative_to(here) else folder
