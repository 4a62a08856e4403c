"""Loops of describing models are found wherever they are, and ordinary captions have none."""

import json
import time

import pytest
from builders.metadata import run
from builders.paths import ROOT
from hypothesis import assume, given
from hypothesis import strategies as st

from capmerge.stats.loops import has_loop

PHRASES = st.text("abc de,", min_size=4, max_size=60).filter(lambda text: text.strip(" ,"))


@given(PHRASES, st.integers(5, 40), st.text("xyz ", max_size=80), st.text("uvw ", max_size=80))
def test_a_phrase_in_a_row_is_a_loop(phrase, times, before, behind):
    """Five times or more are a loop if they are a quarter of the text, at any place of it."""
    assume(len(before) + len(behind) <= 3 * len(phrase) * times)
    assert has_loop(before + phrase * times + behind)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("very " * 5, True),
        ("ha" * 12, True),
        ("a cat, " * 4, False),
        ("1, 2, " * 30, False),
        ("- " * 90, False),
        ("word " * 5 + "".join(map(str, range(300))), False),
        ("", False),
        ("猫が好き。" * 6, True),
    ],
)
def test_what_is_a_loop(text, expected):
    """A phrase has a letter and four characters, and stands there five times in a row."""
    assert has_loop(text) is expected


def test_statistics_tell_the_records_whose_captions_loop(tmp_path):
    """Their number and the first five keys are in the document and the table; tags do not count."""
    loop = "A girl, " + "red hair, red eyes, " * 6
    records = {f"k{number}": {"caption": loop + str(number), "tags": "a"} for number in range(7)}
    records["lines"] = {"caption": f"One.\n{loop}", "tags": "a"}
    records["tags"] = {"caption": "Fine.", "tags": "red, " * 40}
    source = tmp_path / "in.json"
    source.write_text(json.dumps(records))
    shown = run("stats", source).out.decode()
    assert '8 records have a caption that loops (the first: "k0", "k1", "k2", "k3", "k4").' in shown
    found = json.loads((tmp_path / "in.stats.json").read_bytes())["loops"]
    assert found == {"records": 8, "first": [{"key": f"k{number}"} for number in range(5)]}


def test_the_examples_have_no_loops():
    """No caption of the examples is taken for a loop."""
    records = json.loads(ROOT.joinpath("examples/meta_lat.json").read_bytes())
    assert not [key for key, record in records.items() if has_loop(record.get("caption") or "")]


def test_long_texts_take_no_longer():
    """The time of a long text is bounded, also for one that nearly loops."""
    for text in ("ab" * 119 + "c", "a" * 100 + "b", "abcd"):
        long = text * (2_000_000 // len(text)) + "." * 7_000_000
        start = time.process_time()
        assert not has_loop(long)
        assert time.process_time() - start < 1
