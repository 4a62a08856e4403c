"""Whether a record has a field, by the rule of a rewrite, in original and in rewritten records."""

from collections.abc import Iterable
from typing import Any

from capmerge.captions.fields import MARK

_LETTERS = {"tags": "tb", "caption": "cb"}
"""The letters of the mark that say that a rewritten record holds tags, or a caption."""


def has_field(record: Any, field: str) -> bool:
    """Return whether a record has this field, with something in it.

    A field that is null, a blank text, or an empty list or object counts as missing. A rewritten
    record has its tags and its caption in one field, so its mark says which of them it has.

    >>> has_field({"tags": " "}, "tags"), has_field({"caption": "1girl", "capmerge": "t"}, "tags")
    (False, True)
    """
    if not isinstance(record, dict):
        return False
    if MARK in record and field in _LETTERS and isinstance(mark := record[MARK], str):
        return any(letter in mark for letter in _LETTERS[field])
    value = record.get(field)
    if value.__class__ is str:
        return bool(value.strip())
    return value is not None and value not in ([], {})


def numbers_without(records: Iterable[Any], field: str) -> list[int]:
    """Return the numbers of the records that do not have this field, counted from 0."""
    numbers = []
    for number, record in enumerate(records):
        # Nearly all values are texts that do not begin with white space, and lists of numbers.
        if record.__class__ is dict and MARK not in record:
            value = record.get(field)
            if value.__class__ is str:
                if value[:1] > " " and not value[0].isspace():
                    continue
            elif value.__class__ is list and value:
                continue
        if not has_field(record, field):
            numbers.append(number)
    return numbers
