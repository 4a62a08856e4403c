"""What all sections of a training config have in common, and the limits of their values.

`settings` puts the sections together.
"""

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict

SettingPath = tuple[str | int, ...]
"""The keys that lead to a setting: ("loss", "huber_c"), ("data", 0, "caption", "shuffle")."""
MOST = 1_000_000_000
"""Largest count of steps, epochs, tags or files; at a step per second it lasts 30 years.

Any product of two counts still fits the 64-bit numbers of plans and indexes.
"""
_LONGEST_NAME = 255
_LONGEST_PATH = 4095
"""Bytes that Linux allows in a name and in a path."""
_PathT = TypeVar("_PathT", str, Path)


def checked_path(path: _PathT) -> _PathT:
    """The path itself; raises `ValueError` for one that no system call takes."""
    text = str(path)
    if "\0" in text:
        raise ValueError("expected a path without NUL")
    sizes = [len(name.encode("utf-8", "surrogateescape")) for name in text.split("/")]
    if max(sizes) > _LONGEST_NAME or sum(sizes) + len(sizes) - 1 > _LONGEST_PATH:
        raise ValueError(
            f"expected a path of at most {_LONGEST_PATH:,} bytes whose names have at most "
            f"{_LONGEST_NAME}"
        )
    return path


class Section(BaseModel):
    """Base of all sections: frozen, without unknown keys, infinite numbers or conversions.

    "5" is not a number, and 1 is not true. Only lists become tuples and texts become paths, by
    `strict=False` at those fields, because TOML has neither.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )
