"""Lines are cut without a search exactly where the search cuts them, and nearly all of them are."""

import copy
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capmerge.captions.cut_places import has_plain_spaces, last_sentence_end, sentence_ends
from capmerge.captions.fit import Fitter
from capmerge.captions.merge import Merger
from capmerge.captions.templates import MergeOptions
from synthetic import records_of

SENTENCES = st.lists(
    st.sampled_from(
        [
            "A",
            "cat",
            "Mr",
            "e.g",
            "no",
            "x",
            ".",
            "!",
            "?",
            "...",
            "…",
            '"',
            "”",
            ")",
            " ",
            "  ",
            "。",
            "\t",
        ]
    ),
    max_size=16,
).map("".join)


@given(SENTENCES, st.integers(0, 40))
def test_the_last_sentence_end_is_that_of_all(text, start):
    """It is found backwards from a space, and is the one that a search from the front finds."""
    space = text.find(" ", start)
    if has_plain_spaces(text) and space >= 0:
        ends = [end for end in sentence_ends(text) if end <= space]
        assert last_sentence_end(text, space) == (ends[-1] if ends else 0)


@pytest.mark.parametrize("kind", ["plain", "mixed", "hostile"])
@pytest.mark.parametrize(
    "options", [{"fit_tokens": 75}, {"fit_tokens": 20, "prefix": "best, "}], ids=str
)
def test_blocks_are_cut_as_records_are(kind, options):
    """On generated metadata of every kind, a block becomes what its records become one by one."""
    records = [record for _, record in islice(records_of(kind), 300)]
    block = copy.deepcopy(records)
    together = Merger(MergeOptions(**options, fit_by="trim"))
    alone = Merger(MergeOptions(**options, fit_by="trim"))
    assert together.merge_all(block) == []
    for record in records:
        alone.merge(record)
    assert block == records
    assert together.tally.fit_cut == alone.tally.fit_cut > 100


def test_hardly_a_line_is_searched(monkeypatch):
    """Of the draws of mixed metadata that are too long, less than a tenth need the search."""
    searched = []
    cut_all = Fitter._cut_all
    monkeypatch.setattr(
        Fitter,
        "_cut_all",
        lambda fitter, measured: searched.extend(measured) or cut_all(fitter, measured),
    )
    merger = Merger(MergeOptions(fit_tokens=75, fit_by="trim"))
    merger.merge_all([record for _, record in islice(records_of("mixed"), 1000)])
    assert len(searched) < merger.tally.fit_cut / 10
