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
    limits = [{"limit": limit, "share": 0.25} for limit in (75, 150, 225)]
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
        "tags: 50.0 % of what is drawn, mean 20 tokens"
    ]
    assert shown.limits == [
        (75, "75: cuts 25.0 %"),
        (150, "150: cuts 25.0 %"),
        (225, "225: cuts 25.0 %"),
    ]
