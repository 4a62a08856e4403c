"""Mistakes in the values of a config: unknown keys, wrong types, values out of range, missing ones.

Turns the errors of pydantic into messages that read: what was found, what was expected, the next
step. Knows the settings by their types alone.
"""

from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen, MultipleOf
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

# Those of typing know the TypedDict of typing_extensions from Python 3.12 on.
from typing_extensions import get_type_hints, is_typeddict

from capmerge.errors import printable
from capmerge.toml import to_toml
from trainer.config import kohya
from trainer.config.settings import Config, SettingPath

_LONGEST_VALUE = 80


class Mistake(NamedTuple):
    """A mistake in one setting."""

    setting: SettingPath
    text: str
    """The message: what was found, what was expected, the next step."""
    meant: SettingPath = ()
    """The setting that was perhaps meant; () if none is near."""


def list_mistakes(error: ValidationError, document: dict[str, Any]) -> list[Mistake]:
    """The errors of pydantic in a parsed config file, in its order, at most one per setting."""
    found: dict[SettingPath, Mistake] = {}
    for one in error.errors(include_url=False):
        setting, kind = _setting_of(one["loc"]), one["type"]
        # A union has one error for each of its types, a list one for each of its values.
        if setting in found:
            continue
        # pydantic counts only the valid data sets, so it takes a list of invalid ones for empty.
        if kind == "too_short" and setting == ("data",) and document["data"]:
            continue
        if kind == "extra_forbidden":
            found[setting] = _unknown(setting, document)
        elif kind == "value_error":
            shown = _shown(_value_at(setting, document))
            text = f"`{_name(setting, document)}` is {shown}, {one['ctx']['error']}."
            found[setting] = Mistake(setting, text)
        else:
            text = (_missing if kind == "missing" else _wrong)(setting, document)
            found[setting] = Mistake(setting, text)
    return list(found.values())


# Settings by their types.


def _setting_of(loc: tuple[str | int, ...]) -> SettingPath:
    """The setting in a location of pydantic, which also names types of a union, or list indices."""
    setting: SettingPath = ()
    for part in loc:
        here = _annotation_at(setting)
        if setting and not _keys_of(here) and not _is_tables(here):
            break
        setting = (*setting, part)
    return setting


def _annotation_at(setting: SettingPath) -> Any:
    """The type of a setting or a table; None for unknown ones."""
    here: Any = Config
    for part in setting:
        if isinstance(part, int):
            here = get_args(here)[0]
        else:
            info = _keys_of(here).get(part)
            here = info.annotation if info else None
    return here


def _keys_of(table: Any) -> dict[str, FieldInfo]:
    """The keys that a table of this type may hold; any other type has none."""
    if isinstance(table, type) and issubclass(table, BaseModel):
        return table.model_fields
    if is_typeddict(table):
        hints = get_type_hints(table, include_extras=True)
        return {name: FieldInfo.from_annotation(hint) for name, hint in hints.items()}
    return {}


def _is_tables(annotation: Any) -> bool:
    """True for a list of tables, such as that of `data`."""
    return get_origin(annotation) is tuple and bool(_keys_of(get_args(annotation)[0]))


def _iter_settings(table: SettingPath = ()) -> Iterator[SettingPath]:
    """Every setting there is, including those of the first data set."""
    for name in _keys_of(_annotation_at(table)):
        inner: SettingPath = (*table, name)
        if _is_tables(_annotation_at(inner)):
            inner = (*inner, 0)
        if _keys_of(_annotation_at(inner)):
            yield from _iter_settings(inner)
        else:
            yield inner


# Messages.


def _name(setting: SettingPath, document: dict[str, Any]) -> str:
    """`train.seed`; the number of a data set is left out if there is only one."""
    alone = setting[:1] == ("data",) and len(document.get("data", ())) < 2
    parts = [str(part) for part in setting if not (alone and isinstance(part, int))]
    return printable(".".join(parts))


def _header(table: SettingPath, document: dict[str, Any]) -> str:
    """The header of a table as it stands in the file: `[train]`, `[[data]]`, `[data.caption]`."""
    name = printable(".".join(part for part in table if isinstance(part, str)))
    repeats = name == "data" or isinstance(table[-1], int)
    header = f"[[{name}]]" if repeats else f"[{name}]"
    if table[0] == "data" and len(table) > 1 and len(document["data"]) > 1:
        return f"{header} of data.{table[1]}"
    return header


def _unknown(setting: SettingPath, document: dict[str, Any]) -> Mistake:
    """The mistake of a key or section that does not exist, with the name that was perhaps meant."""
    *inside, last = setting
    table, key = tuple(inside), str(last)
    keys = _keys_of(_annotation_at(table))
    near: SettingPath = tuple(get_close_matches(key, keys, n=1))
    meant: SettingPath = (*table, *near) if near else ()

    # A name of sd-scripts says more than any likeness.
    known = kohya.SETTINGS.get(key) or kohya.LORA_SETTINGS.get(key)
    where = f"in {_header(table, document)}" if table else "outside of any section"
    if known and not known.endswith(f".{key}"):
        section, *inner = known.split(".")
        meant = (section, 0, *inner) if section == "data" else (section, *inner)
        text = f"unknown key `{key}` {where}. That setting of sd-scripts is `{known}` here."
        return Mistake(setting, text, meant)
    if reason := kohya.LEFT_OUT.get(key) or kohya.REFUSED.get(key):
        text = f"unknown key `{key}` {where}. sd-scripts has it, this trainer does not: {reason}."
        return Mistake(setting, text)

    if not table and isinstance(document.get(key), dict | list):
        suggestion = f"Sections are {_listed(keys, 'and')}."
        if meant:
            suggestion = f"Did you mean {_header(meant, document)}?"
        return Mistake(setting, f"unknown section [{printable(key)}]. {suggestion}", meant)

    # The same word in another section says more than a similar one in this section.
    elsewhere = [other for other in _iter_settings() if other[-1] == key]
    if elsewhere:
        meant = elsewhere[0]
        suggestion = f"Did you mean `{_name(meant, {})}`?"
    elif meant and table:
        suggestion = f"Did you mean `{meant[-1]}`?"
    elif table:
        suggestion = f"The keys there are {_listed(keys, 'and')}."
    else:
        meant = ()
        suggestion = f"Put it into one of the sections {_listed(keys, 'or')}."
    return Mistake(setting, f"unknown key `{printable(key)}` {where}. {suggestion}", meant)


