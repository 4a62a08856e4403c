"""The comparison of a resumed run with its saved state, so that it stays the run that was meant.

Before anything is built, the identity and the config are compared; when the state is loaded, the
arguments and the rates that the saved optimizer brings along. Every difference is refused by name,
or told when the user allows it.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.config.load import leaves_rounding_open, load_config, with_rounding
from trainer.config.resume_rules import Change, list_changes
from trainer.config.settings import Config
from trainer.errors import ConfigError, ResumeError
from trainer.training.optimizer.options import Options, begin_anew, lacks_state, replace_arguments
from trainer.training.optimizer.rates import RateSchedule, list_moved_rates
from trainer.training.states.checkpoint import SavedState

NO_SAVED_CONFIG = (
    "an earlier version saved this state without its config, so only what the state holds could be "
    "compared: its identity, the optimizer's arguments and the learning rates. Make sure that all "
    "other settings are those that the run began with."
)


def with_rounding_of(
    saved: SavedState | None, config: Config, *, uses_deepspeed: bool
) -> tuple[Config, str]:
    """The config with `optimizer.stochastic_rounding` set, and a line to show if a state decides.

    Where the config leaves it open, a resumed run goes on as the `saved` one rounded its weights.
    """
    if saved is None or uses_deepspeed or not leaves_rounding_open(config):
        return with_rounding(config, uses_deepspeed=uses_deepspeed), ""
    before = _saved_config(saved)
    was_bf16 = before is None or before.train.precision == "full_bf16"
    if not was_bf16 or (before and before.optimizer.stochastic_rounding):
        return with_rounding(config), ""
    return with_rounding(config, default=False), (
        f"{saved.folder} is of a run without optimizer.stochastic_rounding, so this one goes on "
        "without it. Set it to true and resume with --allow-change to keep small updates."
    )


def check_same_run(
    saved: SavedState, identity: Mapping[str, Any], config: Config, *, allow_change: bool
) -> list[str]:
    """The differences between a saved run and this one, as lines to show.

    `identity` holds what a resumed run must share besides its settings. Raises `ResumeError` naming
    every difference, unless `allow_change`.
    """
    before = _saved_config(saved)
    changes = {}
    for name in dict.fromkeys((*saved.identity, *identity)):
        change = Change(name, saved.identity.get(name), identity.get(name))
        if change.saved != change.now and _is_comparable(change, before, config):
            changes[name] = change
    if before is not None:
        changes |= {change.name: change for change in list_changes(before, config)}
    lines = [_line(change) for change in changes.values()]
    _refuse(saved, lines, allow_change=allow_change)
    return lines


def check_loaded(
    saved: SavedState,
    rates: RateSchedule,
    built: Options,
    config: Config,
    *,
    allow_change: bool,
) -> list[str]:
    """Give a loaded optimizer the arguments of the config; the differences, as lines to show.

    `built` are its options from before the load, which put those of the saved run in their place.
    An optimizer of another class, or one that now needs more than the saved one had kept, begins
    anew. A state that holds its config was compared by that one, so only its rates are told here.
    Raises `ResumeError` for any difference from an older state, unless `allow_change`.
    """
    before = _saved_config(saved)
    moved = list_moved_rates(rates, saved.step)
    lines = [
        f"{name} of step {saved.step:,}: saved {before_rate:.6g}, now {now_rate:.6g}"
        for name, (before_rate, now_rate) in moved.items()
    ]
    name, was = config.optimizer.name, saved.identity.get("optimizer.name")
    if name != was:
        begin_anew(rates.optimizer, built)
        return [*lines, f"the state of {was} is of no use to {name}, which begins anew"]
    named = None if before is None else {*before.optimizer.arguments, *config.optimizer.arguments}
    replaced = replace_arguments(rates.optimizer, built, named)
    if before is None:
        lines += [
            _line(Change(f"optimizer.arguments.{argument}", *values))
            for argument, values in replaced.items()
        ]
        _refuse(saved, lines, allow_change=allow_change)
    if replaced and lacks_state(rates.optimizer, replaced):
        begin_anew(rates.optimizer, built)
        lines.append(f"{name} needs more with these arguments than it had kept, and begins anew")
    return lines


def _saved_config(saved: SavedState) -> Config | None:
    """The config that a state was saved with; None for a state of an earlier version."""
    if not saved.config_file.exists():
        return None
    try:
        # Earlier versions rounded to the nearest number, and had no setting for it.
        return with_rounding(load_config(saved.config_file, asks_model=False), default=False)
    except ConfigError as error:
        raise ResumeError(
            f"{saved.folder}: this version does not understand the config of the state ({error}). "
            "Resume with the version that saved it, or name another state."
        ) from None


def _is_comparable(change: Change, before: Config | None, config: Config) -> bool:
    """False for fingerprints that were not saved, and for latents that were not moved.

    Latents that are still in the same folder may have been mended there.
    """
    if not change.name.endswith(" fingerprint"):
        return True
    if change.saved is None:
        return False
    if not change.name.endswith(".latents fingerprint") or before is None:
        return True
    number = int(change.name.split(".")[1])
    pair = [one.data[number : number + 1] for one in (before, config)]
    return [d.latents for d in pair[0]] != [d.latents for d in pair[1]]


def _refuse(saved: SavedState, lines: Sequence[str], *, allow_change: bool) -> None:
    if lines and not allow_change:
        raise ResumeError(
            f"{saved.folder}: the run would not continue as it began: {'; '.join(lines)}. "
            "Set them back, or resume with --allow-change: from here on, the run will then differ "
            "from an uninterrupted one."
        )


def _line(change: Change) -> str:
    return f"{change.name}: saved {_shown(change.saved)}, now {_shown(change.now)}"


def _shown(value: Any) -> str:
    return "nothing" if value is None else json.dumps(value, default=str)
