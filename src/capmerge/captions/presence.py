"""Whether a record has a field, by the rule of a rewrite, in original and in rewritten records."""

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
    mark = record.get(MARK)
    if isinstance(mark, str) and field in _LETTERS:
        return any(letter in mark for letter in _LETTERS[field])
    value = record.get(field)
    if isinstance(value, str):
        return bool(value.strip())
    return value is not None and value != [] and value != {}
