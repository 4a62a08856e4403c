"""Which settings do not go together: those that others leave without effect, and combinations that cannot be carried out.

Owns the table of rules. Whatever is not read in a combination, whatever its value, is an error when
it is given: nothing is silently without effect. A value that turns a setting off (false, 0, "")
asks for nothing and is never refused; a limit that a run may not reach (`checkpoint.every_steps`
past `train.max_steps`) is read, and no error either. Knows no files and no pydantic errors.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from capmerge.toml import to_toml
from trainer.config.settings import CaptionSettings, Config, Section

Place = tuple[str | int, ...]
"""Where a setting stands: ("loss", "huber_c"), ("data", 0, "caption", "shuffle")."""


class Rule(NamedTuple):
    """Settings that have no effect while others have certain values. All are named `section.key`."""

    settings: tuple[str, ...]
    when: Mapping[str, tuple[Any, ...]]
    """All of these settings have one of these values, ..."""
    instead: str
    """What to do to give them their effect."""
    unless: Mapping[str, tuple[Any, ...]] = {}
    """... and none of these settings has one of these values."""


_SPLIT_OFF: dict[str, tuple[Any, ...]] = {
    "caption.shuffle": (False,),
    "caption.tag_dropout_rate": (0,),
    "caption.token_warmup_steps": (0,),
}
"""Only these three make sd-scripts split a caption into tags; without them its text passes verbatim (facts B2, step 4)."""

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
"""What happens to captions that are not dropped."""


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
        ("noise.multires_discount",),
        {"noise.multires_iterations": (0,)},
        "set noise.multires_iterations",
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
    Rule(("loss.v_like_noise",), {"noise.prediction": ("epsilon",)}, "set noise.prediction to v"),
    Rule(("loss.v_pred_like",), {"noise.prediction": ("v",)}, "set noise.prediction to epsilon"),
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
    _argument_of("num_cycles", "cosine", "cosine_with_restarts"),
    _argument_of("power", "polynomial"),
    _argument_of("lr_end", "polynomial"),
    _argument_of("f_min", "linear"),
    _argument_of("f_max", "linear"),
    _argument_of("step_rules", "piecewise_constant"),
    Rule(("log.project",), {"log.trackers": ((),)}, "set log.trackers"),
)

ALWAYS = frozenset(
    (
        *("model.family", "model.path", "model.gradient_checkpointing"),
        *(
            "data.metadata",
            "data.latents",
            "data.repeats",
            "data.flip",
            "data.alpha_mask",
            "data.on_missing",
            "data.allow_outside",
        ),
        *("text.chunking", "text.embedding_noise"),
        *(
            "noise.prediction",
            "noise.zero_terminal_snr",
            "noise.offset",
            "noise.multires_iterations",
            "noise.input_perturbation",
        ),
        *("noise.min_timestep", "noise.max_timestep"),
        *("loss.kind", "loss.min_snr_gamma", "loss.debiased"),
        *(
            "optimizer.name",
            "optimizer.learning_rate",
            "optimizer.text_learning_rate",
            "optimizer.arguments",
            "optimizer.schedule",
        ),
        *("optimizer.clip_grad_norm",),
        *(
            "train.output_dir",
            "train.max_steps",
            "train.max_epochs",
            "train.seed",
            "train.batch_size",
            "train.accumulation",
        ),
        *("train.workers", "train.precision", "train.on_nonfinite"),
        *(
            "checkpoint.every_steps",
            "checkpoint.every_epochs",
            "checkpoint.every_minutes",
            "checkpoint.keep",
        ),
        *("log.every_steps", "log.samples", "log.trackers"),
    )
)
"""What every combination reads. Each setting stands here or in a rule: a new one has to be thought about."""


class Conflict(NamedTuple):
    """One thing that does not go together."""

    setting: Place
    """The one that is at fault."""
    reads: frozenset[str]
    """The sections that this judgement rests on."""
    text: str


def iter_ignored(config: Config, *, given: bool = False) -> Iterator[Conflict]:
    """The settings that are given and have no effect; with `given`, as if all of them were."""
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
    """`[caption]` is without effect when it is in every data set that takes it from there, `[data.caption]` when it is in its own."""
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
    """What a data set gives itself: `caption.shuffle` -> `data.0.caption.shuffle`."""
    return {
        f"caption.{name}": f"data.{number}.caption.{name}"
        for name in config.data[number].caption.model_fields_set
    }


def _asks(section: Section, key: str, *, given: bool = False) -> bool:
    """Whether a setting is given, and not only to say that it is off."""
    value = getattr(section, key)
    is_off = not value and value == type(section).model_fields[key].get_default(
        call_default_factory=True
    )
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
    """The message; `own` holds the names of the caption settings that a data set gives itself."""
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
    for check in (_no_end, _nothing_trained, _no_timesteps, _last_step_unlearnable, _no_step_rules):
        yield from check(config)
    yield from _separators_alike(config)


def _no_end(config: Config) -> Iterator[Conflict]:
    if config.train.max_steps is None and config.train.max_epochs is None:
        text = "found neither `train.max_steps` nor `train.max_epochs`, expected one of them. Add max_steps = 1000 to [train]."
        yield Conflict(("train", "max_steps"), frozenset({"train"}), text)


def _nothing_trained(config: Config) -> Iterator[Conflict]:
    names = [
        "learning_rate",
        "text_learning_rate",
        *(["text2_learning_rate"] if config.model.family == "sdxl" else []),
    ]
    if not any(getattr(config.optimizer, name) for name in names):
        listed = " and ".join(f"`optimizer.{name}`" for name in names)
        text = f"{listed} are 0, so nothing would be trained. Set one of them, for instance learning_rate = 1e-5."
        yield Conflict(("optimizer", "learning_rate"), frozenset({"optimizer", "model"}), text)


def _no_timesteps(config: Config) -> Iterator[Conflict]:
    low, high = config.noise.min_timestep, config.noise.max_timestep
    if low >= high:
        text = f"`noise.min_timestep = {low}` is not below `noise.max_timestep = {high}`. Leave room between them."
        yield Conflict(("noise", "min_timestep"), frozenset({"noise"}), text)


def _last_step_unlearnable(config: Config) -> Iterator[Conflict]:
    if config.noise.zero_terminal_snr and config.noise.prediction == "epsilon":
        text = (
            '`noise.zero_terminal_snr = true` does not go with `noise.prediction = "epsilon"`: the last timestep is all noise then, and '
            'predicting it teaches nothing. Set noise.prediction = "v", or leave it out.'
        )
        yield Conflict(("noise", "zero_terminal_snr"), frozenset({"noise"}), text)


def _no_step_rules(config: Config) -> Iterator[Conflict]:
    if (
        config.optimizer.schedule == "piecewise_constant"
        and "step_rules" not in config.optimizer.schedule_arguments
    ):
        text = (
            '`optimizer.schedule = "piecewise_constant"` needs `optimizer.schedule_arguments.step_rules`, found none. '
            'Add schedule_arguments = {step_rules = "1:1000,0.1"} to [optimizer]: the full rate for 1000 steps, then a tenth.'
        )
        yield Conflict(("optimizer", "schedule"), frozenset({"optimizer"}), text)


def _separators_alike(config: Config) -> Iterator[Conflict]:
    for number in range(len(config.data)):
        caption = config.caption_of(number)
        if caption.secondary_separator == caption.separator:
            own = config.data[number].caption.model_fields_set & {
                "separator",
                "secondary_separator",
            }
            same = f"`caption.separator = {to_toml(caption.separator)}`"
            text = f"`caption.secondary_separator` has no effect with {same}: it is the same. Remove it."
            place: Place = ("data", number, "caption") if own else ("caption",)
            yield Conflict((*place, "secondary_separator"), frozenset({"caption", "data"}), text)
