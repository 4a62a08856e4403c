"""Reads what sd-scripts is started with: a command line, its config file, and its dataset config.

Knows how sd-scripts reads them, and nothing of what they mean here.
"""

import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from capmerge.errors import printable
from trainer.config.load import read_toml
from trainer.errors import ConfigError

SCRIPTS = ("fine_tune.py", "sdxl_train.py")
"""The scripts of sd-scripts that train what this trainer trains."""
_WINDOWS = (".bat", ".cmd", ".ps1")
"""Endings of files in which a backslash stands for itself."""
_COMMENT = re.compile(r"^\s*(#|::|rem\s).*$", re.IGNORECASE | re.MULTILINE)
_CONTINUATION = re.compile(r"[\\^`][ \t]*\r?\n")
_END = re.compile(r"&&?|;|\|\|?|\d?>>?.*|<.*")
"""Words of a shell that end a command."""
_VARIABLE = re.compile(r"\$\w|\$\{|\$\(|%\w+%")
_TEXTS = {
    "pretrained_model_name_or_path",
    "in_json",
    "train_data_dir",
    "output_dir",
    "output_name",
    "caption_separator",
    "keep_tokens_separator",
    "secondary_separator",
    "log_tracker_name",
    "config_file",
    "dataset_config",
}
"""Options whose values are texts, also where they look like numbers."""
_LISTS = ("optimizer_args", "lr_scheduler_args")
"""Options with any number of values, which are texts."""


class Arguments(NamedTuple):
    """What sd-scripts is asked for."""

    script: str | None
    """One of `SCRIPTS`; None if nothing names it."""
    options: dict[str, Any]
    """Option, without dashes -> value."""
    subsets: list[dict[str, Any]]
    """The settings of each subset of a dataset config, with those that it inherits there."""


def read_arguments(path: Path) -> Arguments:
    """The arguments in a TOML file or in a file with a command line.

    Files that they name are read too; relative paths count from the current directory. Raises
    `ConfigError` for a file that cannot be read or understood.
    """
    name = printable(str(path))
    script, options = None, {}
    if path.suffix.lower() == ".toml":
        options = _flattened(read_toml(path, name))
        if "datasets" in options:
            raise ConfigError(
                f"{name}: a dataset config of sd-scripts, expected the arguments of the training. "
                "Give the file of the command, which names it with --dataset_config."
            )
    else:
        script, options = _read_command(path, name)
    if config_file := options.get("config_file"):
        options = _flattened(_named_toml("config_file", config_file, name)) | options
    subsets = []
    if dataset_config := options.get("dataset_config"):
        document = _named_toml("dataset_config", dataset_config, name)
        subsets = _subsets_of(document, printable(dataset_config))
    return Arguments(script, options, subsets)


def _named_toml(option: str, path: Any, name: str) -> dict[str, Any]:
    """The TOML file that an option names; as in sd-scripts, its ending may be left out."""
    if not isinstance(path, str):
        raise ConfigError(f"{name}: {option}: found no path, expected that of a TOML file. Add it.")
    file = Path(path if path.endswith(".toml") else f"{path}.toml")
    return read_toml(file, printable(str(file)))


def _flattened(document: Mapping[str, Any]) -> dict[str, Any]:
    """A config file of sd-scripts without its sections, whose names mean nothing there."""
    options: dict[str, Any] = {}
    for name, value in document.items():
        options |= value if isinstance(value, dict) else {name: value}
    return options


def _subsets_of(document: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    """The subsets of a dataset config; raises `ConfigError` for one of another shape."""
    try:
        found = [
            {**document.get("general", {}), **_without(dataset, "subsets"), **subset}
            for dataset in document["datasets"]
            for subset in dataset["subsets"]
        ]
    except (KeyError, TypeError):
        found = []
    if not found:
        raise ConfigError(
            f"{name}: found no [[datasets]] with [[datasets.subsets]], expected a dataset config. "
            "Set dataset_config to one."
        )
    return found


def _without(table: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key != name}


# Command lines.


def _read_command(path: Path, name: str) -> tuple[str | None, dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        problem = error.strerror if isinstance(error, OSError) else "this is not UTF-8"
        raise ConfigError(
            f"{name}: {problem}, expected a command line of sd-scripts or a .toml file with its "
            "arguments. Give the path of one."
        ) from None
    lines = _CONTINUATION.sub(" ", _COMMENT.sub("", text)).splitlines()
    try:
        commands = [_words(line, windows=path.suffix.lower() in _WINDOWS) for line in lines]
    except ValueError as error:
        raise ConfigError(f"{name}: not a command line: {error}. Close the quotes.") from None
    found = [
        (words, place)
        for words in commands
        for place, word in enumerate(words)
        if _file_name(word).endswith(".py") and "train" in _file_name(word).replace("tune", "train")
    ]
    if len(found) > 1:
        raise ConfigError(
            f"{name}: found {len(found)} commands that train, expected one. Give each of them a "
            "file of its own."
        )
    if not found:
        return None, _parse([word for words in commands for word in words], name)
    words, place = found[0]
    script = _file_name(words[place])
    if script not in SCRIPTS:
        raise ConfigError(
            f"{name}: found the script {printable(script)}, expected {' or '.join(SCRIPTS)}. "
            "Other scripts train what this trainer does not."
        )
    return script, _parse(words[place + 1 :], name)


def _words(line: str, *, windows: bool) -> list[str]:
    lexer = shlex.shlex(line, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    if windows:
        lexer.escape = ""
    return list(lexer)


def _file_name(word: str) -> str:
    return word.replace("\\", "/").rpartition("/")[2]


def _parse(words: list[str], name: str) -> dict[str, Any]:
    """The options of a command and their values: true, one value, or a list of several."""
    given: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in words:
        if _END.fullmatch(word):
            break
        if _VARIABLE.search(word):
            raise ConfigError(
                f"{name}: found {printable(word)}, a variable of the shell. Write its value there."
            )
        if word.startswith("--"):
            option, equals, value = word[2:].partition("=")
            values = given[option.replace("-", "_")] = [value] if equals else []
        elif values is None:
            raise ConfigError(
                f"{name}: found {printable(word)} before any option, expected options such as "
                "--output_dir. Give a file with a command line of sd-scripts, or a .toml file with "
                "its arguments."
            )
        else:
            values.append(word)
    return {option: _value(option, texts) for option, texts in given.items()}


def _value(option: str, texts: list[str]) -> Any:
    if option in _LISTS:
        return texts
    values = texts if option in _TEXTS else [_typed(text) for text in texts]
    return True if not values else values[0] if len(values) == 1 else values


def _typed(text: str) -> Any:
    """The number that a text means, or the text.

    >>> [_typed(text) for text in ("8", "1e-5", "bf16")]
    [8, 1e-05, 'bf16']
    """
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
