"""Conflicts between settings: those that have no effect beside others, by the table of `rules`.

A value that turns a setting off (false, 0, "") asks for nothing and is never refused. Which
settings cannot be carried out together is the business of `impossible`. Knows no files and no
pydantic errors.
"""

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from capmerge.toml import to_toml
from trainer.config.rules import RULES, Rule
from trainer.config.settings import CaptionSettings, Config, Section, SettingPath


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
