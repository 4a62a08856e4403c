"""Fields of several records become one record by one rule, which plans by names only repeat."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capmerge.commands.join_fields import (
    ConflictError,
    FieldJoiner,
    FieldRules,
    join_fields,
    same,
)

NAMES = ["caption", "tags", "rating", "capmerge", "capmerge_tags"]
RECORDS = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["x", "y", "", 1]), max_size=5)


def outcome(join):
    """The record with the order of its fields and the number of conflicts, or the error."""
    try:
        record, conflicts = join()
    except ConflictError as error:
        return error.source, str(error), error.hint
    return list(record.items()), conflicts


@given(
    records=st.lists(RECORDS, min_size=1, max_size=3),
    owners=st.dictionaries(st.sampled_from(NAMES[:3]), st.integers(0, 2)),
    on_conflict=st.sampled_from(["error", "first", "last"]),
)
def test_plans_are_the_rule(records, owners, on_conflict):
    """For any records, asked twice, a plan gives what the rule gives."""
    rules = FieldRules(["a.json", "b.json", "c.json"], owners, on_conflict)
    parts = list(enumerate(records))
    joiner = FieldJoiner(rules)
    expected = outcome(lambda: join_fields(parts, rules))
    assert outcome(lambda: joiner.join(parts)) == expected
    assert outcome(lambda: joiner.join(parts)) == expected


@given(
    pairs=st.lists(st.tuples(RECORDS | st.just(1), RECORDS), max_size=4),
    owners=st.dictionaries(st.sampled_from(NAMES[:3]), st.integers(0, 1)),
    on_conflict=st.sampled_from(["error", "first", "last"]),
    sources=st.permutations([0, 1]),
)
def test_pairs_at_once_are_the_rule(pairs, owners, on_conflict, sources):
    """Pairs of records joined at once are what the rule makes of each, or the first error."""
    rules = FieldRules(["a.json", "b.json"], owners, on_conflict)
    groups = [list(zip(sources, pair, strict=True)) for pair in pairs]

    def one_by_one():
        found = [join_fields(parts, rules) for parts in groups]
        return dict(enumerate(list(one.items()) for one, _ in found)), sum(n for _, n in found)

    def at_once():
        columns = [list(column) for column in zip(*pairs, strict=True)] or [[], []]
        joined, conflicts = FieldJoiner(rules).join_pairs(tuple(sources), *columns)
        return dict(enumerate(list(one.items()) for one in joined)), conflicts

    assert outcome(at_once) == outcome(one_by_one)


@given(records=st.lists(RECORDS, min_size=2, max_size=3), owner=st.integers(0, 1))
def test_the_mark_and_its_caption_stay_together(records, owner):
    """The joined record has the caption of one file with its mark and the fields of the mark."""
    rules = FieldRules(["a", "b", "c"], {"caption": owner, "tags": owner}, "first")
    record, _ = join_fields(list(enumerate(records)), rules)
    ours = {
        name: value for name, value in record.items() if name[:4] == "capm" or name == "caption"
    }
    theirs = records[owner]
    assert ours == {name: theirs[name] for name in theirs if name in ours}
    assert ours.keys() == {name for name in theirs if name.startswith("cap")}
    assert record.get("tags") == theirs.get("tags")
    if "capmerge" in record:
        assert list(record)[-1] == "capmerge"


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        ("1", "1.0", False),
        ("1", "true", False),
        ("0", "-0.0", False),
        ('{"a": 1, "b": NaN}', '{"b": NaN, "a": 1}', True),
        ('"\\ud83d"', '"\\ud83d"', True),
        (str(10**400), str(10**400 + 1), False),
        ("null", '"null"', False),
        ("[1, [2]]", "[1, [2]]", True),
    ],
)
def test_values_are_the_same_json(one, other, are_same):
    """Types count, the order of fields does not, and nothing is too large to compare."""
    assert same(json.loads(one), json.loads(other)) is are_same
