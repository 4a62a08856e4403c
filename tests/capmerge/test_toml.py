import tomllib
from datetime import date, datetime, time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capmerge.toml import to_toml

TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
VALUES = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)


@given(VALUES)
def test_any_value_comes_back(value):
    """Any value reads back equal, whatever characters its texts and keys contain."""
    assert tomllib.loads(f"value = {to_toml(value)}") == {"value": value}


# TOML has dates without a time zone.
@pytest.mark.parametrize("value", [date(2024, 5, 6), datetime(2024, 5, 6, 7, 8, 9), time(7, 8)])  # noqa: DTZ001
def test_dates_come_back(value):
    """A date or a time reads back equal."""
    assert tomllib.loads(f"value = {to_toml(value)}") == {"value": value}


def test_paths_are_texts_and_tuples_lists():
    """Paths are written as their text, tuples as lists."""
    assert to_toml((Path("a/b"), "c")) == '["a/b", "c"]'


def test_what_toml_has_no_form_for_is_refused():
    """A value that TOML has no form for, such as null, is refused."""
    with pytest.raises(TypeError, match="NoneType has no form in TOML"):
        to_toml(None)
