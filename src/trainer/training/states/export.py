"""A single-file model made of a saved state, without a GPU, an engine or the data."""

from pathlib import Path

from capmerge.errors import UsageError, printable
from trainer.config.load import load_config
from trainer.config.settings import RANDOM, Config, ExportSettings
from trainer.errors import ResumeError
from trainer.model.build import build_model
from trainer.model.save_single import save_single_file
from trainer.model.source import check_same_source
from trainer.training.states.checkpoint import state_to_export
from trainer.training.states.weights import state_weights


def export_state(
    state: str,
    target: Path,
    *,
    source: str | None,
    changes: dict[str, str],
    ema: bool,
    force: bool,
) -> list[str]:
    """Write the model of a saved state as the file `target`, and return notes for the user.

    `state` is the folder of a state, or of a run, which stands for its newest state. `source` is
    where the model that the training began with lies now, if it was moved. `changes` replace
    settings of `[export]`. With `ema`, the weights are their moving averages. Raises `UsageError`
    for a target that cannot be written, `ResumeError` for a state that is none, is damaged or
    holds no averages, and `ModelError` when the source is gone or changed.
    """
    _check_target(target, force=force)
    if not Path(state).is_dir():
        raise UsageError(
            f"{printable(state)}: there is no such folder, expected a saved state such as "
            "runs/mine/checkpoints/step-00001000, or the folder of a run. Check the path."
        )
    saved = state_to_export(state)
    config = load_config(saved.config_file, asks_model=False)
    export = ExportSettings.model_validate(config.export.model_dump() | changes)
    config = config.model_copy(update={"export": export})
    config = _with_source(config, source)
    fingerprint = saved.identity.get("model fingerprint")
    if fingerprint is None:
        raise ResumeError(
            f"{saved.folder}: an earlier version saved this state without a hash of its model, so "
            "it cannot be told whether the model is the same. Resume it to the end of its run, "
            "which writes the model."
        )
    check_same_source(config, fingerprint)
    model = build_model(config, weights=False)
    with state_weights(saved, model, config, ema=ema) as weights:
        return save_single_file(model, weights, target, config, step=saved.step)


def _check_target(target: Path, *, force: bool) -> None:
    shown = printable(str(target))
    if target.suffix != ".safetensors":
        raise UsageError(
            f"-o {shown}: expected a name that ends in .safetensors. Choose such a name."
        )
    if target.is_dir():
        raise UsageError(f"-o {shown}: found a folder, expected a file. Choose another name.")
    if target.exists() and not force:
        raise UsageError(
            f"-o {shown}: the file exists. Use --force to replace it, or choose another name."
        )
    if not target.parent.is_dir():
        raise UsageError(
            f"-o {shown}: there is no folder {printable(str(target.parent))}. Create it first, or "
            "choose another one."
        )


def _with_source(config: Config, source: str | None) -> Config:
    """The config with the path where the source lies now."""
    if source is None:
        return config
    if config.model.path == RANDOM:
        raise UsageError(
            "--source has no effect: this training began with random weights. Leave it out."
        )
    model = config.model.model_copy(update={"path": source})
    return config.model_copy(update={"model": model})
