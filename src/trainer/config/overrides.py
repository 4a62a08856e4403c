"""`--set section.key=value`: put into the parsed config file before anything is checked.

Knows the shape of a config (`data` is a list, all other sections are tables) and no setting by
name.
"""

import tomllib
from collections.abc import Sequence
from typing import Any

from capmerge.errors import printable
from capmerge.toml import to_toml
from trainer.config.conflicts import Place

_FORM = "section.key=value, such as train.max_steps=20"


def apply_overrides(
    document: dict[str, Any], overrides: Sequence[str]
) -> tuple[dict[Place, str], list[str]]:
    """Which override gave which setting, and a line for each override that cannot be read; `document` is changed in place.

    `data.metadata=...` is the first data set's, `data.1.metadata=...` the second's, which may be
    new; the last one of a setting counts.
    """
    given: dict[Place, str] = {}
    problems = []
    for override in overrides:
        name, equals, text = override.partition("=")
        keys = [key.strip() for key in name.split(".")]
        if not equals or len(keys) < 2 or not all(keys) or not _is_unicode(override):
            problems.append(f"--set {printable(override)}: expected {_FORM}.")
            continue
        try:
            place = _put(document, keys, _value(text))
        except ValueError as error:
            problems.append(f"--set {printable(override)}: {error}")
        else:
            given[place] = override
    return given, problems


def _is_unicode(text: str) -> bool:
    """Whether no byte of the command line was left undecoded: TOML could not hold it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _value(text: str) -> Any:
    """The value that TOML reads, or the text itself where TOML refuses it: paths and words need no quotes."""
    try:
        found = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    return found["value"] if found.keys() == {"value"} else text


def _put(document: dict[str, Any], keys: list[str], value: Any) -> Place:
    """Set one value, with the tables on the way to it; returns its place. Raises `ValueError` when it has none."""
    place: Place
    section, *inside = keys
    if section == "data":
        number = int(inside.pop(0)) if inside[0].isdecimal() else 0
        if not inside:
            raise ValueError(
                f"expected a key behind the number of the data set, such as data.{number}.repeats=2."
            )
        place, table = (section, number), _data_set(document, number)
    else:
        place, table = (section,), _table_in(document, section)
    *tables, key = inside
    for name in tables:
        place, table = (*place, name), _table_in(table, name)
    table[key] = value
    return (*place, key)


def _data_set(document: dict[str, Any], number: int) -> dict[str, Any]:
    sets = document.setdefault("data", [])
    if not isinstance(sets, list) or not all(isinstance(one, dict) for one in sets):
        raise ValueError(
            "found no [[data]] in the file to put it into. Write [[data]] in double brackets, once for each data set."
        )
    if number > len(sets):
        raise ValueError(
            f"found {len(sets)} [[data]], counted from 0, expected one of them, or data.{len(sets)} for a new one."
        )
    if number == len(sets):
        sets.append({})
    found: dict[str, Any] = sets[number]
    return found


def _table_in(table: dict[str, Any], name: str) -> dict[str, Any]:
    """The table of that name, made where there is none."""
    found = table.setdefault(name, {})
    if not isinstance(found, dict):
        raise ValueError(  # noqa: TRY004 -- a user's
            f"found `{name}` set to {printable(to_toml(found))}, expected a table to put it into."
        )
    return found
