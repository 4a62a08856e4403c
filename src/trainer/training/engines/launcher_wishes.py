"""What a launcher says of a run, in the words of this trainer's settings.

`accelerate launch` tells its processes by variables of the environment what its own config says,
and names a config file of DeepSpeed there. `torchrun` says nothing.
"""

import base64
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from capmerge.errors import in_words
from trainer.config.settings import EngineSettings
from trainer.errors import ConfigError


class Wish(NamedTuple):
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


def wishes_of_accelerate(environment: Mapping[str, str]) -> Iterator[Wish]:
    """The wishes in the variables of `accelerate launch`."""
    for variable, (its_name, setting) in _OF_ACCELERATE.items():
        if variable not in environment or environment[variable].lower() in ("none", "auto"):
            continue
        value = _value(environment[variable], setting)
        if (setting, value) not in _SAYS_NOTHING:
            where = f"{its_name}: {environment[variable]} in {accelerate_file()}"
            yield Wish(setting, value, where)


def _value(text: str, setting: str) -> Any:
    """The value in a variable of the environment."""
    default = EngineSettings.model_fields.get(setting.split(".")[1])
    if default and isinstance(default.default, bool):
        return is_true(text)
    if setting in ("engine.zero_stage", "train.accumulation"):
        return int(text) if text.isdigit() else text
    try:
        if setting.endswith("nvme_path"):
            return text
        return float(text) if setting == "optimizer.clip_grad_norm" else text.lower()
    except ValueError:
        return text


def wishes_of_deepspeed(file: Mapping[str, Any], path: str) -> Iterator[Wish]:
    """The wishes in a config file of DeepSpeed."""
    for its_name, setting in _OF_DEEPSPEED.items():
        value = _value_at(file, its_name)
        if value in (None, "auto"):
            continue
        where = f"{its_name}: {json.dumps(value)} in {path}"
        if setting == "train.precision":
            kind = its_name.partition(".")[0]
            value = kind if value else f"not {kind}"
        yield Wish(setting, value, where)


def unwanted_in_file(file: Mapping[str, Any], path: str, name: str) -> Iterator[str]:
    """What a config file of DeepSpeed says that this trainer decides, or needs otherwise."""
    for section, ours in (("optimizer", "optimizer.name"), ("scheduler", "optimizer.schedule")):
        if section in file:
            yield (
                f"{path}: found {section}, expected none: {ours} in {name} decides it. Remove it."
            )
    for its_name, reason in _NEEDED.items():
        if _value_at(file, its_name) is False:
            yield f"{path}: found {its_name}: false, but {reason}. Remove it."


def _value_at(file: Mapping[str, Any], name: str) -> Any:
    """The value at `section.key`; None if there is none."""
    found: Any = file
    for key in name.split("."):
        found = found.get(key) if isinstance(found, Mapping) else None
    return found


def read_deepspeed_file(path: str) -> dict[str, Any]:
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


def is_true(text: str | None) -> bool:
    """True for what accelerate takes for true in a variable; None is a variable that is not set."""
    return (text or "").lower() in ("true", "1", "yes")


def accelerate_file() -> str:
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
