"""The settings that a resumed run may change, as a table, and the comparison of two configs by it.

A run that goes on must be the run that was meant: every setting outside of the table decides what
is trained, or how, and is compared with the config in the saved state.
"""

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from trainer.config.settings import Config, family_of

FREE = (
    # Where and how fast the run works.
    "train.output_dir",
    "train.workers",
    "ema.device",
    # They change no more than rounding, as another card does.
    "speed.*",
    "optimizer.arguments.fused",
    "optimizer.arguments.foreach",
    "optimizer.fused_backward",
    "engine.kind",
    "engine.zero_stage",
    "engine.offload_*",
    "engine.zero3_*",
    "engine.check_ranks_every_steps",
    # The global batch size, which is their product with the ranks, is compared by itself.
    "train.batch_size",
    "train.accumulation",
    # What is saved, logged, and done about faults.
    "checkpoint.*",
    "export.*",
    "validation.every_steps",
    "log.*",
    "samples.*",
    "cache.*",
    "train.on_nonfinite",
    "data.*.on_missing",
    # Moved files: their fingerprints are compared in place of their paths.
    "model.path",
    "model.vae",
    "data.*.metadata",
    "data.*.latents",
    "data.*.index",
)
"""Patterns (`fnmatch`) of the settings that a resumed run may change."""
LENGTH = ("train.max_steps", "train.max_epochs")
"""Settings that a resumed run may change unless another one counts in shares of the whole run."""
LENGTHLESS_SCHEDULES = {"constant", "constant_with_warmup", "piecewise_constant"}
"""The schedules whose rates do not depend on the length of the run."""


class Change(NamedTuple):
    """A setting with different values in the saved config and in the present one."""

    name: str
    """The name of the setting, as `--set` takes it."""
    saved: Any
    """None: it was not set."""
    now: Any


def list_changes(saved: Config, now: Config) -> list[Change]:
    """The settings that differ and that a resumed run may not change by itself."""
    free = FREE if _length_matters(saved) or _length_matters(now) else (*FREE, *LENGTH)
    return [
        change
        for change in _iter_changes(saved, now)
        if not any(fnmatchcase(change.name, pattern) for pattern in free)
    ]


def _length_matters(config: Config) -> bool:
    """True if a rate or a caption depends on how many steps the run will have."""
    return config.optimizer.schedule not in LENGTHLESS_SCHEDULES or any(
        0 < config.caption_of(number).token_warmup_steps < 1 for number in range(len(config.data))
    )


def _iter_changes(saved: Config, now: Config) -> Iterator[Change]:
    """All settings that differ; captions are compared as each data set has them in the end."""
    if len(saved.data) != len(now.data):
        yield Change("number of [[data]]", len(saved.data), len(now.data))
    for section in type(now).model_fields:
        if section not in ("data", "caption"):
            yield from _differences(section, *(_values(config, section) for config in (saved, now)))
    for number, (before, after) in enumerate(zip(saved.data, now.data, strict=False)):
        yield from _differences(
            f"data.{number}",
            before.model_dump(mode="json", exclude={"caption"}),
            after.model_dump(mode="json", exclude={"caption"}),
        )

    # A change that all data sets share is one of [caption].
    sets = range(min(len(saved.data), len(now.data)))
    changed = [
        [*_differences("caption", *(c.caption_of(n).model_dump() for c in (saved, now)))]
        for n in sets
    ]
    shared = [change for change in changed[0] if all(change in others for others in changed)]
    yield from shared
    for number, own in enumerate(changed):
        for change in own:
            if change not in shared:
                yield change._replace(name=f"data.{number}.{change.name}")


def _values(config: Config, section: str) -> dict[str, Any]:
    """The settings of a section; those of the latents as they apply where they are not set."""
    values: dict[str, Any] = getattr(config, section).model_dump(mode="json")
    if section == "model":
        family = family_of(config.model)
        values |= {name: getattr(family, name) for name in values if name.startswith("latent_")}
    return values


def _differences(name: str, saved: Any, now: Any) -> Iterator[Change]:
    """The different values of a setting, or of the settings in a table."""
    if isinstance(saved, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*saved, *now)):
            yield from _differences(f"{name}.{key}", saved.get(key), now.get(key))
    elif saved != now:
        yield Change(name, saved, now)
