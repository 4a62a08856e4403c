"""What a launcher asks for beside the config of a run, and where the two disagree.

`accelerate launch` tells its processes by variables of the environment what its own config says,
and names a config file of DeepSpeed there. What a run trains is said once, in its own config: a
launcher may say the same, or nothing, and only of `[engine]` may it say more. `torchrun` asks for
nothing.
"""

import base64
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from capmerge.errors import in_words
from capmerge.toml import to_toml
from trainer.config.conflicts import iter_ignored
from trainer.config.engine_conflicts import iter_engine_conflicts
from trainer.config.settings import Config, EngineSettings, SettingPath
from trainer.config.validation import list_mistakes
from trainer.errors import ConfigError
from trainer.training.engines.deepspeed_engine import iter_overruled


class _Wish(NamedTuple):
    """A setting as the launcher has it."""

    setting: str
    """The setting of this trainer that decides the same."""
    value: Any
    where: str
    """The name of the setting in the file of the launcher, for people."""


# What accelerate passes on, by variable: its own name for it, and the setting of this trainer.
_OF_ACCELERATE = {
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": ("zero_stage", "engine.zero_stage"),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": (
        "offload_optimizer_device",
        "engine.offload_optimizer_device",
    ),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": (
        "offload_optimizer_nvme_path",
        "engine.offload_optimizer_nvme_path",
    ),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": (
        "offload_param_device",
        "engine.offload_param_device",
    ),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": (
        "offload_param_nvme_path",
        "engine.offload_param_nvme_path",
    ),
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": ("zero3_init_flag", "engine.zero3_init_flag"),
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": (
        "zero3_save_16bit_model",
        "engine.zero3_save_16bit_model",
    ),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "gradient_accumulation_steps",
        "train.accumulation",
    ),
    "ACCELERATE_GRADIENT_CLIPPING": ("gradient_clipping", "optimizer.clip_grad_norm"),
    "ACCELERATE_MIXED_PRECISION": ("mixed_precision", "train.precision"),
}
_SAYS_NOTHING = {
    # accelerate passes these on when nobody has set them.
    ("train.accumulation", 1),
    ("train.precision", "no"),
}
# The same in a config file of DeepSpeed.
_OF_DEEPSPEED = {
    "zero_optimization.stage": "engine.zero_stage",
    "zero_optimization.offload_optimizer.device": "engine.offload_optimizer_device",
    "zero_optimization.offload_optimizer.nvme_path": "engine.offload_optimizer_nvme_path",
    "zero_optimization.offload_param.device": "engine.offload_param_device",
    "zero_optimization.offload_param.nvme_path": "engine.offload_param_nvme_path",
    "zero_optimization.stage3_gather_16bit_weights_on_model_save": "engine.zero3_save_16bit_model",
    "fp16.fp16_master_weights_and_grads": "engine.fp16_master_weights_and_gradients",
    "train_micro_batch_size_per_gpu": "train.batch_size",
    "gradient_accumulation_steps": "train.accumulation",
    "gradient_clipping": "optimizer.clip_grad_norm",
    "fp16.enabled": "train.precision",
    "bf16.enabled": "train.precision",
}
_NEEDED = {
    "bf16.check_grad_overflow": "steps with a broken gradient are always left out",
    "zero_optimization.compute_grad_norm": "the norm of the gradient is always computed",
}
"""What a config file of DeepSpeed must not turn off."""
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
        if _is_true(environment.get(variable)):
            raise ConfigError(
                f"{_accelerate_file()}: found {other}, expected DDP or DeepSpeed, which are the "
                "engines of this trainer. Choose one of them with accelerate config."
            )
    asks = _is_true(environment.get("ACCELERATE_USE_DEEPSPEED"))
    if asks and config.engine.kind == "ddp":
        raise ConfigError(
            f'{name}: `engine.kind = "ddp"`, but {_accelerate_file()} has DeepSpeed. '
            'Set engine.kind = "auto", or distributed_type: MULTI_GPU there.'
        )
    uses = asks or config.engine.kind == "deepspeed"
    if uses and _is_true(environment.get("ACCELERATE_USE_CPU")):
        raise ConfigError(
            f"{_accelerate_file()}: found use_cpu: true (ACCELERATE_USE_CPU), with which "
            "accelerate leaves DeepSpeed out, expected false. Set it so: without a GPU, DeepSpeed "
            "trains on the CPU anyway."
        )

    # What does the launcher say, and does the config say the same?
    file, path = dict[str, Any](), ""
    wishes = [*_of_accelerate(environment)]
    problems: list[str] = []
    if asks and (path := environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")) != "none":
        file = _read(path)
        wishes += _of_deepspeed(file, path)
        problems += _unwanted(file, path, name)
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
            "\n".join(f"{_accelerate_file()}: {mistake.text}" for mistake in mistakes)
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
        f"{_accelerate_file() if key in settings else name}: {text}{_meaning(config, uses=uses)}"
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
    meant, asks = ("deepspeed", _accelerate_file()) if uses else ("ddp", "no launcher")
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


def _of_accelerate(environment: Mapping[str, str]) -> Iterator[_Wish]:
    """The wishes in the variables of `accelerate launch`."""
    for variable, (its_name, setting) in _OF_ACCELERATE.items():
        if variable not in environment or environment[variable].lower() in ("none", "auto"):
            continue
        value = _value(environment[variable], setting)
        if (setting, value) not in _SAYS_NOTHING:
            where = f"{its_name}: {environment[variable]} in {_accelerate_file()}"
            yield _Wish(setting, value, where)


def _value(text: str, setting: str) -> Any:
    """The value in a variable of the environment."""
    default = EngineSettings.model_fields.get(setting.split(".")[1])
    if default and isinstance(default.default, bool):
        return _is_true(text)
    if setting in ("engine.zero_stage", "train.accumulation"):
        return int(text) if text.isdigit() else text
    try:
        if setting.endswith("nvme_path"):
            return text
        return float(text) if setting == "optimizer.clip_grad_norm" else text.lower()
    except ValueError:
        return text


def _of_deepspeed(file: Mapping[str, Any], path: str) -> Iterator[_Wish]:
    """The wishes in a config file of DeepSpeed."""
    for its_name, setting in _OF_DEEPSPEED.items():
        value = value_at(file, its_name)
        if value in (None, "auto"):
            continue
        where = f"{its_name}: {json.dumps(value)} in {path}"
        if setting == "train.precision":
            kind = its_name.partition(".")[0]
            value = kind if value else f"not {kind}"
        yield _Wish(setting, value, where)


def _unwanted(file: Mapping[str, Any], path: str, name: str) -> Iterator[str]:
    """What a config file of DeepSpeed says that this trainer decides, or needs otherwise."""
    for section, ours in (("optimizer", "optimizer.name"), ("scheduler", "optimizer.schedule")):
        if section in file:
            yield (
                f"{path}: found {section}, expected none: {ours} in {name} decides it. Remove it."
            )
    for its_name, reason in _NEEDED.items():
        if value_at(file, its_name) is False:
            yield f"{path}: found {its_name}: false, but {reason}. Remove it."


def _is_same(wish: _Wish, ours: Any) -> bool:
    """True if the config has what the launcher wishes."""
    if wish.setting != "train.precision":
        return bool(wish.value == ours)
    computed = {"full_bf16": "bf16", "fp32": "no"}.get(ours, ours)
    refused = str(wish.value).removeprefix("not ")
    return bool(computed == wish.value or refused not in (wish.value, computed))


def value_at(file: Mapping[str, Any], name: str) -> Any:
    """The value at `section.key`; None if there is none."""
    found: Any = file
    for key in name.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def _read(path: str) -> dict[str, Any]:
    """The config of DeepSpeed at `path`; accelerate also takes the text itself, in base64."""
    try:
        # Path.exists() raises an error for a name that is too long.
        if os.path.exists(path):  # noqa: PTH110
            content = json.loads(Path(path).read_text(encoding="utf-8"))
        else:
            content = json.loads(base64.urlsafe_b64decode(path))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: found no config of DeepSpeed ({in_words(error)}), expected a file of JSON. "
            "Correct deepspeed_config_file in the config of accelerate."
        ) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected a config of DeepSpeed, an object of JSON.")
    return content


def _is_true(text: str | None) -> bool:
    return (text or "").lower() in ("true", "1", "yes")


def _accelerate_file() -> str:
    """The config file of accelerate, for people.

    Its launcher passes on no path, so that is read from its command line where that can be seen.
    """
    pid = os.getppid()
    try:
        while pid > 1:
            words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
            for number, word in enumerate(words):
                if word == "--config_file":
                    return words[number + 1]
                if word.startswith("--config_file="):
                    return word.partition("=")[2]
            status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
            pid = int(status.partition("PPid:")[2].split()[0])
    except (OSError, ValueError, IndexError):  # another system, or another user's process
        pass
    from accelerate.commands.config.config_args import default_config_file

    if Path(default_config_file).is_file():
        return str(default_config_file)
    return "the options or the environment of the launcher (ACCELERATE_...)"