def _missing(setting: SettingPath, document: dict[str, Any]) -> str:
    """The message for a required setting or section that is not given."""
    if setting == ("data",):
        return "found no [[data]], expected at least one. Add [[data]] with metadata and latents."
    *inside, key = setting
    keys = _keys_of(_annotation_at(setting))
    if keys:
        needed = _listed((name for name, info in keys.items() if info.is_required()), "and")
        return f"found no section [{key}]. Add it with {needed}."
    return (
        f"found no `{key}` in {_header(tuple(inside), document)}, "
        f"expected {_expected_at(setting)}. Add {key} = ... there."
    )


def _wrong(setting: SettingPath, document: dict[str, Any]) -> str:
    """The message for a value of the wrong type or out of range."""
    value = _value_at(setting, document)
    if setting[:1] == ("data",) and len(setting) < 3:
        if isinstance(value, dict):
            return (
                "found [data], expected [[data]] in double brackets, because there may be several."
            )
        return (
            f"`data` is {_shown(document['data'])}, "
            "expected [[data]] with metadata and latents, at least once."
        )
    name, annotation = _name(setting, document), _annotation_at(setting)
    if _keys_of(annotation):
        return f"`{name}` is {_shown(value)}, expected a section {_header(setting, document)}."
    words = _words(annotation) if isinstance(value, str) else []
    near = get_close_matches(value, words, n=1) if words else []
    suggestion = f" Did you mean {to_toml(near[0])}?" if near else ""
    if get_origin(annotation) is tuple and isinstance(value, str):
        # On a command line, the shell would take the quotes.
        listed = to_toml([near[0] if near else value])
        suggestion = f" Write {name} = {listed}, or --set '{name}={listed}'."
    return f"`{name}` is {_shown(value)}, expected {_expected_at(setting)}.{suggestion}"


def _value_at(setting: SettingPath, document: dict[str, Any]) -> Any:
    """The value that the document gives to a setting."""
    value: Any = document
    for part in setting:
        value = value[part]
    return value


def _shown(value: Any) -> str:
    """A value as TOML, cut short."""
    text = printable(to_toml(value))
    return text if len(text) <= _LONGEST_VALUE else text[: _LONGEST_VALUE - 1] + "…"


def _words(annotation: Any) -> list[str]:
    """All words that a type allows."""
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [word for part in get_args(annotation) for word in _words(part)]


def _expected_at(setting: SettingPath) -> str:
    """The values that a setting allows, in words."""
    info = _keys_of(_annotation_at(setting[:-1]))[str(setting[-1])]
    if info.examples:
        return f"text such as {to_toml(info.examples[0])}"
    return _expected(info.annotation, info.metadata)


def _expected(annotation: Any, limits: Iterable[Any]) -> str:
    """The values that a type with these limits allows, in words."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        inner = [
            limit
            for part in parts[1:]
            for limit in (part.metadata if isinstance(part, FieldInfo) else [part])
        ]
        return _expected(parts[0], [*limits, *inner])
    if origin in (Union, UnionType):
        return " or ".join(_expected(part, limits) for part in parts if part is not type(None))
    if origin is Literal:
        return _listed(map(to_toml, parts), "or")
    if origin is tuple and _is_tables(annotation):
        return "a list of tables"
    if origin is tuple:
        return f"a list of {_expected(parts[0], ())}"
    bounds: dict[type, Any] = {type(limit): limit for limit in limits}
    if annotation is str:
        return "text in quotes that is not empty" if MinLen in bounds else "text in quotes"
    if annotation in (int, float):
        return _expected_number("a whole number" if annotation is int else "a number", bounds)
    return {bool: "true or false", Path: "a path in quotes"}.get(annotation, "a table")


def _expected_number(number: str, bounds: dict[type, Any]) -> str:
    """`a multiple of 75`, `a number from 0 to 1`, `a number, above 0 and at most 1`, ..."""
    if MultipleOf in bounds:
        most = f" up to {_grouped(bounds[Le].le)}" if Le in bounds else ""
        return f"a multiple of {bounds[MultipleOf].multiple_of}{most}"
    if Ge in bounds and Le in bounds:
        return f"{number} from {bounds[Ge].ge} to {_grouped(bounds[Le].le)}"
    words = []
    if Ge in bounds:
        words.append(f"{bounds[Ge].ge} or more")
    if Gt in bounds:
        words.append(f"above {bounds[Gt].gt}")
    if Le in bounds:
        words.append(f"at most {bounds[Le].le}")
    if Lt in bounds:
        words.append(f"below {bounds[Lt].lt}")
    return f"{number}, {' and '.join(words)}" if words else number


def _grouped(number: float) -> str:
    """The number, in groups of three digits from five digits on."""
    return f"{number:,}" if number >= 10_000 else str(number)


def _listed(words: Iterable[str], last: str) -> str:
    """`a, b or c`."""
    *head, tail = words
    return f"{', '.join(head)} {last} {tail}" if head else tail
