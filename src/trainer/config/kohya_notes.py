"""What a config made of the arguments of sd-scripts leaves out, told in comments."""

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from trainer.config.conflicts import iter_ignored
from trainer.config.kohya import LEFT_OUT, SETTINGS
from trainer.config.kohya_arguments import Arguments
from trainer.config.kohya_optimizer import Options, can_fuse
from trainer.config.settings import Config

OFF: tuple[Any, ...] = (None, False, "", 0, [])
"""Values with which an option of sd-scripts asks for nothing."""


def left_out(asked: Options) -> Iterator[str]:
    """A note on each reason to leave options out, with the options."""
    options_of: dict[str, list[str]] = {}
    for option in asked:
        if reason := LEFT_OUT.get(option):
            options_of.setdefault(reason, []).append(option)
    for reason, options in options_of.items():
        yield f"{', '.join(options)}: {reason}"


def on_memory(options: Options) -> Iterator[str]:
    """A note on each option to save memory that does not do quite the same here."""
    if options.get("fused_backward_pass") and not can_fuse(options):
        yield (
            "fused_backward_pass: optimizer.fused_backward, which saves memory alone, needs "
            "optimizer.clip_grad_norm = 0, train.accumulation = 1, and neither fp16 nor DeepSpeed"
        )
    if options.get("full_bf16") and not options.get("deepspeed"):
        yield (
            "full_bf16: sd-scripts rounds weights to the nearest number, unless Adafactor steps "
            "them with fused_backward_pass; set optimizer.stochastic_rounding = false for the same"
        )


def without_effect(
    asked: Options, arguments: Arguments, document: Mapping[str, Any]
) -> Iterator[str]:
    """A note on each option that has no effect beside the others in sd-scripts either."""
    options, family = {**asked, **arguments.options}, document["model"]["family"]
    schedule = document["optimizer"]["schedule"]
    first = "learning_rate_te1" if family == "sdxl" else "learning_rate_te"
    read = {
        "learning_rate_te": options.get("train_text_encoder") and first == "learning_rate_te",
        "learning_rate_te1": options.get("train_text_encoder") and family == "sdxl",
        "learning_rate_te2": options.get("train_text_encoder") and family == "sdxl",
        "clip_skip": family == "sd1",
        "alpha_mask": family == "sdxl",
        "max_train_steps": not options.get("max_train_epochs"),
        "lr_scheduler_num_cycles": schedule == "cosine_with_restarts",
        "lr_scheduler_power": schedule == "polynomial",
        "in_json": not arguments.subsets,
        "train_data_dir": not arguments.subsets,
        **{
            option: options.get("deepspeed")
            for option, setting in SETTINGS.items()
            if setting.startswith("engine.")
        },
        "train_batch_size": all("batch_size" not in subset for subset in arguments.subsets),
    }
    for option, is_read in read.items():
        if options.get(option) not in OFF and not is_read:
            yield f"{option}: it has no effect in sd-scripts beside the other options"


def drop_ignored(document: dict[str, Any]) -> list[str]:
    """Take out settings that have no effect beside the others; a note on each."""
    notes: list[str] = []
    while True:
        try:
            ignored = list(iter_ignored(Config.model_validate(document)))
        except ValidationError:
            return notes  # told as problems
        if not ignored:
            return notes
        for conflict in ignored:
            *tables, key = conflict.setting
            holder: Any = document
            for table in tables:
                holder = holder[table]
            if holder.pop(key, None) is not None:
                notes.append(conflict.text.partition(". ")[0].replace("`", ""))
