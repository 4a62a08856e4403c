from itertools import islice

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import buckets
from trainer.data.buckets import SetRows, bucket_sizes, largest_area, next_of_bucket, triple_of
from trainer.errors import LatentsError


def rows(width, chunks=None, repeats=1, usable=None):
    """The columns of square records."""
    column = np.array(width, dtype=np.uint32)
    return SetRows(
        column,
        column,
        None if chunks is None else np.array(chunks),
        repeats,
        None if usable is None else np.array(usable),
    )


def test_records_that_are_left_out_size_nothing():
    """The largest area is that of the usable records, so a bogus size reserves no memory."""
    usable = [True, False, True]
    assert largest_area([rows([64, 1_000_000, 128], usable=usable)]) == 128 * 128
    assert largest_area([rows([64, 96]), rows([512], usable=[False])]) == 96 * 96


@pytest.fixture
def small_windows(monkeypatch):
    """Windows of three records, so that small sets have many."""
    monkeypatch.setattr(buckets, "WINDOW", 3)


@pytest.mark.usefixtures("small_windows")
def test_sizes_are_summed_over_sets_windows_and_repeats():
    """A bucket holds the samples of all sets, and unusable records form no bucket."""
    sets = [rows([64, 128, 64, 64, 64, 192], repeats=2, usable=[True] * 5 + [False]), rows([64])]
    codes, sizes = bucket_sizes(sets)
    assert [triple_of(code) for code in codes.tolist()] == [(64, 64, 0), (128, 128, 0)]
    assert sizes.tolist() == [9, 2]


def test_chunk_counts_part_buckets():
    """Records of the same size with different chunk counts are in different buckets."""
    codes, sizes = bucket_sizes([rows([64, 64, 64], chunks=[1, 3, 1])])
    assert [triple_of(code) for code in codes.tolist()] == [(64, 64, 1), (64, 64, 3)]
    assert sizes.tolist() == [2, 1]


def test_no_usable_record_is_an_error_that_says_so():
    """The message counts the records and names the settings."""
    with pytest.raises(
        LatentsError,
        match=r"^data: none of the 2 records is usable, expected at least one\. Check data",
    ):
        bucket_sizes([rows([64, 64], usable=[False, False]), rows([])])


def test_what_the_codes_do_not_hold_is_refused():
    """A size of more than 24 bits, or chunk counts in only one set, raise `ValueError`.

    Sizes of unusable records are not checked.
    """
    with pytest.raises(ValueError, match="below 2"):
        bucket_sizes([rows([2**24])])
    with pytest.raises(ValueError, match="in all sets or in none"):
        bucket_sizes([rows([64]), rows([64], chunks=[1])])
    assert bucket_sizes([rows([2**24, 64], usable=[False, True])])[1].tolist() == [1]


@given(st.data())
def test_the_next_of_a_bucket_come_in_a_circle(data):
    """The other usable records of the bucket come in a circle, and none of another set.

    The circle begins after the given record and ends before it.
    """
    kinds = data.draw(
        st.lists(
            st.tuples(st.sampled_from([64, 128]), st.integers(1, 2), st.booleans()),
            min_size=1,
            max_size=30,
        )
    )
    record = data.draw(st.integers(0, len(kinds) - 1))
    kinds[record] = (*kinds[record][:2], True)
    width, chunks, usable = zip(*kinds, strict=True)
    sets = [rows([64] * 5, chunks=[1] * 5), rows(width, chunks=chunks, usable=usable)]
    circle = [*range(record + 1, len(kinds)), *range(record)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(buckets, "WINDOW", 3)
        assert list(next_of_bucket(sets, 1, record)) == [
            (1, other) for other in circle if kinds[other] == kinds[record]
        ]


def test_the_next_of_a_bucket_is_looked_for_no_further_than_needed():
    """Rows after the window that holds the next record are not read."""

    class Column(np.ndarray):
        furthest = 0

        def __getitem__(self, rows):
            Column.furthest = max(Column.furthest, rows.stop)
            return np.asarray(self)[rows]

    width = np.full(5 * buckets.WINDOW, 64, dtype=np.uint32).view(Column)
    assert list(islice(next_of_bucket([SetRows(width, width, None, 1, None)], 0, 7), 2)) == [
        (0, 8),
        (0, 9),
    ]
    assert Column.furthest <= 8 + buckets.WINDOW
