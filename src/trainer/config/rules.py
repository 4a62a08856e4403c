"""The table of settings that others leave without effect, and of those that are always read.

A setting that is given but not read in a combination is an error, whatever its value: nothing is
silently without effect. A limit that a run may not reach (`checkpoint.every_steps` past
`train.max_steps`) is read, so it is no error.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple


class Rule(NamedTuple):
    """Settings that have no effect while others have certain values, all named `section.key`."""

    settings: tuple[str, ...]
    when: Mapping[str, tuple[Any, ...]]
    """The rule needs each of these settings to have one of these values, ..."""
    instead: str
    """The next step for the user: the change that gives the settings their effect."""
    unless: Mapping[str, tuple[Any, ...]] = {}
    """... and none of these settings to have one of these values."""


_SPLIT_OFF: dict[str, tuple[Any, ...]] = {
    "caption.shuffle": (False,),
    "caption.tag_dropout_rate": (0,),
    "caption.token_warmup_steps": (0,),
}
"""Values with which sd-scripts does not split a caption into tags, but passes its text verbatim.

Source: sd-scripts-facts B2, step 4.
"""

_FROM_TAGS = ("caption.shuffle", "caption.token_warmup_steps", "caption.token_warmup_min")
_FROM_TEXT = (
    "caption.pick",
    *_FROM_TAGS,
    "caption.keep_tokens",
    "caption.separator",
    "caption.keep_tokens_separator",
    "caption.secondary_separator",
    "caption.tag_dropout_rate",
    "caption.sentences",
)
_OF_KEPT = (*_FROM_TEXT, "text.random_caption_rate", "text.word_repeat_rate")
"""Settings that only concern captions that are not dropped."""

_OF_DEEPSPEED = (
    "engine.zero_stage",
    "engine.offload_optimizer_device",
    "engine.offload_optimizer_nvme_path",
    "engine.offload_param_device",
    "engine.offload_param_nvme_path",
    "engine.zero3_init_flag",
    "engine.zero3_save_16bit_model",
    "engine.fp16_master_weights_and_gradients",
)


def _argument_of(name: str, *schedules: str) -> Rule:
    schedule = {"optimizer.schedule": schedules}
    return Rule(
        (f"optimizer.schedule_arguments.{name}",),
        {},
        f"set optimizer.schedule to {' or '.join(schedules)}",
        unless=schedule,
    )


RULES = (
    Rule(("model.size",), {}, 'set model.path to "random"', unless={"model.path": ("random",)}),
    Rule(("model.variant",), {"model.path": ("random",)}, "set model.path to a diffusers folder"),
    Rule(
        ("model.train_only", "model.freeze"),
        {"optimizer.learning_rate": (0,)},
        "give the U-Net a learning rate",
    ),
    Rule(
        ("caption.keep_tokens", "caption.keep_tokens_separator", "caption.sentences"),
        _SPLIT_OFF,
        "set one of these three",
    ),
    Rule(
        ("caption.separator",),
        {**_SPLIT_OFF, "caption.secondary_separator": ("",)},
        "set one of these four",
    ),
    Rule(
        ("caption.token_warmup_min",),
        {"caption.token_warmup_steps": (0,)},
        "set caption.token_warmup_steps",
    ),
    Rule(_FROM_TAGS, {"caption.tag_dropout_rate": (1,)}, "set caption.tag_dropout_rate below 1"),
    Rule(
        (*_OF_KEPT, "caption.dropout_every_epochs"),
        {"caption.dropout_rate": (1,)},
        "set caption.dropout_rate below 1",
    ),
    Rule(
        (*_OF_KEPT, "caption.dropout_rate"),
        {"caption.dropout_every_epochs": (1,)},
        "set caption.dropout_every_epochs to 2 or more",
    ),
    Rule(
        (*_FROM_TEXT, "text.word_repeat_rate"),
        {"text.random_caption_rate": (1,)},
        "set text.random_caption_rate below 1",
    ),
    Rule(
        ("text.max_tokens", "text.dynamic_chunks"),
        {"text.chunking": ("crop",)},
        "set text.chunking to kohya or a1111",
    ),
    Rule(
        ("text.dynamic_chunks",), {"text.max_tokens": (75,)}, "set text.max_tokens to 150 or more"
    ),
    Rule(("text.clip_skip",), {"model.family": ("sd2", "sdxl")}, "set model.family to sd1"),
    Rule(
        (
            "noise.offset",
            "noise.multires_iterations",
            "noise.input_perturbation",
            "loss.min_snr_gamma",
            "loss.debiased",
        ),
        {"noise.prediction": ("flow",)},
        "set noise.prediction to epsilon or v",
    ),
    Rule(
        ("noise.zero_terminal_snr",), {"noise.prediction": ("flow",)}, "set noise.prediction to v"
    ),
    Rule(
        (
            "noise.timestep_sampling",
            "noise.timestep_mean",
            "noise.timestep_std",
            "noise.shift",
            "loss.contrastive",
        ),
        {"noise.prediction": ("epsilon", "v")},
        "set noise.prediction to flow",
    ),
    Rule(
        ("noise.timestep_mean", "noise.timestep_std"),
        {"noise.timestep_sampling": ("uniform",)},
        "set noise.timestep_sampling to logit_normal",
    ),
    Rule(
        ("noise.multires_discount",),
        {"noise.multires_iterations": (0, 1)},
        "set noise.multires_iterations to 2 or more",
    ),
    Rule(
        ("loss.huber_c", "loss.huber_schedule", "loss.huber_scale"),
        {"loss.kind": ("l2", "l1")},
        "set loss.kind to huber or smooth_l1",
    ),
    Rule(
        ("loss.huber_scale",),
        {"loss.huber_schedule": ("snr",)},
        "set loss.huber_schedule to constant or exponential",
    ),
    Rule(
        ("loss.v_like_noise",),
        {"noise.prediction": ("epsilon", "flow")},
        "set noise.prediction to v",
    ),
    Rule(
        ("loss.v_pred_like",),
        {"noise.prediction": ("v", "flow")},
        "set noise.prediction to epsilon",
    ),
    Rule(
        ("optimizer.text2_learning_rate",),
        {"model.family": ("sd1", "sd2")},
        "set model.family to sdxl",
    ),
    Rule(
        ("optimizer.warmup_steps",),
        {"optimizer.schedule": ("constant", "piecewise_constant")},
        "set optimizer.schedule to constant_with_warmup or one that falls",
    ),
    Rule(
        ("optimizer.stochastic_rounding",),
        {"train.precision": ("fp32", "bf16", "fp16")},
        'set train.precision to "full_bf16"',
    ),
    _argument_of("num_cycles", "cosine", "cosine_with_restarts"),
    _argument_of("power", "polynomial"),
    _argument_of("lr_end", "polynomial"),
    _argument_of("f_min", "linear"),
    _argument_of("f_max", "linear"),
    _argument_of("step_rules", "piecewise_constant"),
    Rule(
        ("export.title",),
        {"export.formats": (("diffusers",),)},
        'add "single" to export.formats',
    ),
    Rule(_OF_DEEPSPEED, {"engine.kind": ("ddp",)}, "set engine.kind to deepspeed"),
    Rule(
        ("engine.offload_optimizer_device",),
        {"engine.zero_stage": (0,)},
        "set engine.zero_stage to 1, 2 or 3",
    ),
    Rule(
        ("engine.offload_optimizer_nvme_path",),
        {"engine.offload_optimizer_device": ("none", "cpu")},
        "set engine.offload_optimizer_device to nvme",
    ),
    Rule(
        ("engine.offload_param_device", "engine.zero3_init_flag", "engine.zero3_save_16bit_model"),
        {"engine.zero_stage": (0, 1, 2)},
        "set engine.zero_stage to 3",
    ),
    Rule(
        ("engine.offload_param_nvme_path",),
        {"engine.offload_param_device": ("none", "cpu")},
        "set engine.offload_param_device to nvme",
    ),
    Rule(
        ("engine.zero3_save_16bit_model",),
        {"train.precision": ("fp32", "full_bf16")},
        "set train.precision to bf16 or fp16",
    ),
    Rule(
        ("engine.fp16_master_weights_and_gradients",),
        {"train.precision": ("fp32", "bf16", "full_bf16")},
        "set train.precision to fp16",
    ),
    Rule(
        ("validation.every_steps",),
        {"validation.records": (0,), "validation.share": (0,)},
        "set one of these two",
    ),
    Rule(("ema.warmup_steps", "ema.device"), {"ema.decay": (0,)}, "set ema.decay"),
    Rule(("samples.every_steps",), {"samples.prompts": ((),)}, "add [[samples.prompts]]"),
    Rule(("log.project",), {"log.trackers": ((),)}, "set log.trackers"),
    Rule(("cache.seed",), {"cache.latents": ("mean",)}, 'set cache.latents to "sample"'),
    Rule(
        ("cache.bucket_min", "cache.bucket_max"),
        {"cache.upscale": (False,)},
        "set cache.upscale to true",
    ),
    Rule(("cache.metadata_output",), {"cache.metadata": ("",)}, "set cache.metadata"),
)
