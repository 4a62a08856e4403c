import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.builders.blocks import LAYOUTS

from capmerge.metadata.codec import decode
from capmerge.metadata.members import member_starts, split_members
from capmerge.metadata.quotes import strings_in

KEYS = st.sampled_from(
    ["a", "b", "ab", "", " ", ": {", "\u00e9", 'x": {', "},", 'é\\": {', "\ud800", "a/1.png"]
)
VALUES = st.sampled_from(
    [
        {},
        {"c": "plain"},
        {"tags": '},\n  "a": {'},
        {"tags": "ends in }, ", "c": "x },"},
        {"n": {"a": {}}},
        None,
        5,
        "},",
        '}, "',
        [{"a": 1}, "b", {}],
        {"x": 2**70},
    ]
)
BETWEEN = st.sampled_from([",", ", ", ",\n  ", " ,\n  ", ",\n"])
COLONS = st.sampled_from([": ", ":", " : "])


def spelled(text, *, escaped):
    """A JSON string, with every character as an escape or only where that is needed."""
    if not escaped:
        return json.dumps(text, ensure_ascii="\ud800" in text)
    return '"' + "".join(f"\\u{ord(char):04x}" for char in text) + '"'


def count_strings(value):
    """The strings in a value at any depth, where an object may also be a tuple of pairs."""
    if isinstance(value, dict):
        return sum(1 + count_strings(inner) for inner in value.values())
    if isinstance(value, list | tuple):
        return sum(map(count_strings, value))
    return isinstance(value, str)


@given(
    st.lists(st.tuples(KEYS, VALUES, BETWEEN, COLONS, st.booleans()), max_size=8),
    st.sampled_from([None, 2]),
    st.booleans(),
)
@settings(max_examples=400, deadline=None)
def test_every_member_is_found(members, indent, last):
    """Whatever the layout, the keys and the strings, decoding gives each member in its place."""
    text = ""
    for number, (key, value, between, colon, escaped) in enumerate(members):
        shown = json.dumps(value, indent=indent, ensure_ascii=False)
        text += (between if number else "") + spelled(key, escaped=escaped) + colon + shown
    data = (text + ("\n}" if last or not members else "")).encode()
    pairs = [(key, value) for key, value, *_ in members]
    decoded = decode(data, "json", last=last or not members)
    assert repr([*decoded.pairs]) == repr(pairs)
    assert not decoded.doubled
    assert len(member_starts(data)) - 1 == len(pairs)
    assert strings_in(data) == count_strings(pairs)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_members_of_every_layout(layout):
    """Two of three records get the key of an earlier one, and all of them are still there."""
    rng = random.Random(1)
    source = LAYOUTS[layout]
    body = source[source.index(b'"') : source.rindex(b"}")].rstrip()
    members = split_members(body)
    assert len(members) == 60
    for member in rng.sample(members[1:], 40):
        key = member[: member.index(b'"', 1) + 1]
        equal = rng.choice([b'"danbooru/0"', b'"danbooru\\/\\u0030"'])
        body = body.replace(key, equal, 1)
    expected = json.loads(b"{" + body + b"}", object_pairs_hook=list)
    assert [key for key, _ in decode(body, "json", last=False).pairs] == [k for k, _ in expected]


@pytest.mark.parametrize("value", ["null", '"},"', '"x},\\n", "b": 5', "[]"])
@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_lost_value_that_is_no_object(number, value):
    """A value that is no object is seen although a plain record of the same key replaces it."""
    keys = ["one", "two", "three", "four"]
    plain = [f'"{key}": {{\n    "tags": "t"\n  }}' for key in keys]
    plain.insert(number, f'"{keys[number]}": {value}')
    data = ",\n  ".join(plain).encode()
    found = decode(data, "json", last=False).pairs
    assert [*found] == json.loads(b"{" + data + b"}", object_pairs_hook=_pairs_or_record)


def _pairs_or_record(pairs):
    """Make dicts of the records, and leave the object around them a list."""
    return dict(pairs) if pairs and pairs[0][0] == "tags" else pairs


# A field's name, its value, and whether all of the name is written as escapes.
FIELDS = st.tuples(st.sampled_from(["caption", "tags", "n", '\\"', ""]), VALUES, st.booleans())
TEXTS = {"plain": None, "exact": 2**70, "escapes": '"\\" \u2019 \\\\"'}


def as_object(fields):
    """The JSON text of an object with these fields, equal ones included."""
    members = (
        f"{spelled(name, escaped=escaped)}: {json.dumps(value)}" for name, value, escaped in fields
    )
    return "{" + ", ".join(members) + "}"


@pytest.mark.parametrize("extra", TEXTS)
@pytest.mark.parametrize("kind", ["json", "jsonl"])
@given(
    st.lists(
        st.tuples(st.sampled_from("abc"), st.lists(FIELDS, max_size=3), st.booleans()),
        min_size=1,
        max_size=5,
    )
)
@settings(max_examples=60, deadline=None)
def test_fields_that_a_record_has_twice(kind, extra, records):
    """Exactly the records are told in which a field occurs again, also deep inside and escaped."""
    texts, doubled = [], set()
    for number, (key, fields, is_nested) in enumerate(records):
        names = [name for name, *_ in fields]
        if len(set(names)) < len(names):
            doubled.add(number)
        inner = as_object(fields)
        record = '{"nested": [0, {"deeper": ' + inner + "}]}" if is_nested else inner
        first = json.dumps(TEXTS[extra]).join(('{"first": ', ""))
        record = first + (", " if record != "{}" else "") + record[1:]
        if kind == "json":
            texts.append(f'"{key}": {record}')
        else:
            texts.append(f'{{"image_path": "{key}", {record[1:]}')
    data = (", " if kind == "json" else "\n").join(texts).encode()
    decoded = decode(data, kind, last=False)
    assert decoded.doubled == doubled
    assert decoded.doubled_keys() == [records[number][0] for number in sorted(doubled)]
    values = [json.loads("{" + text + "}" if kind == "json" else text) for text in texts]
    expected = [
        value[key] if kind == "json" else value
        for value, (key, *_) in zip(values, records, strict=True)
    ]
    for value in expected:
        value.pop("image_path", None)
    assert repr(decoded.values()) == repr(expected)


def test_the_last_string_looks_like_the_end_of_a_record():
    """Nothing follows the quote of a string that ends the bytes."""
    data = b'"a": {},"a": {},"b": "},"'
    assert split_members(data) == [b'"a": {}', b'"a": {}', b'"b": "},"']
    assert list(decode(data, "json", last=False).pairs) == [("a", {}), ("a", {}), ("b", "},")]
