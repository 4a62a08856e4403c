"""The optimizer, its rates and their schedule, from the arguments of sd-scripts.

Refuses, by name, what has no counterpart here.
"""

import ast
import re
from collections.abc import Mapping
from typing import Any

from capmerge.errors import printable
from capmerge.toml import to_toml
from trainer.errors import ConfigError
from trainer.families import FamilyName

Options = Mapping[str, Any]
"""Option of sd-scripts, without dashes -> its value."""

_OPTIMIZERS = {
    "adamw": "AdamW",
    "adamw8bit": "AdamW8bit",
    "pagedadamw": "PagedAdamW",
    "pagedadamw8bit": "PagedAdamW8bit",
    "pagedadamw32bit": "PagedAdamW32bit",
    "lion": "Lion",
    "lion8bit": "Lion8bit",
    "pagedlion8bit": "PagedLion8bit",
    "dadaptation": "DAdaptAdam",
    "dadaptadam": "DAdaptAdam",
    "dadaptadagrad": "DAdaptAdaGrad",
    "dadaptadan": "DAdaptAdan",
    "dadaptlion": "DAdaptLion",
    "dadaptsgd": "DAdaptSGD",
    "prodigy": "Prodigy",
    "adafactor": "Adafactor",
    "sgdnesterov": "SGD",
    "radamschedulefree": "ScheduleFreeRAdam",
    "adamwschedulefree": "ScheduleFreeAdamW",
    "sgdschedulefree": "ScheduleFreeSGD",
}
"""What sd-scripts calls an optimizer, in any case -> `optimizer.name`."""
_PACKAGES = ("torch.optim.", "bitsandbytes.optim.", "pytorch_optimizer.")


def convert_optimizer(options: Options, family: FamilyName) -> dict[str, Any]:
    """The optimizer, its arguments and the rates of the text encoders, as `section.key` -> value.

    None stands for a setting that is not given. Raises `ConfigError` for what has no counterpart.
    """
    asked = str(options.get("optimizer_type") or "AdamW")
    if options.get("use_8bit_adam"):
        asked = "AdamW8bit"
    elif options.get("use_lion_optimizer"):
        asked = "Lion"
    package = next((start for start in _PACKAGES if asked.startswith(start)), "")
    name = asked.removeprefix(package) if package else _OPTIMIZERS.get(asked.lower())
    if not name or "." in name:
        raise ConfigError(
            f"optimizer_type: {printable(asked)} has no counterpart here. Choose one of "
            f"{', '.join(sorted(_OPTIMIZERS.values()))}, or a class of torch.optim, "
            "bitsandbytes.optim or pytorch_optimizer."
        )
    given = _literals("optimizer_args", options)
    if name == "SGD" and asked.lower() == "sgdnesterov":
        given = {"nesterov": True, "momentum": 0.9} | given
    if name == "Adafactor":
        if given.get("relative_step", True):
            raise ConfigError(
                "optimizer_args: Adafactor with relative_step, its default in sd-scripts, has a "
                "rate of its own. Add relative_step=False and a learning_rate."
            )
        given = {"scale_parameter": True} | given
    found: dict[str, Any] = {"optimizer.name": name, "optimizer.arguments": given or None}
    rate, trains = options["learning_rate"], options.get("train_text_encoder")
    first = "learning_rate_te1" if family == "sdxl" else "learning_rate_te"
    found["optimizer.text_learning_rate"] = options.get(first, rate) if trains else None
    found["optimizer.text2_learning_rate"] = (
        options.get("learning_rate_te2", rate) if trains and family == "sdxl" else None
    )
    return found


def _literals(option: str, options: Options) -> dict[str, Any]:
    """The values of arguments that are given as name=value, each in the words of Python."""
    found: dict[str, Any] = {}
    texts = options.get(option) or []
    for text in texts if isinstance(texts, list) else [texts]:
        key, _, value = str(text).partition("=")
        try:
            found[key] = ast.literal_eval(value)
            to_toml(found[key])
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            raise ConfigError(
                f"{option}: found {printable(str(text))}, expected name=value, such as "
                "weight_decay=0.01. Mend it."
            ) from None
    return found


def convert_schedule(options: Options) -> dict[str, Any]:
    """The schedule of the learning rates, its warm-up and its arguments, in the same way."""
    name = options.get("lr_scheduler", "constant")
    given = _literals("lr_scheduler_args", options)
    for schedule, key in (("cosine_with_restarts", "num_cycles"), ("polynomial", "power")):
        value = options.get(f"lr_scheduler_{key}")
        if value is not None and name == schedule:
            given = {key: value} | given
    warmup = options.get("lr_warmup_steps", 0)
    if isinstance(warmup, str) and re.fullmatch(r"\d+(\.\d*)?%", warmup):
        warmup = float(warmup[:-1]) / 100
    steps = options["max_train_steps"]
    if isinstance(warmup, float) and 0 < warmup < 1 and isinstance(steps, int):
        if "max_train_epochs" in options:
            raise ConfigError(
                f"lr_warmup_steps: {warmup:g} is a share of a number of steps that "
                "max_train_epochs does not tell. Give a number of steps."
            )
        warmup = int(warmup * steps)
    return {
        "optimizer.schedule": name,
        "optimizer.schedule_arguments": given or None,
        "optimizer.warmup_steps": warmup or None,
    }


def can_fuse(options: Options) -> bool:
    """True if steps are asked for inside the backward pass, and are possible there."""
    return bool(
        options.get("fused_backward_pass")
        and options.get("max_grad_norm") == 0
        and options.get("gradient_accumulation_steps", 1) == 1
        and not options.get("deepspeed")
        and (options.get("full_bf16") or options.get("mixed_precision") != "fp16")
    )
