"""What the config of a run and its launcher agree on, and where the two disagree.

What a run trains is said once, in its own config: a launcher may say the same, or nothing, and only
of `[engine]` may it say more.
"""

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from capmerge.toml import to_toml
from trainer.config.conflicts import iter_ignored
from trainer.config.engine_conflicts import iter_engine_conflicts
from trainer.config.settings import Config, EngineSettings, SettingPath
from trainer.config.validation import list_mistakes
from trainer.errors import ConfigError
from trainer.training.engines.deepspeed_engine import iter_overruled
from trainer.training.engines.launcher_wishes import (
    Wish,
    accelerate_file,
    is_true,
    read_deepspeed_file,
    unwanted_in_file,
    wishes_of_accelerate,
    wishes_of_deepspeed,
)

_OTHER_ENGINES = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM"}


class Launched(NamedTuple):
    """What the config of a run and its launcher agree on."""

    config: Config
    """The config, whose `[engine]` has what the launcher alone says."""
    uses_deepspeed: bool
    deepspeed_file: dict[str, Any]
    """The content of DeepSpeed's own config file; empty without one."""


def agreed(config: Config, name: str, environment: Mapping[str, str] = os.environ) -> Launched:
    """What the config, whose file is `name`, and the launcher agree on.

    Raises `ConfigError` with a line for each setting on which they do not, with both values and
    both files, and for what the agreed engine leaves without effect or cannot carry out.
    """
    # Which engine?
    for variable, other in _OTHER_ENGINES.items():
        if is_true(environment.get(variable)):
            raise ConfigError(
                f"{accelerate_file()}: found {other}, expected DDP or DeepSpeed, which are the "
                "engines of this trainer. Choose one of them with accelerate config."
            )
    asks = is_true(environment.get("ACCELERATE_USE_DEEPSPEED"))
    if asks and config.engine.kind == "ddp":
        raise ConfigError(
            f'{name}: `engine.kind = "ddp"`, but {accelerate_file()} has DeepSpeed. '
            'Set engine.kind = "auto", or distributed_type: MULTI_GPU there.'
        )
    uses = asks or config.engine.kind == "deepspeed"
    if uses and is_true(environment.get("ACCELERATE_USE_CPU")):
        raise ConfigError(
            f"{accelerate_file()}: found use_cpu: true (ACCELERATE_USE_CPU), with which "
            "accelerate leaves DeepSpeed out, expected false. Set it so: without a GPU, DeepSpeed "
            "trains on the CPU anyway."
        )

    # What does the launcher say, and does the config say the same?
    file, path = dict[str, Any](), ""
    wishes = [*wishes_of_accelerate(environment)]
    problems: list[str] = []
    if asks and (path := environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
        file = read_deepspeed_file(path)
        wishes += wishes_of_deepspeed(file, path)
        problems += unwanted_in_file(file, path, name)
    settings: dict[str, Any] = {}
    for wish in wishes:
        section, key = wish.setting.split(".")
        if section == "engine" and not uses:
            continue
        ours = getattr(getattr(config, section), key)
        if section == "engine" and not _is_said(config.engine, key):
            settings[key] = wish.value
        elif not _is_same(wish, ours):
            problems.append(
                f"{name}: `{wish.setting} = {to_toml(ours)}`, but {wish.where}. "
                "Set both alike, or leave out that of the launcher."
            )
    if problems:
        raise ConfigError("\n".join(dict.fromkeys(problems)))
    document = {"engine": config.engine.model_dump() | settings}
    try:
        engine = TypeAdapter(dict[str, EngineSettings]).validate_python(document)["engine"]
    except ValidationError as error:
        mistakes = list_mistakes(error, document)
        raise ConfigError(
            "\n".join(f"{accelerate_file()}: {mistake.text}" for mistake in mistakes)
        ) from None

    # Can that engine carry it out?
    said = {"kind", *settings, *(key for key in _keys() if _is_said(config.engine, key))}
    kind = "deepspeed" if uses else "ddp"
    meant = EngineSettings.model_construct(said, **{**engine.model_dump(), "kind": kind})
    whole = config.model_copy(update={"engine": meant})
    conflicts: list[tuple[SettingPath, str]] = [*iter_engine_conflicts(whole)]
    conflicts += [
        (one.setting, one.text) for one in iter_ignored(whole) if one.setting[0] == "engine"
    ]
    lines = [
        f"{accelerate_file() if key in settings else name}: {text}{_meaning(config, uses=uses)}"
        for (_, key, *_), text in conflicts
    ]
    lines += iter_overruled(file, path, whole, int(environment.get("WORLD_SIZE", "1")))
    if lines:
        raise ConfigError("\n".join(lines))
    return Launched(config.model_copy(update={"engine": engine}), uses, file)


def _meaning(config: Config, *, uses: bool) -> str:
    """A sentence on the engine that "auto" has come to mean; "" where the config names one."""
    if config.engine.kind != "auto":
        return ""
    meant, asks = ("deepspeed", accelerate_file()) if uses else ("ddp", "no launcher")
    return f' `engine.kind = "auto"` means "{meant}" here, because {asks} asks for DeepSpeed.'


def _keys() -> list[str]:
    return list(EngineSettings.model_fields)


def _is_said(engine: EngineSettings, key: str) -> bool:
    """True if the config itself says what a setting of `[engine]` is.

    The resolved config of a run holds all of them, so with "auto" the defaults say nothing.
    """
    if key not in engine.model_fields_set:
        return False
    default = EngineSettings.model_fields[key].default
    return engine.kind == "deepspeed" or getattr(engine, key) != default


def _is_same(wish: Wish, ours: Any) -> bool:
    """True if the config has what the launcher wishes."""
    if wish.setting != "train.precision":
        return bool(wish.value == ours)
    computed = {"full_bf16": "bf16", "fp32": "no"}.get(ours, ours)
    refused = str(wish.value).removeprefix("not ")
    return bool(computed == wish.value or refused not in (wish.value, computed))
