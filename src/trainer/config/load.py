"""The config of a run, read from a TOML file and `--set` overrides; all mistakes are told at once.

Owns the order of the checks and the resolved config. `settings` says what a setting may be,
`conflicts` what goes together.
"""

import secrets
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from capmerge.errors import printable
from capmerge.toml import to_toml
from trainer.config.conflicts import iter_ignored
from trainer.config.impossible import iter_impossible
from trainer.config.model_source import ask_model
from trainer.config.overrides import apply_overrides
from trainer.config.settings import Config, Section, SettingPath
from trainer.config.validation import Mistake, list_mistakes
from trainer.errors import ConfigError

_DEEPEST = 20
_MOST_BYTES = 1 << 24
_DATA = {"metadata": ".", "latents": "."}
_STAND_INS: dict[str, Any] = {
    "model": {"family": "sd1", "path": "random"},
    "model.family": "sd1",
    "model.path": "random",
    "data": [_DATA],
    "data.0": _DATA,
    "data.metadata": ".",
    "data.latents": ".",
    "samples.prompts.0": {"prompt": ""},
    "samples.prompts.prompt": "",
    "train": {"output_dir": ".", "max_steps": 1},
    "train.output_dir": ".",
}
"""Valid values for missing or wrong settings without a default, to check the others with."""


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, asks_model: bool = True, trains: bool = True
) -> Config:
    """The settings of a TOML file with `--set` overrides, checked one by one and together.

    Relative paths in it count from the current directory, not from the file. The files of the model
    add what they tell: family, prediction and latents; without `asks_model` they are not opened,
    for a resolved config, whose model may lie elsewhere now. A config that is not to be trained by
    may lack `[[data]]` and `[train]`, in whose place are then stand-ins. Raises `ConfigError` with
    a line for each mistake: the file or the override, what was found, what was expected, the next
    step; and `ModelError` for a file that is no model to train.
    """
    name = printable(str(path))
    document = read_toml(Path(path), name)
    given, problems = apply_overrides(document, overrides)
    _check_depth(document, name)
    if not trains:
        for section in ("data", "train"):
            document.setdefault(section, deepcopy(_STAND_INS[section]))
    problems += ask_model(document) if asks_model else []
    lines = [f"{_where(setting, given, name)}: {text}" for setting, text in iter_problems(document)]
    if problems or lines:
        raise ConfigError("\n".join(dict.fromkeys((*problems, *lines))))
    return Config.model_validate(document)


def read_toml(path: Path, name: str) -> dict[str, Any]:
    """The TOML file at `path`; raises `ConfigError`, which calls it `name`, if there is none."""
    try:
        with path.open("rb") as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise ConfigError(
                f"{name}: longer than {_MOST_BYTES:,} bytes, expected a TOML file of settings. "
                "Give the path of a config file."
            )
        return tomllib.loads(content.decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"{name}: no such file. Give the path of a config file; examples/tiny_sd1.toml is a "
            "good start."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{name}: {error.strerror}, expected a TOML file. Give the path of a config file."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name}, byte {error.start:,}: this is not UTF-8, expected a TOML file. "
            "Save it as UTF-8."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{name}: not valid TOML: {error}. Texts need quotes, lists need brackets, and true "
            "and false are written in lower case."
        ) from None
    except (ValueError, RecursionError) as error:
        # tomllib passes on what Python says about integers of thousands of digits.
        raise ConfigError(
            f"{name}: cannot be read ({error}). Write shorter numbers, and fewer brackets inside "
            "brackets."
        ) from None


def _check_depth(document: dict[str, Any], name: str) -> None:
    """Raise `ConfigError` for values that are nested too deeply to be copied, shown or saved."""
    level: list[Any] = [document]
    for _ in range(_DEEPEST):
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return
    raise ConfigError(
        f"{name}: found tables or lists more than {_DEEPEST} deep, expected at most {_DEEPEST}. "
        "Write fewer brackets inside brackets."
    )


