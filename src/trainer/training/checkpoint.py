"""The full state of a run: saved whole or not at all, found again, and refused where it does not fit.

Owns the layout of `<output_dir>/checkpoints`. Knows nothing of data or losses: what identifies a
run comes as plain values. Every rank calls every function; only files that one rank must write
alone are written by rank 0.

    checkpoints/
      step-00000008/        renamed into place when everything in it is on disk
        state.json          step, and what identifies the run
        model.safetensors, optimizer.bin, random_states_0.pkl, ...   accelerate's
      .unfinished-00000012/ a save that was cut off; the next save removes it
      before-resume-step-00000012/ a state later than the one that the run was resumed from
"""

import json
import pickle
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from safetensors import SafetensorError

from capmerge.files.folders import publish_folder, sync_files
from trainer.errors import ResumeError
from trainer.training.accelerator import sum_over_ranks

_FOLDER = "checkpoints"
_NAME = re.compile(r"step-(\d{8,})")
_UNFINISHED = ".unfinished-"
_STATE = "state.json"


class State(NamedTuple):
    """A complete saved state."""

    folder: Path
    step: int
    """Optimizer steps that are done."""
    identity: dict[str, Any]
    """What a resumed run must have the same, by the name of the setting."""


def find_state(output_dir: Path, wanted: str) -> State | None:
    """The state to resume from: `latest` is the newest complete one of the run, anything else the path of one; None: the run has none yet.

    Raises `ResumeError` when the folder holds no run, or the path no complete state.
    """
    if wanted != "latest":
        return _read_state(Path(wanted))
    if not (output_dir / "config.toml").exists():
        raise ResumeError(
            f"{output_dir}: found no run there, expected config.toml and {_FOLDER}. Start it without --resume."
        )
    folders = _complete(output_dir)
    return _read_state(folders[-1]) if folders else None


def _read_state(folder: Path) -> State:
    try:
        found = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        state = State(folder, found["step"], found["identity"])
        if type(state.step) is not int or not isinstance(state.identity, dict):
            raise ValueError(f"found the step {state.step!r}")  # noqa: TRY301 -- one of the ways to be no state
    except (OSError, ValueError, KeyError, TypeError) as error:
        expected = f"expected a folder such as {_FOLDER}/step-00001000 with {_STATE} in it"
        raise ResumeError(
            f"{folder}: no complete state ({error}), {expected}. Name another one, or use --resume latest."
        ) from None
    return state


def is_of(state: State, output_dir: Path) -> bool:
    """Whether a state is one of the run in that folder."""
    return state.folder.resolve().parent == (output_dir / _FOLDER).resolve()


def _complete(output_dir: Path) -> list[Path]:
    """The complete states, oldest first."""
    folder = output_dir / _FOLDER
    if not folder.is_dir():
        return []
    found = [
        path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / _STATE).exists()
    ]
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match is not None  # only such folders are listed
    return int(match[1])


def check_identity(state: State, identity: Mapping[str, Any], *, allow_change: bool) -> list[str]:
    """What differs between a saved run and this one, as lines to show.

    Raises `ResumeError` naming every difference, unless `allow_change`.
    """
    names = list(dict.fromkeys((*state.identity, *identity)))
    changed = [
        f"{name}: saved {_shown(state.identity.get(name))}, now {_shown(identity.get(name))}"
        for name in names
        if state.identity.get(name) != identity.get(name)
    ]
    if changed and not allow_change:
        raise ResumeError(
            f"{state.folder}: the run would not go on as it began: {'; '.join(changed)}. "
            "Set them back, or resume with --allow-change: then the samples from here on are others than an unbroken run's."
        )
    return changed


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """Rename the states past `step`: a run that goes on from there makes them again. Returns their new names."""
    aside = []
    for folder in _complete(output_dir):
        if _step_of(folder) > step:
            target = folder.with_name(f"before-resume-{folder.name}")
            shutil.rmtree(target, ignore_errors=True)
            aside.append(folder.rename(target))
    return aside


def load_state(engine: Accelerator, state: State) -> None:
    """Put the saved weights, optimizer state and chance of every rank in place.

    Raises `ResumeError` when they are damaged, or do not fit the model or optimizer of this run.
    """
    try:
        engine.load_state(str(state.folder))
    except (
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
            f"{state.folder}: the saved state is damaged, or does not fit this run's model or optimizer ({problem}). "
            "Set [model] and [optimizer] as they were, or name another state."
        ) from error


def save_state(
    engine: Accelerator,
    output_dir: Path,
    step: int,
    identity: Mapping[str, Any],
    *,
    keep: int | None,
) -> tuple[Path | None, str]:
    """Save the full state after `step` steps; the newest `keep` states stay, or all that are there when None.

    Returns the state's folder and "", or None and the reason when a disk was full or unwritable on
    any rank: then nothing is left of it, the older states stand, and the run can go on.
    """
    parent = output_dir / _FOLDER
    final, unfinished = parent / f"step-{step:08d}", parent / f"{_UNFINISHED}{step:08d}"
    if engine.is_main_process:
        for left in [*parent.glob(f"{_UNFINISHED}*")]:
            shutil.rmtree(left, ignore_errors=True)
    engine.wait_for_everyone()
    problem = ""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        engine.save_state(str(unfinished))
        if engine.is_main_process:
            (unfinished / _STATE).write_text(
                json.dumps({"step": step, "identity": dict(identity)}, indent=2) + "\n",
                encoding="utf-8",
            )
        sync_files(unfinished)  # every rank its own disk's; publishing them is rank 0's
    except (
        OSError,
        RuntimeError,
        SafetensorError,
    ) as error:  # torch and safetensors have their own errors for a full disk
        if not _is_disk_error(error):
            raise
        problem = str(error)
    failed = sum_over_ranks(engine, torch.tensor(int(bool(problem)), device=engine.device))
    if not int(failed) and engine.is_main_process:
        problem = _publish(unfinished, final, keep)
    failed = sum_over_ranks(engine, torch.tensor(int(bool(problem)), device=engine.device))
    if int(failed):
        if engine.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        return None, problem or "another rank could not write"
    return final, ""


def _publish(unfinished: Path, final: Path, keep: int | None) -> str:
    """Rename a finished save and remove states that are not kept; the reason when that failed."""
    try:
        publish_folder(unfinished, final)
    except OSError as error:
        return str(error)
    for old in _complete(final.parent.parent)[: -keep if keep else 0]:
        shutil.rmtree(old, ignore_errors=True)
    return ""


def _is_disk_error(error: Exception) -> bool:
    """Whether writing failed, not the program."""
    text = str(error).lower()
    return isinstance(error, OSError) or any(
        sign in text
        for sign in ("os error", "no space", "file write failed", "failed writing", "too large")
    )
