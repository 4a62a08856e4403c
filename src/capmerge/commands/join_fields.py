"""Joins the fields of the records that several files have under one key. Pure: it reads no file."""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from capmerge.captions.fields import MARK
from capmerge.captions.presence import numbers_without
from capmerge.errors import printable, quoted

OnConflict = Literal["error", "first", "last"]
Part = tuple[int, Any]
"""The number of a file among those that are joined, and its record."""
_LONGEST_SHOWN = 60
_MOST_PLANS = 4096


class ConflictError(ValueError):
    """Raised for values that cannot be joined; the message says what was found, and `hint` why."""

    def __init__(self, source: int, problem: str, hint: str) -> None:
        super().__init__(problem)
        self.source, self.hint = source, hint


class FieldRules(NamedTuple):
    """The files from which fields are taken, and what is done with values that differ."""

    names: Sequence[str]
    """The names of the files, by their numbers."""
    owners: Mapping[str, int]
    """The number of the file that alone gives a field; other fields come from any file."""
    on_conflict: OnConflict


def same(value: Any, other: Any) -> bool:
    """True if two values are the same JSON: `1` and `1.0` differ, the order of fields does not.

    NaN is the same as NaN.

    >>> same({"a": 1, "b": 2}, {"b": 2, "a": 1}), same([1], [1.0]), same(True, 1)
    (True, False, False)
    """
    if value.__class__ is str and other.__class__ is str:
        return bool(value == other)
    return json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)


class FieldJoiner:
    """Joins the fields of records by `rules`.

    Which field comes from which file depends on the names of the fields alone, as long as no two
    files give the same one. So for most records the rule is asked once for all that have the same
    names.
    """

    def __init__(self, rules: FieldRules) -> None:
        self.rules = rules
        self._plans: dict[tuple[Any, ...], list[tuple[int, str]] | None] = {}

    def join(self, parts: Sequence[Part]) -> tuple[dict[str, Any], int]:
        """What `join_fields` returns for `parts`; raises as it does."""
        for _, record in parts:
            if record.__class__ is not dict:
                return join_fields(parts, self.rules)
        names = tuple([(source, *record) for source, record in parts])
        plan = self._planned(names, parts)
        if plan is None:
            return join_fields(parts, self.rules)
        return {name: parts[place][1][name] for place, name in plan}, 0

    def join_pairs(
        self, sources: tuple[int, int], ones: Sequence[Any], others: Sequence[Any]
    ) -> tuple[list[dict[str, Any]], int]:
        """What `join` makes of each two records, which two `sources` give in this order.

        With them comes the number of values that gave way to others. Raises as `join` does.
        """
        first, second = sources
        plans, joined, conflicts = self._plans, list[dict[str, Any]](), 0
        for both in zip(ones, others, strict=True):
            one, other = both
            plan = None
            if one.__class__ is dict and other.__class__ is dict:
                plan = plans.get(((first, *one), (second, *other)))
            if plan is None:
                record, more = self.join(((first, one), (second, other)))
                joined.append(record)
                conflicts += more
            else:
                joined.append({name: both[place][name] for place, name in plan})
        return joined, conflicts

    def _planned(
        self, names: tuple[Any, ...], parts: Sequence[Part]
    ) -> list[tuple[int, str]] | None:
        """The plan for `parts`, whose files and fields are `names`; None if values decide."""
        if names not in self._plans:
            if len(self._plans) == _MOST_PLANS:
                self._plans.clear()
            self._plans[names] = self._plan(parts)
        return self._plans[names]

    def _plan(self, parts: Sequence[Part]) -> list[tuple[int, str]] | None:
        """For each field of the joined record the number of its part; None if values decide it."""
        marked = [
            (source, {name: (place, name) for name in record})
            for place, (source, record) in enumerate(parts)
        ]
        try:
            record, conflicts = join_fields(marked, self.rules)
        except ConflictError:
            return None
        return None if conflicts else list(record.values())

    def missing(self, groups: Sequence[Sequence[Part]]) -> dict[int, list[str]]:
        """The fields of `FieldRules.owners` that their files lack, by the numbers of the groups."""
        columns: dict[int, list[Any]] = {
            source: [None] * len(groups) for source in range(len(self.rules.names))
        }
        for number, parts in enumerate(groups):
            for source, record in parts:
                columns[source][number] = record
        return self.missing_in(columns, len(groups))

    def missing_in(self, columns: Mapping[int, Sequence[Any]], count: int) -> dict[int, list[str]]:
        """What `missing` returns; each of the files has `count` records, or none at all."""
        missing = defaultdict[int, list[str]](list)
        for name, source in self.rules.owners.items():
            for number in numbers_without(columns.get(source, [None] * count), name):
                missing[number].append(name)
        return missing


