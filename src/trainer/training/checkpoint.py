"""The saved states of a run: saved whole or not at all, found again, and checked to fit.

Owns the layout of `<output_dir>/checkpoints`. The values that identify a run come as plain values,
so nothing here knows data or losses. Every rank calls every function; only files that one rank must
write alone are written by rank 0.

    checkpoints/
      step-00000008/        renamed into place when everything in it is on disk
        state.json          step, and the values that identify the run
        model.safetensors, optimizer.bin, random_states_0.pkl, ...   accelerate's
      .unfinished-00000012/ a save that was interrupted; the next save removes it
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


class SavedState(NamedTuple):
    """A complete saved state."""

    folder: Path
    step: int
    """Optimizer steps that are done."""
    identity: dict[str, Any]
    """Values that a resumed run must share, by the name of the setting."""


def find_state(output_dir: Path, wanted: str) -> SavedState | None:
    """The state to resume from, or None when the run has not saved any yet.

    `wanted` is `latest` for the newest complete state in `output_dir`, or the path of a state.
    Raises `ResumeError` when the folder holds no run, or the path no complete state.
    """
    if wanted != "latest":
        return _read_state(Path(wanted))
    if not (output_dir / "config.toml").exists():
        raise ResumeError(
            f"{output_dir}: found no run there, expected config.toml and {_FOLDER}. "
            "Start the run without --resume."
        )
    folders = _complete(output_dir)
    return _read_state(folders[-1]) if folders else None


def _read_state(folder: Path) -> SavedState:
    try:
        values = json.loads((folder / _STATE).read_text(encoding="utf-8"))
        saved = SavedState(folder, values["step"], values["identity"])
        if type(saved.step) is not int or not isinstance(saved.identity, dict):
            raise ValueError(f"found the step {saved.step!r}")  # noqa: TRY301 -- told as the others
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResumeError(
            f"{folder}: no complete state ({error}), expected a folder such as "
            f"{_FOLDER}/step-00001000 with {_STATE} in it. Name another one, or use "
            "--resume latest."
        ) from None
    return saved


def is_of(saved: SavedState, output_dir: Path) -> bool:
    """True if a state belongs to the run in that folder."""
    return saved.folder.resolve().parent == (output_dir / _FOLDER).resolve()


def _complete(output_dir: Path) -> list[Path]:
    """The folders of all complete states, oldest first."""
    folder = output_dir / _FOLDER
    if not folder.is_dir():
        return []
    found = [
        path for path in folder.iterdir() if _NAME.fullmatch(path.name) and (path / _STATE).exists()
    ]
    return sorted(found, key=_step_of)


def _step_of(folder: Path) -> int:
    match = _NAME.fullmatch(folder.name)
    assert match is not None, "only folders with such names are listed"
    return int(match[1])


def check_identity(
    saved: SavedState, identity: Mapping[str, Any], *, allow_change: bool
) -> list[str]:
    """The differences between a saved run and this one, as lines to show.

    Raises `ResumeError` naming every difference, unless `allow_change`.
    """
    names = list(dict.fromkeys((*saved.identity, *identity)))
    changed = [
        f"{name}: saved {_shown(saved.identity.get(name))}, now {_shown(identity.get(name))}"
        for name in names
        if saved.identity.get(name) != identity.get(name)
    ]
    if changed and not allow_change:
        raise ResumeError(
            f"{saved.folder}: the run would not continue as it began: {'; '.join(changed)}. "
            "Set them back, or resume with --allow-change: from here on, the samples will then "
            "differ from those of an uninterrupted run."
        )
    return changed


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value)


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """Rename the states later than `step`, and return their new paths.

    A run that continues from `step` saves these states again.
    """
    aside = []
    for folder in _complete(output_dir):
        if _step_of(folder) > step:
            target = folder.with_name(f"before-resume-{folder.name}")
            shutil.rmtree(target, ignore_errors=True)
            aside.append(folder.rename(target))
    return aside


def load_state(engine: Accelerator, saved: SavedState) -> None:
    """Load the saved weights, optimizer state and random states of every rank.

    Raises `ResumeError` when they are damaged, or do not fit the model or optimizer of this run.
    """
    try:
        engine.load_state(str(saved.folder))
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
            f"{saved.folder}: the saved state is damaged, or does not fit this run's model or "
            f"optimizer ({problem}). Set [model] and [optimizer] as they were, or name another "
            "state."
        ) from error


def save_state(
    engine: Accelerator,
    output_dir: Path,
    step: int,
    identity: Mapping[str, Any],
    *,
    keep: int | None,
) -> tuple[Path | None, str]:
    """Save the full state after `step` steps, and remove all but the newest `keep` states.

    None for `keep` removes none. Returns the state's folder and "", or None and the reason when a
    disk was full or unwritable on any rank: then nothing is left of this state, the older ones are
    kept, and the run can continue.
    """
    # Remove the remains of an interrupted save before any rank writes.
    parent = output_dir / _FOLDER
    final, unfinished = parent / f"step-{step:08d}", parent / f"{_UNFINISHED}{step:08d}"
    if engine.is_main_process:
        for remains in [*parent.glob(f"{_UNFINISHED}*")]:
            shutil.rmtree(remains, ignore_errors=True)
    engine.wait_for_everyone()

    # Every rank writes its part, and brings it to its own disk.
    problem = ""
    try:
        parent.mkdir(parents=True, exist_ok=True)
        engine.save_state(str(unfinished))
        if engine.is_main_process:
            (unfinished / _STATE).write_text(
                json.dumps({"step": step, "identity": dict(identity)}, indent=2) + "\n",
                encoding="utf-8",
            )
        sync_files(unfinished)
    # torch and safetensors have errors of their own for a full disk.
    except (OSError, RuntimeError, SafetensorError) as error:
        problem = _disk_problem(error)
        if not problem:
            raise

    # Publish the state if all ranks have written theirs, and give it up on all ranks otherwise.
    if not _any_rank(engine, bool(problem)) and engine.is_main_process:
        problem = _publish(unfinished, final, keep)
    if _any_rank(engine, bool(problem)):
        if engine.is_main_process:
            shutil.rmtree(unfinished, ignore_errors=True)
        return None, problem or "another rank could not write"
    return final, ""


def _any_rank(engine: Accelerator, flag: bool) -> bool:  # noqa: FBT001 -- a value, not an option
    """True if `flag` is true on any rank."""
    return bool(sum_over_ranks(engine, torch.tensor(int(flag), device=engine.device)))


def _publish(unfinished: Path, final: Path, keep: int | None) -> str:
    """Rename a finished save and remove the states that are not kept; the reason if that fails."""
    try:
        publish_folder(unfinished, final)
    except OSError as error:
        return str(error)
    for old in _complete(final.parent.parent)[: -keep if keep else 0]:
        shutil.rmtree(old, ignore_errors=True)
    return ""


# `iostream error` is the only word of torch's own writer about a full disk.
_DISK_SIGNS = (
    "os error",
    "no space",
    "file write failed",
    "failed writing",
    "too large",
    "iostream error",
)


def _disk_problem(error: BaseException | None) -> str:
    """The text of the error that says that writing failed; "" when none does and it is a bug.

    The whole chain of causes is searched: where torch cannot write, it goes on to close the file,
    and its complaint about that ("enforce fail ... unexpected pos") hides the first error.
    """
    while error is not None:
        text = str(error)
        if isinstance(error, OSError) or any(sign in text.lower() for sign in _DISK_SIGNS):
            return text
        error = error.__cause__ or error.__context__
    return ""
