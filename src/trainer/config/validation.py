"""What is wrong with the values of a config, a line for each: unknown keys, wrong types, values out of range, what is missing.

Turns pydantic's findings into: what was found, what was expected, the next step. Knows the settings
from their types alone.
"""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from typing_extensions import (
    get_type_hints,
    is_typeddict,
)  # typing's know those of typing_extensions since Python 3.12

from capmerge.errors import printable
from capmerge.toml import to_toml
from trainer.config.conflicts import Place
from trainer.config.settings import Config

_LONGEST_VALUE = 80


class Mistake(NamedTuple):
    """What is wrong with one setting."""

    setting: Place
    text: str
    meant: Place
    """The setting that was meant, perhaps; () where none is near."""


def list_mistakes(error: ValidationError, document: dict[str, Any]) -> list[Mistake]:
    """What pydantic found in a parsed config file, in the order of the sections, one for each setting."""
    found: dict[Place, Mistake] = {}
    for one in error.errors(include_url=False):
        setting = _setting_of(one["loc"])
        if (
            setting in found
        ):  # a union has one finding for each of its types, a list one for each of its values
            continue
        if (
            one["type"] == "too_short" and setting == ("data",) and document["data"]
        ):  # pydantic counts only the valid ones
            continue
        match one["type"]:
            case "extra_forbidden":
                found[setting] = _unknown(setting, document)
            case "missing":
                found[setting] = Mistake(setting, _missing(setting, document), ())
            case _:
                found[setting] = Mistake(setting, _wrong(setting, document), ())
    return list(found.values())


def _setting_of(loc: tuple[str | int, ...]) -> Place:
    """The place that pydantic tells, without what lies inside a value: types of a union, places in a list."""
    place: Place = ()
    for part in loc:
        if place and place != ("data",) and not _keys_of(_annotation_at(place)):
            break
        place = (*place, part)
    return place


def _annotation_at(place: Place) -> Any:
    """The type at a place; None where none is known."""
    here: Any = Config
    for part in place:
        if isinstance(part, int):
            here = get_args(here)[0]
        else:
            info = _keys_of(here).get(part)
            here = info.annotation if info else None
    return here


def _keys_of(table: Any) -> dict[str, FieldInfo]:
    """The keys that a table of this type may hold; none for any other type."""
    if isinstance(table, type) and issubclass(table, BaseModel):
        return table.model_fields
    if is_typeddict(table):
        return {
            name: FieldInfo.from_annotation(hint)
            for name, hint in get_type_hints(table, include_extras=True).items()
        }
    return {}


def _iter_settings(place: Place = ()) -> Iterator[Place]:
    """Every setting there is, those of the first data set included."""
    for name in _keys_of(_annotation_at(place)):
        inner: Place = (*place, name, 0) if (*place, name) == ("data",) else (*place, name)
        if _keys_of(_annotation_at(inner)):
            yield from _iter_settings(inner)
        else:
            yield inner


def _name(place: Place, document: dict[str, Any]) -> str:
    """`train.seed`; the number of a data set is left out where there is one only."""
    alone = place[:1] == ("data",) and len(document.get("data", ())) < 2
    return printable(".".join(str(part) for part in place if not (alone and isinstance(part, int))))


def _header(place: Place, document: dict[str, Any]) -> str:
    """The table at a place as it stands in the file: `[train]`, `[[data]]`, `[data.caption]`."""
    name = printable(".".join(part for part in place if isinstance(part, str)))
    header = "[[data]]" if name == "data" else f"[{name}]"
    return (
        f"{header} of data.{place[1]}"
        if place[0] == "data" and len(place) > 1 and len(document["data"]) > 1
        else header
    )


def _unknown(setting: Place, document: dict[str, Any]) -> Mistake:
    *inside, key = setting
    table = tuple(inside)
    keys = _keys_of(_annotation_at(table))
    shown = printable(str(key))
    meant: Place = (*table, *get_close_matches(str(key), keys, n=1)[:1])
    is_near = meant != table
    elsewhere = [place for place in _iter_settings() if place[-1] == key]
    if not table and isinstance(document.get(str(key)), dict | list):
        suggestion = (
            f"Did you mean {_header(meant, document)}?"
            if is_near
            else f"Sections are {_listed(keys, 'and')}."
        )
        return Mistake(
            setting, f"unknown section [{shown}]. {suggestion}", meant if is_near else ()
        )
    where = f"in {_header(table, document)}" if table else "outside of any section"
    if elsewhere:  # the same word in another section is more telling than a similar one here
        meant = elsewhere[0]
        suggestion = f"Did you mean `{_name(meant, {})}`?"
    elif is_near and table:
        suggestion = f"Did you mean `{meant[-1]}`?"
    else:
        meant = ()
        suggestion = (
            f"Keys there are {_listed(keys, 'and')}."
            if table
            else f"Put it into one of the sections {_listed(keys, 'or')}."
        )
    return Mistake(setting, f"unknown key `{shown}` {where}. {suggestion}", meant)


