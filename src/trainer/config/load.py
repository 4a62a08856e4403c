"""The config of a run: one TOML file and `--set` overrides in, frozen settings out; all that is wrong is told at once.

Owns the order of the checks and the resolved config. What a setting may be stands in `settings`,
what goes together in `conflicts`.
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
from trainer.config.conflicts import Conflict, Place, iter_ignored, iter_impossible
from trainer.config.overrides import apply_overrides
from trainer.config.settings import Config, Section
from trainer.config.validation import Mistake, list_mistakes
from trainer.errors import ConfigError

_DATA = {"metadata": ".", "latents": "."}
_STAND_INS: dict[str, Any] = {
    "model": {"family": "sd1", "path": "random"},
    "model.family": "sd1",
    "model.path": "random",
    "data": [_DATA],
    "data.0": _DATA,
    "data.metadata": ".",
    "data.latents": ".",
    "train": {"output_dir": ".", "max_steps": 1},
    "train.output_dir": ".",
}
"""What stands for a setting without default that is missing or wrong, while the others are checked."""


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """The settings of a TOML file with `--set` overrides, checked alone and together.

    Relative paths in it count from the current directory, not from the file. Raises `ConfigError`
    with a line for everything that is wrong: the file or the override, what was found, what was
    expected, the next step.
    """
    name = printable(str(path))
    document = _read(Path(path), name)
    given, problems = apply_overrides(document, overrides)
    lines = [f"{_where(place, given, name)}: {text}" for place, text in _check(document)]
    if problems or lines:
        raise ConfigError("\n".join(dict.fromkeys((*problems, *lines))))
    return Config.model_validate(document)


def _read(path: Path, name: str) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except FileNotFoundError:
        raise ConfigError(
            f"{name}: no such file. Give the path of a config file; examples/tiny_sd1.toml is one to start from."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"{name}: {error.strerror}, expected a TOML file. Give the path of a config file."
        ) from None
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{name}, byte {error.start:,}: this is not UTF-8, expected a TOML file. Save it as UTF-8."
        ) from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(
            f"{name}: not valid TOML: {error}. Texts need quotes, lists brackets, true and false no capitals."
        ) from None


def _check(document: dict[str, Any]) -> Iterator[tuple[Place, str]]:
    """What is wrong, and the setting to blame. Mistakes do not hide conflicts, unless the conflict rests on a section with a mistake."""
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
    doubtful = {
        str(place[0]) for mistake in mistakes for place in (mistake.setting, mistake.meant) if place
    }
    if "data" in doubtful:
        doubtful.add("caption")
    for conflict in _iter_conflicts(config):
        if conflict.reads.isdisjoint(doubtful):
            yield conflict.setting, conflict.text


def _iter_conflicts(config: Config) -> Iterator[Conflict]:
    yield from iter_impossible(config)
    yield from iter_ignored(config)


def _mended(document: dict[str, Any], mistakes: list[Mistake]) -> dict[str, Any]:
    """The document without its mistakes: left out, or something valid where there is no default."""
    mended = deepcopy(document)
    for mistake in mistakes:
        *tables, key = mistake.setting
        holder: Any = mended
        for table in tables:
            holder = holder[table]
        name = (
            "data.0"
            if isinstance(key, int)
            else ".".join(part for part in mistake.setting if isinstance(part, str))
        )
        if name in _STAND_INS:
            holder[key] = deepcopy(_STAND_INS[name])
        else:
            del holder[key]
    return mended


def _where(place: Place, given: Mapping[Place, str], name: str) -> str:
    """The override that gave a setting or something in it, else the file."""
    for setting, override in given.items():
        if setting[: len(place)] == place or place[: len(setting)] == setting:
            return f"--set {printable(override)}"
    return name


def with_seed(config: Config, saved: int | None = None) -> Config:
    """The same config with a seed: its own, else the one `saved` with the run that goes on, else 63 random bits."""
    if config.train.seed is not None:
        return config
    seed = secrets.randbits(63) if saved is None else saved
    return config.model_copy(update={"train": config.train.model_copy(update={"seed": seed})})


def resolved_toml(config: Config) -> str:
    """The whole config, defaults included, as TOML that loads to an equal config.

    What is not set, and what has no effect in this combination, stands as a comment: given, the
    latter would be refused.
    """
    ignored = {conflict.setting: conflict.text for conflict in iter_ignored(config, given=True)}
    parts = []
    for name in Config.model_fields:
        if name == "data":
            parts += [
                "[[data]]\n" + _section(one, ("data", number), ignored)
                for number, one in enumerate(config.data)
            ]
        else:
            parts.append(f"[{name}]\n" + _section(getattr(config, name), (name,), ignored))
    return "\n".join(parts)


def _section(section: Section, place: Place, ignored: Mapping[Place, str]) -> str:
    lines = []
    for name in type(section).model_fields:
        value = getattr(section, name)
        if value is None:
            lines.append(f"# {name} is not set")
        elif isinstance(value, Section):  # [data.caption]: only what differs from [caption]
            lines.append(
                f"{name} = {to_toml({key: getattr(value, key) for key in type(value).model_fields if key in value.model_fields_set})}"
            )
        elif (*place, name) in ignored:
            lines.append(f"# {name} = {to_toml(value)} has no effect here")
        else:
            lines.append(f"{name} = {to_toml(value)}")
    return "\n".join(lines) + "\n"
