"""The saved states of a run: found again, and checked to be as they were saved.

Owns the layout of `<output_dir>/checkpoints`. The values that identify a run come as plain values,
so nothing here knows data or losses.

    checkpoints/
      step-00000008/        renamed into place when everything in it is on disk
        state.json          step, the values that identify the run, size and checksum of each file
        config.toml         the resolved config that it was trained with
        model.safetensors, optimizer.bin, random_states_0.pkl, ...   accelerate's
        pytorch_model/        in place of the first two, the parts that DeepSpeed's ranks saved
        ema.safetensors       the moving average of the weights, if the run keeps one
      .unfinished-00000012/ a save or a removal that was interrupted; the next save removes it
      before-resume-step-00000012/ a state later than the one that the run was resumed from
"""

import math
import os
import pickle
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import Accelerator
from safetensors import SafetensorError

from capmerge.errors import in_words, printable
from trainer.errors import ConfigError, ResumeError
from trainer.training.engines.accelerator import from_rank_0
from trainer.training.run_folder import CHECKPOINTS_FOLDER as _FOLDER
from trainer.training.run_folder import RUN_FILE, holds_run, is_seed, read_object

_NAME = re.compile(r"step-(\d{8,})")
STATE_FILE = "state.json"
STATE_CONFIG = "config.toml"
"""The names of the files that tell what a state is, in its folder."""
_PART_BYTES = 1 << 24


class SavedState(NamedTuple):
    """A complete saved state."""

    folder: Path
    step: int
    """Optimizer steps that are done."""
    identity: dict[str, Any]
    """Values that a resumed run must share, by the name of the setting."""
    files: dict[str, dict[str, int | str]]
    """Size and checksum of each of its files; none in states of earlier versions."""
    loss_scale: dict[str, float]
    """What the scaling of losses for fp16 keeps; empty for other precisions."""
    layout: dict[str, Any]
    """Which engine saved it, and how it divided it; empty in states of earlier versions."""

    @property
    def config_file(self) -> Path:
        """The resolved config of the state; states of earlier versions have none."""
        return self.folder / STATE_CONFIG


def find_states(output_dir: Path, wanted: str) -> list[Path]:
    """The folders of the states to resume from, the newest first; none if none was saved yet.

    `wanted` is `latest` for those in `output_dir`, the folder of another run for those in it, or
    the path of a single state. Raises `ConfigError` when there is no such folder, and `ResumeError`
    when the folder holds no run, or the path no complete state.
    """
    run = output_dir if wanted == "latest" else Path(wanted)
    # Path.is_dir() raises an error for a name that is too long.
    if wanted != "latest" and not (wanted and os.path.isdir(wanted)):  # noqa: PTH112
        problem = "found a file" if os.path.lexists(wanted) else "there is no such folder"
        raise ConfigError(
            f"--resume {printable(wanted)}: {problem}, expected latest, the folder of a run, or "
            f"that of a state, such as {_FOLDER}/step-00001000. Check the path."
        )
    if wanted == "latest" and not holds_run(run):
        states = saved_folders(run)
        next_step = (
            f"Name its state: --resume {states[-1]}" if states else "Start it without --resume"
        )
        raise ResumeError(
            f"{output_dir}: found no run there, expected {RUN_FILE} and {_FOLDER}. {next_step}."
        )
    if not holds_run(run):
        _read_state(run)
        return [run]
    found = saved_folders(run)[::-1]
    if not found and run.resolve() != output_dir.resolve():
        raise ResumeError(
            f"{run}: that run has saved no state yet, expected one in {_FOLDER}. "
            "Start a new run without --resume."
        )
    return found


def newest_sound(
    engine: Accelerator, folders: Sequence[Path]
) -> tuple[SavedState | None, list[str]]:
    """The first of `folders` whose files are as they were saved, and why those before it are not.

    None if there are no folders. Raises `ResumeError`, on all ranks, when every one is damaged.
    """
    saved, problems = from_rank_0(
        engine, _newest_sound(folders) if engine.is_main_process else (None, [])
    )
    if problems and saved is None:
        raise ResumeError(" ".join(problems))
    return saved, problems


def state_to_export(path: str) -> SavedState:
    """The saved state in the folder `path`, or the newest one of the run there.

    Raises `ResumeError` when there is none, or when its config or its weights are damaged.
    """
    found = find_states(Path(path), path)
    if not found:
        raise ResumeError(f"{path}: that run has saved no state yet, expected one in {_FOLDER}.")
    saved = _read_state(found[0])
    if not saved.config_file.exists():
        raise ResumeError(
            f"{saved.folder}: an earlier version saved this state without its config, expected "
            f"{STATE_CONFIG}. Resume it to the end of its run, which writes the model."
        )
    # Checking the state of the optimizer too would take three times as long.
    return _checked(saved, leave_out=("optimizer", "random_states", "scheduler"))


def _newest_sound(folders: Sequence[Path]) -> tuple[SavedState | None, list[str]]:
    problems: list[str] = []
    for folder in folders:
        try:
            return _checked(_read_state(folder)), problems
        except ResumeError as error:
            problems.append(str(error))
    return None, problems


