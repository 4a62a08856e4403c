"""Tests of the one reader of rewritten records, and of the index's fast path against it."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capmerge.captions.draw import Drawn
from capmerge.captions.merge import Merger
from capmerge.captions.templates import MergeOptions
from capmerge.captions.written import BrokenRecordError, read_written
from capmerge.index.rows import texts_by_rule, texts_of

LINES = st.lists(st.sampled_from(["", "a", "b, c", "{x|y}", "{{a}}"]), min_size=1, max_size=3)
SPANS = st.lists(st.sampled_from([[0, 1], [0, 0], [1, 0], [0], [True, 1], "a", [0, 9]]), max_size=2)
RECORDS = st.fixed_dictionaries(
    {"caption": LINES.map("\n".join) | st.none(), "capmerge": st.text("tcbx", max_size=3)},
    optional={
        "capmerge_weights": st.lists(st.sampled_from([0, 1, 2, -1, 1.0]), max_size=3) | st.none(),
        "capmerge_tags": SPANS | st.none(),
    },
)


def read(reader, record):
    """Return the result of a reader for a record, or that it calls the record broken."""
    try:
        return reader(record)
    except BrokenRecordError as error:
        return f"broken: {error}"


@given(record=RECORDS)
def test_the_fast_way_of_the_index_judges_as_the_general_one(record):
    """The texts whose tokens the index stores are the same either way, and so is the error."""
    fast, general = read(texts_of, record), read(texts_by_rule, record)
    assert fast == general if isinstance(general, str) else set(fast) == set(general)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"caption": 3}, 'expected strings "caption" and "capmerge"'),
        ({"caption": "a\nb\nc"}, "found 3 lines and 2 letters"),
        ({"capmerge": "tx"}, "found the letter 'x'"),
        ({"capmerge_weights": [1]}, r'"capmerge_weights" is \[1\], expected one whole number'),
        ({"capmerge_weights": [0, 0]}, "not all 0"),
        ({"capmerge_weights": [True, 1]}, "expected one whole number"),
        ({"capmerge_weights": [1, -1]}, "expected one whole number"),
        ({"capmerge": "tb"}, '"capmerge_tags" to be 1 pairs'),
        ({"capmerge": "tb", "capmerge_tags": [[1, 0]]}, '"capmerge_tags" to be 1 pairs'),
        ({"capmerge": "tb", "capmerge_tags": [[0, 1], [0, 1]]}, '"capmerge_tags" to be 1 pairs'),
    ],
)
def test_what_is_wrong_with_a_record_is_said(change, message):
    """Each field that does not fit the others has its message."""
    with pytest.raises(BrokenRecordError, match=message):
        read_written({"caption": "a\nb", "capmerge": "tc", **change})


def test_a_long_value_does_not_fill_the_terminal():
    """The message about wrong weights quotes their beginning."""
    record = {"caption": "a", "capmerge": "t", "capmerge_weights": [1] * 100_000}
    with pytest.raises(BrokenRecordError) as error:
        read_written(record)
    assert len(str(error.value)) < 300


def test_lines_letters_and_places_belong_together():
    """An in-line wildcard has a letter for each option, and other captions one for each line."""
    record = {"tags": "a, {b}", "caption": "One."}
    merged = {name: copy.copy(record) for name in ("lines", "inline", "concat")}
    for layout, changed in merged.items():
        Merger(MergeOptions(layout=layout)).merge(changed)
    lines, inline, concat = map(read_written, merged.values())
    assert lines.lines == inline.lines == ["a, {{b}}", "One."]
    assert (lines.is_inline, inline.is_inline, concat.is_inline) == (False, True, False)
    assert lines.place_of(Drawn("One.", 1, 2, ())) == inline.place_of(Drawn("One.", 0, 1, (1,)))
    start, end = concat.span_at(0)
    assert concat.lines[0][start:end] == "a, {{b}}"
    assert lines.span_at(0) is None


def test_an_empty_caption_has_no_lines():
    """A record without text is read as no lines and no letters, not as one empty line."""
    assert read_written({"caption": "", "capmerge": ""}).lines == []
    assert read_written({"caption": "", "capmerge": "t"}).lines == [""]
