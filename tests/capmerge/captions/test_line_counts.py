from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capmerge.captions.line_counts import (
    MOST_LINES,
    line_counts,
    lines_of_templates,
    off_ppm,
    spread,
    whole_weights,
)

WEIGHTS = st.lists(st.integers(1, 40) | st.integers(1, 10**9), min_size=1, max_size=70)


def as_shares(weights):
    """Return weights as shares that sum to one."""
    return [Fraction(weight, sum(weights)) for weight in weights]


def dealt(shares):
    """Return the lines of each share at the limit, as the rule is worded, in exact fractions."""
    if len(shares) >= 64:
        return [1] * len(shares)
    alone = set()
    while True:
        others = [i for i in range(len(shares)) if i not in alone]
        lines = 64 - len(alone)
        quota = {i: shares[i] * lines / sum(shares[j] for j in others) for i in others}
        small = {i for i in others if quota[i] < 1}
        if not small:
            break
        alone |= small
    counts = [1 if i in alone else int(quota[i]) for i in range(len(shares))]
    by_remainder = sorted(others, key=lambda i: (-(quota[i] - int(quota[i])), i))
    for i in by_remainder[: 64 - sum(counts)]:
        counts[i] += 1
    return counts


@given(WEIGHTS)
@settings(max_examples=200, deadline=None)
def test_whole_weights_are_the_smallest_with_the_ratio(weights):
    """Whole weights keep the exact ratio and share no divisor."""
    found = whole_weights(as_shares(weights))
    assert as_shares(found) == as_shares(weights)
    assert all(
        any(weight % divisor for weight in found)
        for divisor in range(2, min(found) + 1 if min(found) < 50 else 50)
    )


@given(WEIGHTS)
@example([999, 1])
@example([1000, 1000, 1])
@example([100, 2, 2, 2, 1])
@example([65, 65])
@example([33, 32])
@example([1] * 63 + [2])
@example([1] * 62 + [3])
@example([1] * 70)
@example([10**9] + [1] * 62)
@example([10**9] + [1] * 63)
@example([1, 1, 1, 97, 97, 97])
@settings(max_examples=300, deadline=None)
def test_line_counts_follow_the_rule(weights):
    """Counts are exact up to 64 lines; over that the largest remainder decides, none under one."""
    shares = as_shares(weights)
    exact = whole_weights(shares)
    counts = line_counts(shares)
    assert counts == (exact if sum(exact) <= 64 else dealt(shares))
    assert min(counts) >= 1
    assert sum(counts) <= max(MOST_LINES, len(weights))


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([64], [1]),
        ([63, 1], [63, 1]),
        ([64, 1], [63, 1]),
        ([1, 64], [1, 63]),
        ([3, 63], [1, 21]),
        # 21.01, 21.01 and 21.97 of 64: the one line left over goes to the largest remainder.
        ([22, 22, 23], [21, 21, 22]),
        ([43, 43, 43, 2], [21, 21, 21, 1]),
        # 0.03 of 64 takes a line whole. Of the 63 others, 31.5 each is a tie: the earlier one wins.
        ([1000, 1000, 1], [32, 31, 1]),
        ([1, 1000, 1000], [1, 32, 31]),
        # The small one takes a line whole; that leaves the next under one, which takes a line too.
        ([640, 10, 9], [62, 1, 1]),
        ([630000, 10040, 9999, 1], [61, 1, 1, 1]),
    ],
)
def test_line_counts_by_hand(weights, expected):
    """Counts equal those worked out by hand, with ties and shares of under one line."""
    assert line_counts(as_shares(weights)) == expected


def test_64_or_more_alternatives_get_one_line_each():
    """With 64 alternatives or more each gets one line, whatever the weights."""
    assert line_counts(as_shares([1000] + [1] * 63)) == [1] * 64
    assert line_counts(as_shares([1000] + [1] * 99)) == [1] * 100


@given(WEIGHTS)
@settings(max_examples=200, deadline=None)
def test_templates_have_as_many_lines_as_keep_their_ratio(weights):
    """The lines of templates are the largest exact multiple that fits, or else `line_counts`."""
    shares = as_shares(weights)
    exact = whole_weights(shares)
    lines = lines_of_templates(shares)
    if sum(exact) > MOST_LINES:
        assert lines == line_counts(shares)
    else:
        assert as_shares(lines) == shares
        assert MOST_LINES - sum(exact) < sum(lines) <= MOST_LINES


@given(st.lists(st.integers(1, 40), min_size=1, max_size=70), st.integers(1, 64))
@settings(max_examples=200, deadline=None)
def test_lines_are_spread_evenly(weights, lines):
    """Any run of alternatives has its share of the lines to within one, and the first has one."""
    counts = spread(as_shares(weights), lines)
    assert counts[0] >= 1
    assert sum(counts) == lines
    for start in range(0, len(weights), 7):
        for end in range(start, len(weights) + 1, 5):
            meant = Fraction(lines * sum(weights[start:end]), sum(weights))
            assert abs(sum(counts[start:end]) - meant) < 1


def test_how_far_off_is_rounded_up():
    """A share that is off by a hair is not reported as exact."""
    assert off_ppm(1, 3, 21, 63) == 0
    assert off_ppm(999, 1000, 63, 64) == 14_625
    assert off_ppm(10**9, 10**9 + 1, 1, 1) == 1