def iter_problems(document: dict[str, Any]) -> Iterator[tuple[SettingPath, str]]:
    """The settings to blame, each with its message.

    Mistakes do not hide conflicts, except for those that rest on a section with a mistake.
    """
    # Report the mistakes in single settings, and go on with a config without them.
    mistakes: list[Mistake] = []
    try:
        config = Config.model_validate(document)
    except ValidationError as error:
        mistakes = list_mistakes(error, document)
        yield from ((mistake.setting, mistake.text) for mistake in mistakes)
        try:
            config = Config.model_validate(_mended(document, mistakes))
        except ValidationError:
            return

    # Report the conflicts that do not rest on a section with a mistake.
    doubtful = {
        str(setting[0])
        for mistake in mistakes
        for setting in (mistake.setting, mistake.meant)
        if setting
    }
    if "data" in doubtful:
        doubtful.add("caption")
    for conflict in (*iter_impossible(config), *iter_ignored(config)):
        if conflict.reads.isdisjoint(doubtful):
            yield conflict.setting, conflict.text


def _mended(document: dict[str, Any], mistakes: list[Mistake]) -> dict[str, Any]:
    """The document without its mistakes: left out, or replaced where there is no default."""
    mended = deepcopy(document)
    for mistake in mistakes:
        *tables, key = mistake.setting
        holder: Any = mended
        for table in tables:
            holder = holder[table]
        name = ".".join(part for part in mistake.setting if isinstance(part, str))
        name += ".0" if isinstance(key, int) else ""
        if name in _STAND_INS:
            holder[key] = deepcopy(_STAND_INS[name])
        else:
            del holder[key]
    return mended


def _where(setting: SettingPath, given: Mapping[SettingPath, str], name: str) -> str:
    """The override that gave a setting or a part of it, else the name of the file."""
    for overridden, override in given.items():
        shared = min(len(overridden), len(setting))
        if overridden[:shared] == setting[:shared]:
            return f"--set {printable(override)}"
    return name


def with_seed(config: Config, saved: int | None = None) -> Config:
    """The same config with a seed: its own, else the `saved` one, else 63 random bits.

    `saved` is the seed of a run that is resumed.
    """
    if config.train.seed is not None:
        return config
    seed = secrets.randbits(63) if saved is None else saved
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})


def leaves_rounding_open(config: Config) -> bool:
    """True if weights are bf16 and `optimizer.stochastic_rounding` is not set."""
    return config.train.precision == "full_bf16" and config.optimizer.stochastic_rounding is None


def with_rounding(config: Config, *, default: bool = True, uses_deepspeed: bool = False) -> Config:
    """The same config with `optimizer.stochastic_rounding` set if that is open.

    It is set to `default`, or to false for DeepSpeed, which rounds weights by itself.
    `uses_deepspeed` tells that a launcher asks for it where `engine.kind` leaves that open.
    """
    if not leaves_rounding_open(config):
        return config
    rounds = default and not uses_deepspeed and config.engine.kind != "deepspeed"
    rounded = config.optimizer.model_copy(update={"stochastic_rounding": rounds})
    return config.model_copy(update={"optimizer": rounded})


def resolved_toml(config: Config) -> str:
    """The whole config, defaults included, as TOML that loads to an equal config.

    Settings that are not set, or that have no effect in this combination, are comments in it,
    because the latter would be refused if they were given. `[cache]`, which no training reads, is
    left out if it is not given.
    """
    ignored = {conflict.setting: conflict.text for conflict in iter_ignored(config, given=True)}
    parts = []
    for name in Config.model_fields:
        if name == "data":
            parts += [
                "[[data]]\n" + _section(one, ("data", number), ignored)
                for number, one in enumerate(config.data)
            ]
        elif name != "cache" or config.cache.model_fields_set:
            parts.append(f"[{name}]\n" + _section(getattr(config, name), (name,), ignored))
    return "\n".join(parts)


def _section(section: Section, table: SettingPath, ignored: Mapping[SettingPath, str]) -> str:
    """The lines of one section; `table` leads to it."""
    lines = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if value is None:
            lines.append(f"# {name} is not set")
        elif isinstance(value, Section):
            # [data.caption] holds the settings alone that differ from [caption].
            given = [key for key in type(value).model_fields if key in value.model_fields_set]
            lines.append(f"{name} = {to_toml({key: getattr(value, key) for key in given})}")
        elif isinstance(value, tuple) and value and isinstance(value[0], Section):
            lines.append(f"{name} = {to_toml([_without_unset(one) for one in value])}")
        elif (*table, name) in ignored:
            lines.append(f"# {name} = {to_toml(value)} has no effect here")
        else:
            lines.append(f"{name} = {to_toml(value)}")
    return "\n".join(lines) + "\n"


def _without_unset(section: Section) -> dict[str, Any]:
    return section.model_dump(exclude_none=True)