def join_fields(parts: Sequence[Part], rules: FieldRules) -> tuple[dict[str, Any], int]:
    """The record that has the fields of all `parts`, each of another file, in their order.

    A field stands where the first file has it. All fields whose names begin with `capmerge` come
    with the caption, from its file alone, and stand behind all others, as a rewrite writes them.
    With it comes the number of values that gave way to another file's.

    Raises `ConflictError` for a record that is no object, for values that differ unless the rules
    say which one counts, and for tags that would get into a rewritten record of another file.
    """
    for source, record in parts:
        if not isinstance(record, dict):
            raise ConflictError(
                source,
                "the record is not an object, expected one whose fields can be joined.",
                "Leave --fields out to join whole records.",
            )
    caption_from, conflicts = _caption_source(parts, rules)
    fields: dict[str, Any] = {}
    taken_from: dict[str, int] = {}
    for source, record in parts:
        for name, value in record.items():
            if name == "caption" or name.startswith(MARK):
                if source != caption_from:
                    continue
            elif rules.owners.get(name, source) != source:
                continue
            if name in fields and not same(fields[name], value):
                if rules.on_conflict == "error":
                    raise _differ(rules, name, (taken_from[name], source), (fields[name], value))
                conflicts += 1
                if rules.on_conflict == "first":
                    continue
            fields[name], taken_from[name] = value, source
    if MARK in fields and taken_from.get("tags", caption_from) != caption_from:
        raise ConflictError(
            taken_from["tags"],
            "found tags for a record that is rewritten already: its caption holds its tags, and "
            "sd-scripts would add these to every line.",
            "Join the original files and rewrite the result, or take the tags from the rewritten "
            "file too.",
        )
    ours = [name for name in fields if name.startswith(MARK)]
    for name in sorted(ours, key=MARK.__eq__):  # the mark itself is the last
        fields[name] = fields.pop(name)
    return fields, conflicts


def _caption_source(parts: Sequence[Part], rules: FieldRules) -> tuple[int | None, int]:
    """The file from which the caption is taken, and the number of captions that give way to it.

    A caption and the fields of its rewrite are one thing: captions of the same text differ if only
    one of them is rewritten.
    """
    if "caption" in rules.owners:
        return rules.owners["caption"], 0
    having = [part for part in parts if "caption" in part[1] or MARK in part[1]]
    if not having:
        return None, 0
    chosen = having[-1 if rules.on_conflict == "last" else 0]
    others = [part for part in having if not same(_caption_of(part[1]), _caption_of(chosen[1]))]
    if others and rules.on_conflict == "error":
        captions = _caption_of(chosen[1]), _caption_of(others[0][1])
        raise _differ(rules, "caption", (chosen[0], others[0][0]), captions)
    return chosen[0], len(others)


def _caption_of(record: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in record.items() if name == "caption" or name.startswith(MARK)
    }


def _differ(
    rules: FieldRules, name: str, sources: tuple[int, int], values: tuple[Any, Any]
) -> ConflictError:
    first, second = (rules.names[source] for source in sources)
    one, other = map(_shown, values)
    return ConflictError(
        sources[1],
        f"the field {quoted(name)} is {other}, but {one} in {printable(first)}.",
        f"Say which file gives it, --fields {printable(f'{name}={first}')} or "
        f"{printable(f'{name}={second}')}, or use --on-conflict first or last.",
    )


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return printable(text if len(text) <= _LONGEST_SHOWN else f"{text[: _LONGEST_SHOWN - 1]}…")