def _missing(setting: Place, document: dict[str, Any]) -> str:
    if setting == ("data",):
        return "found no [[data]], expected at least one. Add [[data]] with metadata and latents."
    *inside, key = setting
    keys = _keys_of(_annotation_at(setting))
    if keys:
        needed = _listed((name for name, info in keys.items() if info.is_required()), "and")
        return f"found no section [{key}]. Add it with {needed}."
    table = tuple(inside)
    return f"found no `{key}` in {_header(table, document)}, expected {_expected_at(setting)}. Add {key} = ... there."


def _wrong(setting: Place, document: dict[str, Any]) -> str:
    value: Any = document
    for part in setting:
        value = value[part]
    if setting[:1] == ("data",) and len(setting) < 3:
        if isinstance(value, dict):
            return "found [data], expected [[data]] in double brackets: it may stand several times."
        return f"`data` is {_shown(document['data'])}, expected [[data]] with metadata and latents, at least once."
    name = _name(setting, document)
    if _keys_of(_annotation_at(setting)):
        return f"`{name}` is {_shown(value)}, expected a section {_header(setting, document)}."
    near = (
        get_close_matches(value, _words(_annotation_at(setting)), n=1)
        if isinstance(value, str)
        else []
    )
    suggestion = f" Did you mean {to_toml(near[0])}?" if near else ""
    return f"`{name}` is {_shown(value)}, expected {_expected_at(setting)}.{suggestion}"


def _shown(value: Any) -> str:
    text = printable(to_toml(value))
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def _words(annotation: Any) -> list[str]:
    """All words that a type allows."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in _words(part)]


def _expected_at(setting: Place) -> str:
    info = _keys_of(_annotation_at(setting[:-1]))[str(setting[-1])]
    if info.examples:
        return f"text such as {to_toml(info.examples[0])}"
    return _expected(info.annotation, info.metadata)


def _expected(annotation: Any, limits: Iterable[Any]) -> str:
    """What a type allows, in words."""
    parts = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Annotated:
        inner = [
            one
            for part in parts[1:]
            for one in (part.metadata if isinstance(part, FieldInfo) else [part])
        ]
        return _expected(parts[0], [*limits, *inner])
    if origin in (Union, UnionType):
        return " or ".join(_expected(part, limits) for part in parts if part is not type(None))
    if origin is Literal:
        return _listed(map(to_toml, parts), "or")
    if origin is tuple:
        return f"a list of {_expected(parts[0], ())}"
    if annotation is str:
        return "text in quotes" + (
            " that is not empty" if any(isinstance(limit, MinLen) for limit in limits) else ""
        )
    if annotation in (int, float):
        number = "a whole number" if annotation is int else "a number"
        return _multiple(limits) or number + _range(limits)
    return {bool: "true or false", Path: "a path in quotes"}.get(annotation, "a table")


def _multiple(limits: Iterable[Any]) -> str:
    return next(
        (f"a multiple of {limit.multiple_of}" for limit in limits if isinstance(limit, MultipleOf)),
        "",
    )


def _range(limits: Iterable[Any]) -> str:
    """` from 0 to 1`, `, 1 or more`, ..."""
    words = []
    bounds: dict[type, Any] = {type(limit): limit for limit in limits}
    if Ge in bounds and Le in bounds:
        return f" from {bounds[Ge].ge} to {bounds[Le].le}"
    if Ge in bounds:
        words.append(f"{bounds[Ge].ge} or more")
    if Gt in bounds:
        words.append(f"above {bounds[Gt].gt}")
    if Le in bounds:
        words.append(f"at most {bounds[Le].le}")
    if Lt in bounds:
        words.append(f"below {bounds[Lt].lt}")
    return ", " + " and ".join(words) if words else ""


def _listed(words: Iterable[str], last: str) -> str:
    """`a, b or c`."""
    *head, tail = words
    return f"{', '.join(head)} {last} {tail}" if head else tail
