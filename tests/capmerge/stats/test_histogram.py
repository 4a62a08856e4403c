import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.stats.histogram import histogram
from capmerge.stats.lengths import LengthStats

LENGTHS = st.lists(st.integers(0, 400) | st.integers(0, 10**7), max_size=30)


def document_of(tags, captions=()):
    """Return the part of a document from which pictures are drawn."""
    styles, lines = {}, LengthStats()
    for name, lengths in (("tags", tags), ("caption", captions), ("both", ())):
        stats = LengthStats()
        stats.add(list(lengths), [f"k{number}" for number in range(len(lengths))], (1, 2))
        lines.merge(stats)
        styles[name] = {"share": 0.5, **stats.as_json()}
    limits = [{"limit": limit, "share": 0.25, "dropped_share": 0.125} for limit in (75, 150, 225)]
    return {"lengths": {"lines": lines.as_json()}, "styles": styles, "limits": limits}


@settings(deadline=None)
@given(LENGTHS, LENGTHS)
def test_every_line_is_in_one_bin(tags, captions):
    """Bins ascend, are few, reach past the longest line and hold each probability once."""
    shown = histogram(document_of(tags, captions))
    assert shown.edges == sorted(set(shown.edges))
    assert len(shown.edges) <= 125
    assert shown.edges[-1] > max([0, *tags, *captions])
    assert shown.edges[0] == shown.log_tokens
    assert sum(sum(style.heights) for style in shown.styles) == pytest.approx(
        (len(tags) + len(captions)) / 2
    )
    assert shown.end >= 225


@pytest.mark.parametrize(
    ("longest", "log_tokens"),
    [(0, False), (300, False), (1000, False), (1001, True), (200_000, True)],
)
def test_a_line_far_longer_than_the_others_makes_the_axis_a_log_one(longest, log_tokens):
    """A longest line over ten times the length of nine in ten lines makes the axis a log one."""
    shown = histogram(document_of([80] * 99 + [longest]))
    assert shown.log_tokens == log_tokens
    bins = sum(1 for left in shown.edges if left < 300)
    assert bins > 30


def test_labels_tell_shares_and_limits():
    """The legend has each style's share and mean, and each limit says what it cuts."""
    shown = histogram(document_of([10, 30]))
    assert [style.label for style in shown.styles] == [
        "tags: 50.0 % of what is drawn, mean 20.0 tokens"
    ]
    assert shown.limits == [
        (75, "75: cuts 25.0 %"),
        (150, "150: cuts 25.0 %"),
        (225, "225: cuts 25.0 %"),
    ]
    assert shown.drops[0] == (75, "75: drops 12.5 %")
    assert shown.height_label == "expected draws per epoch, in bins of 1 token"


def test_the_curve_falls_from_all_tokens_to_none():
    """The share of dropped tokens is 1 at length 0, 0 past the longest text, and never rises."""
    shown = histogram(document_of([10, 30], [500]))
    assert (shown.dropped[0], shown.dropped[-1]) == (1.0, 0.0)
    assert shown.dropped == sorted(shown.dropped, reverse=True)


def test_a_label_near_the_end_of_the_axis_goes_to_the_left():
    """The label of 225 has no room beside short texts, and has room beside long ones."""
    assert histogram(document_of([10])).is_far_right(225)
    assert not histogram(document_of([900])).is_far_right(225)
