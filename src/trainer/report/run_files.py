"""The small files of a run folder as the report reads them: nothing in them is taken for granted.

A file that is missing or damaged leaves its section of the page empty, and a note says so.
"""

import json
import re
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capmerge.errors import UsageError, printable
from trainer.report.curves import RunCurves, read_curves
from trainer.report.samples import Samples, read_samples
from trainer.report.validation import Validations, read_validations
from trainer.training.run_folder import (
    CONFIG_FILE,
    METRICS_FILE,
    RUN_FILE,
    VALIDATION_FILE,
    check_regular,
)

_LARGEST_BYTES = 1 << 20
"""Size above which config.toml or run.json is not that of a run."""
_MOST_CONFIGS = 20
"""Number of configs that the page compares, the newest ones."""


@dataclass
class RunFiles:
    """What a run folder holds."""

    folder: Path
    run: dict[str, Any] = field(default_factory=dict)
    """The content of run.json."""
    configs: list[tuple[str, str, dict[str, Any]]] = field(default_factory=list)
    """The name, the text and the settings of each config by `section.key`, the oldest first."""
    curves: RunCurves = field(default_factory=RunCurves)
    validations: Validations = field(default_factory=Validations)
    samples: Samples = field(default_factory=lambda: Samples({}, 0, 0, []))
    notes: list[str] = field(default_factory=list)
    """What is missing or damaged, as sentences."""

    def setting(self, name: str) -> Any:
        """The value of a setting in the newest config; None if there is none."""
        return self.configs[-1][2].get(name) if self.configs else None

    def fact(self, *names: str) -> Any:
        """The value in run.json under these names; None if there is none."""
        value: Any = self.run
        for name in names:
            value = value.get(name) if isinstance(value, dict) else None
        return value


def read_run(folder: Path) -> RunFiles:
    """Everything that the page needs of the folder of a run, which may still be going on.

    Raises `UsageError` when no run has begun there.
    """
    shown = printable(str(folder))
    if not folder.is_dir():
        raise UsageError(
            f"{shown}: found no folder, expected that of a run (train.output_dir). "
            "Give such a folder."
        )
    if not any((folder / name).exists() for name in (RUN_FILE, CONFIG_FILE, METRICS_FILE)):
        raise UsageError(
            f"{shown}: found neither {RUN_FILE} nor {METRICS_FILE}, expected the folder of a run "
            "(train.output_dir). Give such a folder."
        )
    found = RunFiles(folder)
    _read_run_json(found)
    _read_configs(found)
    path = folder / METRICS_FILE
    try:
        check_regular(path)
        found.curves = read_curves(path)
    except (OSError, ValueError) as error:
        found.notes.append(_cannot(path, error))
    else:
        if unreadable := found.curves.unreadable_bytes:
            found.notes.append(
                f"{METRICS_FILE}: {unreadable:,} bytes are no whole line of a step and are left "
                "out. A run that is being written or was killed may end in such a line."
            )
    path = folder / VALIDATION_FILE
    try:
        check_regular(path)
        found.validations = read_validations(path)
    except (OSError, ValueError) as error:
        found.notes.append(_cannot(path, error))
    found.samples = read_samples(folder)
    found.notes += found.samples.notes
    return found


def _cannot(path: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"{path.name}: there is no such file."
    reason = error.strerror if isinstance(error, OSError) else str(error)
    return f"{path.name}: cannot be read ({reason})."


def _text_of(path: Path) -> str:
    """The text of a small file; raises `OSError`, or `ValueError` for anything else."""
    check_regular(path)
    with path.open("rb") as file:
        data = file.read(_LARGEST_BYTES + 1)
    if len(data) > _LARGEST_BYTES:
        raise ValueError(f"more than {_LARGEST_BYTES:,} bytes")
    return data.decode("utf-8")


def _read_run_json(found: RunFiles) -> None:
    path = found.folder / RUN_FILE
    try:
        run = json.loads(_text_of(path))
    except (OSError, ValueError, RecursionError) as error:
        found.notes.append(_cannot(path, error))
    else:
        if isinstance(run, dict):
            found.run = run
        else:
            found.notes.append(
                f"{path.name}: found a JSON {type(run).__name__}, expected an object."
            )


def _read_configs(found: RunFiles) -> None:
    older = {
        int(number[1]): path
        for path in found.folder.glob("config.*.toml")
        if (number := re.fullmatch(r"config\.([1-9][0-9]{0,8})\.toml", path.name))
    }
    paths = [older[number] for number in sorted(older)][-_MOST_CONFIGS:]
    if len(older) > len(paths):
        left = len(older) - len(paths)
        found.notes.append(f"{left:,} older configs are not compared: the page has the newest.")
    for path in (*paths, found.folder / CONFIG_FILE):
        try:
            text = _text_of(path)
            settings = dict(_flat("", tomllib.loads(text)))
        except (OSError, ValueError, RecursionError) as error:
            found.notes.append(_cannot(path, error))
        else:
            found.configs.append((path.name, text, settings))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    """The settings in a table by their names, as in ("data.0.repeats", 1)."""
    tables = isinstance(value, list) and value and all(isinstance(one, dict) for one in value)
    if isinstance(value, dict) or tables:
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, one in inner:
            yield from _flat(f"{name}.{key}" if name else str(key), one)
    else:
        yield name, value
