import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capmerge.metadata import quotes
from capmerge.metadata.quotes import has_no_more_strings, prepare_to_count, strings_in


@pytest.fixture(params=["bytes.count", "numpy"])
def counted_by(request, monkeypatch):
    """Both ways to count."""
    monkeypatch.setattr(quotes, "_numpy", np if request.param == "numpy" else None)
    monkeypatch.setattr(quotes, "_SMALL_BYTES", 0)


@pytest.mark.usefixtures("counted_by")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.sampled_from(['"', "\\", "\n", "é", "a", "word " * 30]), max_size=30))
def test_quotes_inside_strings_are_told_from_those_around_them(parts):
    """Backslashes may be rare or frequent, and in rows."""
    text = "".join(parts)
    data = json.dumps([text, {text: "b"}]).encode()
    assert strings_in(data) == 3
    assert has_no_more_strings(data, 3)
    assert not has_no_more_strings(data, 2)


def test_numpy_counts_in_large_files_alone(monkeypatch):
    """It is not imported for a small file."""
    monkeypatch.setattr(quotes, "_numpy", None)
    prepare_to_count(1000)
    assert quotes._numpy is None
    prepare_to_count(10**9)
    assert quotes._numpy is np
