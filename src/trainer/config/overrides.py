"""Overrides by `--set section.key=value`, put into the parsed config file before it is checked.

Knows the shape of a config (`data` is a list, all other sections are tables), but no setting by
name.
"""

import tomllib
from collections.abc import Sequence
from typing import Any

from capmerge.errors import printable
from capmerge.toml import to_toml
from trainer.config.settings import SettingPath

_FORM = "section.key=value, such as train.max_steps=20"


def apply_overrides(
    document: dict[str, Any], overrides: Sequence[str]
) -> tuple[dict[SettingPath, str], list[str]]:
    """Put the overrides into `document`; returns them by setting, and a line for each mistake.

    `data.metadata=...` belongs to the first data set, `data.1.metadata=...` to the second, which
    may be new. The last override of a setting counts.
    """
    given: dict[SettingPath, str] = {}
    problems = []
    for override in overrides:
        name, equals, text = override.partition("=")
        keys = [key.strip() for key in name.split(".")]
        if not equals or len(keys) < 2 or not all(keys) or not _is_unicode(override):
            problems.append(f"--set {printable(override)}: expected {_FORM}.")
            continue
        try:
            setting = _put(document, keys, _value(text))
        except ValueError as error:
            problems.append(f"--set {printable(override)}: {error}")
        else:
            given[setting] = override
    return given, problems


def _is_unicode(text: str) -> bool:
    """False if a byte of the command line could not be decoded: TOML could not hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _value(text: str) -> Any:
    """The TOML value, or the text itself if TOML refuses it, so that words need no quotes."""
    try:
        found = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):  # of tomllib, or of Python about thousands of digits
        return text
    return found["value"] if found.keys() == {"value"} else text


def _put(document: dict[str, Any], keys: list[str], value: Any) -> SettingPath:
    """Set one value, making the tables on the way to it, and return its path.

    Raises `ValueError` when there is no place for it.
    """
    inside_of: SettingPath
    section, *inside = keys
    if section == "data":
        number = int(inside.pop(0)) if inside[0].isdecimal() else 0
        if not inside:
            raise ValueError(
                f"expected a key after the number of the data set, such as data.{number}.repeats=2."
            )
        inside_of, table = (section, number), _data_set(document, number)
    else:
        inside_of, table = (section,), _table_in(document, section)
    *tables, key = inside
    for name in tables:
        inside_of, table = (*inside_of, name), _table_in(table, name)
    table[key] = value
    return (*inside_of, key)


def _data_set(document: dict[str, Any], number: int) -> dict[str, Any]:
    """The table of a data set, counted from 0; one after the last is made."""
    sets = document.setdefault("data", [])
    if not isinstance(sets, list) or not all(isinstance(one, dict) for one in sets):
        raise ValueError(
            "found no [[data]] in the file to put it into. Write [[data]] in double brackets, "
            "once for each data set."
        )
    if number > len(sets):
        raise ValueError(
            f"found {len(sets)} [[data]], counted from 0, expected one of them, or "
            f"data.{len(sets)} for a new one."
        )
    if number == len(sets):
        sets.append({})
    found: dict[str, Any] = sets[number]
    return found


def _table_in(table: dict[str, Any], name: str) -> dict[str, Any]:
    """The table of that name; it is made if there is none."""
    found = table.setdefault(name, {})
    if not isinstance(found, dict):
        raise ValueError(  # noqa: TRY004 -- a mistake of the user, not of the program
            f"found `{name}` set to {printable(to_toml(found))}, expected a table to put it into."
        )
    return found
