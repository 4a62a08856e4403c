"""Conflicts between settings: without effect beside others, or impossible to carry out together.

Applies the table of `rules`, and owns the checks of combinations that cannot be carried out. A
value that turns a setting off (false, 0, "") asks for nothing and is never refused. Knows no files
and no pydantic errors.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from capmerge.toml import to_toml
from trainer.config.engine_conflicts import iter_engine_conflicts
from trainer.config.rules import RULES, Rule
from trainer.config.settings import CaptionSettings, Config, Section, SettingPath, family_of


class Conflict(NamedTuple):
    """A setting that conflicts with others."""

    setting: SettingPath
    """The setting to blame."""
    reads: frozenset[str]
    """The sections on which this judgement rests."""
    text: str
    """The message: what was found, and the next step."""


def iter_ignored(config: Config, *, given: bool = False) -> Iterator[Conflict]:
    """The settings that are given without effect; with `given`, as if all settings were given."""
    captions = [config.caption_of(number) for number in range(len(config.data))]
    for rule in RULES:
        for setting in rule.settings:
            section, key, *argument = setting.split(".")
            if section == "caption":
                yield from _ignored_caption_setting(rule, key, config, captions, given=given)
                continue
            holder = getattr(config, section)
            asked = (
                argument[0] in getattr(holder, key) if argument else _asks(holder, key, given=given)
            )
            if asked and all(_fires(rule, config, caption) for caption in captions):
                yield Conflict(
                    (section, key, *argument),
                    _sections(rule),
                    _text(rule, setting, config, captions[0], _own_names(config, 0)),
                )


def _ignored_caption_setting(
    rule: Rule, key: str, config: Config, captions: list[CaptionSettings], *, given: bool
) -> Iterator[Conflict]:
    """The conflicts of one caption setting with a rule.

    A setting of `[caption]` is without effect if it is so in every data set that inherits it, one
    of `[data.caption]` if it is so in its own data set.
    """
    inheriting = []
    for number, (data, caption) in enumerate(zip(config.data, captions, strict=True)):
        if key not in data.caption.model_fields_set:
            inheriting.append(number)
        elif _asks(data.caption, key) and _fires(rule, config, caption):
            text = _text(rule, f"caption.{key}", config, caption, _own_names(config, number))
            yield Conflict(("data", number, "caption", key), _sections(rule), text)
    if (
        inheriting
        and _asks(config.caption, key, given=given)
        and all(_fires(rule, config, captions[number]) for number in inheriting)
    ):
        text = _text(
            rule,
            f"caption.{key}",
            config,
            captions[inheriting[0]],
            _own_names(config, inheriting[0]),
        )
        yield Conflict(("caption", key), _sections(rule), text)


def _own_names(config: Config, number: int) -> dict[str, str]:
    """The names of the caption settings that a data set gives itself.

    Each maps as in `caption.shuffle` -> `data.0.caption.shuffle`.
    """
    return {
        f"caption.{name}": f"data.{number}.caption.{name}"
        for name in config.data[number].caption.model_fields_set
    }


def _asks(section: Section, key: str, *, given: bool = False) -> bool:
    """True if a setting is given, and not only to say that it is off."""
    value = getattr(section, key)
    default = type(section).model_fields[key].get_default(call_default_factory=True)
    is_off = not value and value in (default, default or False)
    return (given or key in section.model_fields_set) and not is_off


def _value(setting: str, config: Config, caption: CaptionSettings) -> Any:
    section, key = setting.split(".")
    return getattr(caption if section == "caption" else getattr(config, section), key)


def _fires(rule: Rule, config: Config, caption: CaptionSettings) -> bool:
    return all(
        _value(setting, config, caption) in values for setting, values in rule.when.items()
    ) and not any(
        _value(setting, config, caption) in values for setting, values in rule.unless.items()
    )


def _sections(rule: Rule) -> frozenset[str]:
    return frozenset(
        setting.split(".")[0] for setting in (*rule.settings, *rule.when, *rule.unless)
    )


def _text(
    rule: Rule, setting: str, config: Config, caption: CaptionSettings, own: Mapping[str, str]
) -> str:
    """The message of a conflict; `own` is that of `_own_names`."""
    causes = [
        f"`{own.get(cause, cause)} = {to_toml(_value(cause, config, caption))}`"
        for cause in (*rule.when, *rule.unless)
    ]
    listed = " and ".join(filter(None, [", ".join(causes[:-1]), causes[-1]]))
    return (
        f"`{own.get(setting, setting)}` has no effect with {listed}. Remove it, or {rule.instead}."
    )


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
