"""Combinations of settings that cannot be carried out.

Owns the checks of all of them but those that only DeepSpeed knows. Knows no files and no pydantic
errors.
"""

from collections.abc import Iterator

from capmerge.toml import to_toml
from trainer.config.conflicts import Conflict
from trainer.config.engine_conflicts import iter_engine_conflicts
from trainer.config.settings import Config, SettingPath, family_of


def iter_impossible(config: Config) -> Iterator[Conflict]:
    """The combinations of settings that cannot be carried out."""
    for check in (
        _no_end,
        _nothing_trained,
        _no_timesteps,
        _last_step_unlearnable,
        _no_snr_of_a_flow,
        _no_least_loss,
        _no_step_rules,
        _held_out_twice,
        _shapes_without_end,
        _no_fused_backward,
        _no_kahan_sum,
        _no_buckets,
    ):
        yield from check(config)
    for setting, text in iter_engine_conflicts(config):
        sections = {"engine", "train", "optimizer", "speed", "samples"}
        yield Conflict(setting, frozenset(sections), text)
    yield from _separators_alike(config)


def _no_end(config: Config) -> Iterator[Conflict]:
    if config.train.max_steps is None and config.train.max_epochs is None:
        text = (
            "found neither `train.max_steps` nor `train.max_epochs`, expected one of them. "
            "Add max_steps = 1000 to [train]."
        )
        yield Conflict(("train", "max_steps"), frozenset({"train"}), text)


def _nothing_trained(config: Config) -> Iterator[Conflict]:
    names = [
        "learning_rate",
        "text_learning_rate",
        *(["text2_learning_rate"] if config.model.family == "sdxl" else []),
    ]
    if not any(getattr(config.optimizer, name) for name in names):
        listed = " and ".join(f"`optimizer.{name}`" for name in names)
        text = (
            f"{listed} are 0, so nothing would be trained. "
            "Set one of them, for instance learning_rate = 1e-5."
        )
        yield Conflict(("optimizer", "learning_rate"), frozenset({"optimizer", "model"}), text)


def _no_timesteps(config: Config) -> Iterator[Conflict]:
    low, high = config.noise.min_timestep, config.noise.max_timestep
    if low >= high:
        text = (
            f"`noise.min_timestep = {low}` is not below `noise.max_timestep = {high}`. "
            "Lower the first or raise the second."
        )
        yield Conflict(("noise", "min_timestep"), frozenset({"noise"}), text)


def _last_step_unlearnable(config: Config) -> Iterator[Conflict]:
    if config.noise.zero_terminal_snr and config.noise.prediction == "epsilon":
        text = (
            '`noise.zero_terminal_snr = true` does not work with `noise.prediction = "epsilon"`: '
            "it makes the last timestep pure noise, and predicting that teaches nothing. "
            'Set noise.prediction = "v", or remove noise.zero_terminal_snr.'
        )
        yield Conflict(("noise", "zero_terminal_snr"), frozenset({"noise"}), text)


def _no_snr_of_a_flow(config: Config) -> Iterator[Conflict]:
    loss = config.loss
    if (
        config.noise.prediction == "flow"
        and loss.kind in ("huber", "smooth_l1")
        and loss.huber_schedule == "snr"
    ):
        default = "" if "huber_schedule" in loss.model_fields_set else ", the default,"
        text = (
            f'`loss.huber_schedule = "snr"`{default} does not work with '
            '`noise.prediction = "flow"`: it follows the SNR of the timesteps of the other '
            "predictions. Set loss.huber_schedule to constant or exponential."
        )
        yield Conflict(("loss", "huber_schedule"), frozenset({"noise", "loss"}), text)


def _no_least_loss(config: Config) -> Iterator[Conflict]:
    loss = config.loss
    if config.noise.prediction == "flow" and loss.contrastive and loss.kind != "l2":
        text = (
            f"`loss.contrastive = {loss.contrastive:g}` does not work with "
            f'`loss.kind = "{loss.kind}"`: the square that it subtracts outgrows that distance, so '
            'the loss would fall without end. Set loss.kind = "l2", or remove loss.contrastive.'
        )
        yield Conflict(("loss", "contrastive"), frozenset({"noise", "loss"}), text)


def _no_step_rules(config: Config) -> Iterator[Conflict]:
    if (
        config.optimizer.schedule == "piecewise_constant"
        and "step_rules" not in config.optimizer.schedule_arguments
    ):
        text = (
            '`optimizer.schedule = "piecewise_constant"` needs '
            "`optimizer.schedule_arguments.step_rules`, found none. "
            'Add schedule_arguments = {step_rules = "1:1000,0.1"} to [optimizer] for the full rate '
            "up to step 1000, then a tenth."
        )
        yield Conflict(("optimizer", "schedule"), frozenset({"optimizer"}), text)