def _read_state(folder: Path) -> SavedState:
    try:
        values = read_object(folder / STATE_FILE)
        step: Any = values.get("step")
        saved = SavedState(
            folder,
            step,
            values.get("identity", {}),
            values.get("files", {}),
            values.get("loss_scale", {}),
            values.get("layout", {}),
        )
        _check_values(saved)
    except (OSError, ValueError) as error:
        raise ResumeError(
            f"{folder}: no complete state ({STATE_FILE}: {in_words(error)}), expected a folder "
            f"such as {_FOLDER}/step-00001000 with {STATE_FILE} in it. Name another one, or use "
            "--resume latest."
        ) from None
    return saved


def _check_values(saved: SavedState) -> None:
    """Raise `ValueError` if `state.json` holds values that no save writes."""
    named = _NAME.fullmatch(saved.folder.name)
    if type(saved.step) is not int or saved.step < 0 or (named and int(named[1]) != saved.step):
        found = "no step" if saved.step is None else f"the step {saved.step!r}"
        raise ValueError(f"found {found}")
    if not isinstance(saved.identity, dict) or not is_seed(saved.identity.get("train.seed")):
        raise ValueError("found no identity with a train.seed")
    if not isinstance(saved.files, dict) or not all(
        isinstance(told, dict) for told in saved.files.values()
    ):
        raise ValueError("found no checksums in files")
    if not isinstance(saved.layout, dict):
        raise ValueError(f"found the layout {saved.layout!r}")  # noqa: TRY004 -- of the file
    if saved.config_file.exists() and STATE_CONFIG not in saved.files:
        raise ValueError("found no checksums, which only states without a config lack")
    # torch would believe any factor: with 0 or NaN, every step would be skipped.
    if saved.loss_scale != {} and not (
        isinstance(saved.loss_scale, dict)
        and saved.loss_scale.keys() == {"scale", "good_steps"}
        and all(type(value) in (int, float) for value in saved.loss_scale.values())
        and 0 < saved.loss_scale["scale"] < math.inf
        and 0 <= saved.loss_scale["good_steps"] < math.inf
    ):
        raise ValueError(f"found the loss scale {saved.loss_scale!r}")


def _checked(saved: SavedState, *, leave_out: tuple[str, ...] = ()) -> SavedState:
    """The state, if its files are those that were saved; else raises `ResumeError`.

    Files whose names begin with one of `leave_out` are not read. Earlier versions saved no
    checksums, so their states are taken as they are.
    """
    for name, told in saved.files.items():
        if name.startswith(leave_out):
            continue
        try:
            found = sum_of(saved.folder / name)
        except (OSError, ValueError) as error:
            problem = f"cannot be read ({in_words(error)})"
        else:
            if found == told:
                continue
            problem = f"is not as it was saved: found {found}, expected {told}"
        raise ResumeError(
            f"{saved.folder}: the saved state is damaged: {name} {problem}. Name another state, "
            "and check the disk."
        )
    return saved


def sum_of(path: Path) -> dict[str, int | str]:
    """The size of a file and the CRC-32 of its bytes, which takes 0.3 s for 1 GB in memory."""
    if path.exists() and not path.is_file():  # nobody may ever write to a named pipe
        raise ValueError("it is no regular file")
    size, checksum = 0, 0
    with path.open("rb", buffering=0) as file:
        while part := file.read(_PART_BYTES):
            size, checksum = size + len(part), zlib.crc32(part, checksum)
    return {"bytes": size, "crc32": f"{checksum:08x}"}


def is_of(folder: Path, output_dir: Path) -> bool:
    """True if the state in `folder` belongs to the run in `output_dir`."""
    return folder.resolve().parent == (output_dir / _FOLDER).resolve()


def saved_folders(output_dir: Path) -> list[Path]:
    """The folders of all saved states, oldest first.

    Those that lost their `state.json` since count too, so that none is passed over in silence.
    """
    folder = output_dir / _FOLDER
    if not folder.is_dir():
        return []
    return sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), key=step_of)


def newest_state(output_dir: Path) -> Path | None:
    """The folder of the newest complete state of a run, without reading it; None without any."""
    complete = [folder for folder in saved_folders(output_dir) if (folder / STATE_FILE).exists()]
    return complete[-1] if complete else None


def step_of(folder: Path) -> int:
    """The step of a saved state, by the name of its folder."""
    match = _NAME.fullmatch(folder.name)
    assert match is not None, "only folders with such names are listed"
    return int(match[1])


def load_state(engine: Accelerator, saved: SavedState) -> None:
    """Load the saved weights, optimizer state and random states of every rank.

    For a state of the same layout. Raises `ResumeError` when they are damaged, or do not fit the
    model or optimizer of this run.
    """
    try:
        engine.load_state(str(saved.folder))
    except (
        AssertionError,  # DeepSpeed's own checks
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        KeyError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        problem = " ".join(str(error).split())[:400]
        raise ResumeError(
            f"{saved.folder}: the saved state is damaged, or does not fit this run's model or "
            f"optimizer ({problem}). Set [model] and [optimizer] as they were, or name another "
            "state."
        ) from error
