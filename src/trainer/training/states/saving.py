"""The state of a run, saved whole or not at all.

Every rank calls every function; only files that one rank must write alone are written by rank 0.
"""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError

from capmerge.errors import OutputError, in_words
from capmerge.files.folders import publish_folder, sync_files
from trainer.training.ema import Ema
from trainer.training.engines.accelerator import first_of_ranks, is_deepspeed
from trainer.training.run_folder import CHECKPOINTS_FOLDER
from trainer.training.states.checkpoint import (
    STATE_CONFIG,
    STATE_FILE,
    saved_folders,
    step_of,
    sum_of,
)

_UNFINISHED = ".unfinished-"


def set_aside_later(output_dir: Path, step: int) -> list[Path]:
    """Rename the states later than `step`, and return their new paths.

    A run that continues from `step` saves these states again.
    """
    aside = []
    for folder in saved_folders(output_dir):
        if step_of(folder) > step:
            target = folder.with_name(f"before-resume-{folder.name}")
            _remove(target)
            aside.append(folder.rename(target))
    return aside


def save_state(
    engine: Accelerator,
    output_dir: Path,
    step: int,
    values: Mapping[str, Any],
    config_toml: str,
    *,
    ema: Ema | None = None,
    keep: int | None,
) -> tuple[Path | None, str]:
    """Save the full state after `step` steps, and remove all but the newest `keep` states.

    `values` are the `identity`, `loss_scale` and `layout` of `SavedState`, `config_toml` the
    resolved config. None for `keep` removes none. Returns the state's folder and "", or None and
    the reason when a disk was full or unwritable on any rank: then nothing is left of this state,
    the older ones are kept, and the run can continue.
    """
    # Remove the remains of an interrupted save before any rank writes.
    parent = output_dir / CHECKPOINTS_FOLDER
    final, unfinished = parent / f"step-{step:08d}", parent / f"{_UNFINISHED}{step:08d}"
    if engine.is_main_process:
        _tidy(parent)
    engine.wait_for_everyone()

    def write_parts() -> None:
        with _meeting_ranks(engine):
            options = {"save_latest": False} if is_deepspeed(engine) else {}
            engine.save_state(str(unfinished), **options)

    def write_rest() -> None:
        if engine.is_main_process:
            (unfinished / STATE_CONFIG).write_text(config_toml, encoding="utf-8")
        sync_files(unfinished)  # every rank brings its part to its own disk

    def publish() -> None:
        if engine.is_main_process:
            # Those that DDP resumes with lie in the part of rank 0.
            ranks = engine.num_processes if is_deepspeed(engine) else 1
            _publish(unfinished, final, {"step": step, **values}, ranks)

    # After each part of the work the ranks agree, so that none goes on, or waits, alone.
    for work in (
        lambda: unfinished.mkdir(parents=True, exist_ok=True),
        write_parts,
        lambda: ema.save(unfinished) if ema else None,
        write_rest,
        publish,
    ):
        problem = first_of_ranks(engine, _problem_of(work))
        if problem:
            if engine.is_main_process:
                shutil.rmtree(unfinished, ignore_errors=True)
            return None, problem
    if engine.is_main_process:
        for old in saved_folders(output_dir)[: -keep if keep else 0]:
            _remove(old)
    return final, ""


def _problem_of(work: Callable[[], Any]) -> str | None:
    """The reason why the disk did not take what `work` writes; None when it did."""
    try:
        work()
    # torch and safetensors have errors of their own for a full disk.
    except (OSError, OutputError, RuntimeError, SafetensorError) as error:
        if problem := _disk_problem(error):
            return problem
        raise
    return None


@contextmanager
def _meeting_ranks(engine: Accelerator) -> Iterator[None]:
    """Inside the context, a rank whose disk is full still meets the others where DeepSpeed waits.

    Its error is raised at the end. The scripts that DeepSpeed lays beside each state are left out:
    rank 0 alone would write them, and `trainer.export` does what they do.
    """
    if not is_deepspeed(engine):
        yield
        return
    deepspeed: Any = engine.deepspeed_engine_wrapped
    deepspeed = deepspeed.engine
    writer, errors = deepspeed.checkpoint_engine, list[Exception]()
    write = writer.save

    def save(*arguments: Any, **named: Any) -> None:
        try:
            write(*arguments, **named)
        except (OSError, RuntimeError) as error:
            errors.append(error)

    writer.save, deepspeed._copy_recovery_script = save, lambda _: None  # noqa: SLF001
    try:
        yield
    finally:
        del writer.save, deepspeed._copy_recovery_script  # noqa: SLF001
    if errors:
        raise errors[0]


def _tidy(parent: Path) -> None:
    """Remove what interrupted saves and removals left.

    A state that was to be replaced gets its name back, if the new one had not got it yet.
    """
    for replaced in [*parent.glob(".step-*.replaced")]:
        final = parent / replaced.name[1 : -len(".replaced")]
        if final.exists():
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            with suppress(OSError):
                replaced.rename(final)
    for remains in [*parent.glob(f"{_UNFINISHED}*")]:
        shutil.rmtree(remains, ignore_errors=True)


def _publish(unfinished: Path, final: Path, values: Mapping[str, Any], ranks: int) -> None:
    """Complete a save with its `state.json` and rename it; raises `OSError` if that fails."""
    files = {
        path.relative_to(unfinished).as_posix(): sum_of(path)
        for path in sorted(unfinished.rglob("*"))
        if path.is_file() and path.name != STATE_FILE
    }
    found = sum(name.startswith("random_states_") for name in files)
    if found < ranks:
        raise OSError(
            f"{final.parent}: found the parts of {found} ranks, expected those of {ranks}; "
            "train.output_dir has to be one folder for all of them"
        )
    text = json.dumps({**values, "files": files}, indent=2) + "\n"
    (unfinished / STATE_FILE).write_text(text, encoding="utf-8")
    publish_folder(unfinished, final)


def _remove(folder: Path) -> None:
    """Remove a state under another name: what a kill leaves of it is removed by the next save."""
    doomed = folder.with_name(f"{_UNFINISHED}{folder.name}")
    with suppress(OSError):
        folder = folder.rename(doomed)
    shutil.rmtree(folder, ignore_errors=True)


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
        if isinstance(error, OSError) or any(sign in str(error).lower() for sign in _DISK_SIGNS):
            return in_words(error)
        error = error.__cause__ or error.__context__
    return ""