def _held_out_twice(config: Config) -> Iterator[Conflict]:
    records, share = config.validation.records, config.validation.share
    if records and share:
        text = (
            f"`validation.records = {records}` and `validation.share = {share:g}` both say how "
            "many records are held out, expected one of them. Remove the other."
        )
        yield Conflict(("validation", "share"), frozenset({"validation"}), text)


def _shapes_without_end(config: Config) -> Iterator[Conflict]:
    text, speed = config.text, config.speed
    if (
        speed.compile
        and text.max_tokens == "unlimited"
        and not text.dynamic_chunks
        and text.chunking != "crop"
    ):
        found = (
            '`speed.compile = true` does not work with `text.max_tokens = "unlimited"` and '
            "`text.dynamic_chunks = false`: the longest caption of each micro-batch decides its "
            "shape, and each shape is compiled. Set text.dynamic_chunks = true, or a limit."
        )
        yield Conflict(("speed", "compile"), frozenset({"speed", "text"}), found)


def _no_fused_backward(config: Config) -> Iterator[Conflict]:
    if not config.optimizer.fused_backward:
        return
    for section, key, value, reason in (
        ("train", "accumulation", 1, "gradients are summed over the micro-batches"),
        ("train", "on_nonfinite", "stop", "a broken step is taken before it is noticed"),
        ("optimizer", "clip_grad_norm", 0, "clipping needs the norm of the whole gradient"),
    ):
        found = getattr(getattr(config, section), key)
        if found != value:
            text = (
                f"`optimizer.fused_backward = true` does not work with `{section}.{key} = "
                f"{to_toml(found)}`: {reason}. Set {section}.{key} = {to_toml(value)}, or remove "
                "optimizer.fused_backward."
            )
            yield Conflict(("optimizer", "fused_backward"), frozenset({"train", "optimizer"}), text)
    if config.train.precision == "fp16":
        text = (
            '`optimizer.fused_backward = true` does not work with `train.precision = "fp16"`: a '
            "step whose gradients overflow fp16 has to be skipped. Set train.precision to bf16, or "
            "remove optimizer.fused_backward."
        )
        yield Conflict(("optimizer", "fused_backward"), frozenset({"train", "optimizer"}), text)


def _no_kahan_sum(config: Config) -> Iterator[Conflict]:
    """Optimizers of pytorch-optimizer read it for weights in bf16 alone.

    Not set, it is often on there, and quietly off where weights are in fp32.
    """
    if not config.optimizer.arguments.get("kahan_sum"):
        return
    if config.train.precision != "full_bf16":
        cause = f"`train.precision = {to_toml(config.train.precision)}`"
        instead = 'set train.precision to "full_bf16" and optimizer.stochastic_rounding to false'
    elif config.optimizer.stochastic_rounding is not False:
        default = "" if config.optimizer.stochastic_rounding else ", the default"
        cause = f"`optimizer.stochastic_rounding = true`{default}"
        instead = "set optimizer.stochastic_rounding to false"
    else:
        return
    text = (
        f"`optimizer.arguments.kahan_sum` has no effect with {cause}: it keeps what bf16 weights "
        f"lose, and the optimizer steps weights in fp32. Remove it, or {instead}."
    )
    yield Conflict(("optimizer", "arguments", "kahan_sum"), frozenset({"train", "optimizer"}), text)


def _no_buckets(config: Config) -> Iterator[Conflict]:
    """Limits that the square bucket of `[cache]` lies outside of, so pictures would fit nowhere."""
    cache = config.cache
    resolution = cache.resolution or family_of(config.model).side_px
    for key, found, wrong, needed in (
        ("bucket_steps", cache.bucket_steps, cache.bucket_steps > resolution, "at most"),
        ("bucket_min", cache.bucket_min, (cache.bucket_min or 0) > resolution, "at most"),
        (
            "bucket_max",
            cache.bucket_max,
            cache.bucket_max is not None and cache.bucket_max < resolution,
            "at least",
        ),
    ):
        if wrong:
            text = (
                f"`cache.{key} = {found}`, expected {needed} `cache.resolution`, which is "
                f"{resolution}. Change one of them."
            )
            yield Conflict(("cache", key), frozenset({"cache", "model"}), text)


def _separators_alike(config: Config) -> Iterator[Conflict]:
    for number in range(len(config.data)):
        caption = config.caption_of(number)
        if caption.secondary_separator == caption.separator:
            own = config.data[number].caption.model_fields_set & {
                "separator",
                "secondary_separator",
            }
            same = f"`caption.separator = {to_toml(caption.separator)}`"
            text = (
                f"`caption.secondary_separator` has no effect with {same}: they are the same. "
                "Remove it."
            )
            table: SettingPath = ("data", number, "caption") if own else ("caption",)
            yield Conflict((*table, "secondary_separator"), frozenset({"caption", "data"}), text)
