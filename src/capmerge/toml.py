"""Writes a value as TOML text that `tomllib` reads back to an equal value.

The standard library can read TOML but not write it. Everything fits on one line: tables inside a
value are inline tables.
"""

import json
import re
from collections.abc import Mapping
from datetime import date, time
from pathlib import Path
from typing import Any

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")


def to_toml(value: Any) -> str:
    r"""One line of TOML for a value of the kinds that `tomllib` returns, a tuple or a path.

    A tuple becomes an array, and a path its text. Raises `TypeError` for any other value.

    >>> to_toml({"betas": (0.9, 0.999), "name": 'a "b"'})
    '{betas = [0.9, 0.999], name = "a \\"b\\""}'
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, str | Path):
        return _text(str(value))
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(key)} = {to_toml(one)}" for key, one in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    if isinstance(value, date | time):  # a datetime is a date
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no form in TOML")


def _key(key: str) -> str:
    """A key as TOML writes it, in quotes if it needs them."""
    return key if _BARE_KEY.fullmatch(key) else _text(key)


def _text(text: str) -> str:
    # JSON's escapes are TOML's too, but TOML refuses a raw DEL.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
