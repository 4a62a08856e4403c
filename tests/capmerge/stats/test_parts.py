"""The counts of a shard, written and read back, are the same counts."""

import json
from collections import Counter
from fractions import Fraction

from capmerge.captions.tally import Most, Tally
from capmerge.stats.counts import CaptionStats
from capmerge.stats.parts import stats_as_json, stats_from_json, tally_as_json, tally_from_json


def test_a_tally_comes_back():
    """All fields, those with counters, pairs of names and lone surrogates too."""
    tally = Tally(
        records=10**30,
        kinds=Counter(both=3, empty=1),
        capped_line_ppm=Most(7),
        dropped_tags=Counter({"\ud800": 2, "": 1}),
        like_named=Counter({("caption", "text"): 4}),
    )
    found = tally_from_json(json.loads(json.dumps(tally_as_json(tally))))
    assert found == tally
    assert found.capped_line_ppm + 3 == 7  # the larger one, not the sum


def test_statistics_come_back():
    """Lengths by share, fractions, tags and sizes, and what is added to them later."""
    stats = CaptionStats()
    stats.records.kinds["both"] = 5
    stats.tags.add([3, 70], ["a", "\udfff"])
    stats.lines["t"].add([5, 6], ["a", "b"], (1, 3))
    stats.wildcards.mean_sum = Fraction(10, 3)
    stats.uncounted_tags = ["1girl, solo", "solo,  hat"]
    stats.resolutions.update(["512x512", "512x512"])
    stats.size_fields["train_resolution"] = 2
    stats.literals["BREAK"] = 1
    again = stats_from_json(json.loads(json.dumps(stats_as_json(stats))))
    assert json.dumps(stats_as_json(again)) == json.dumps(stats_as_json(stats))
    assert again.tag_counts.counts == {"1girl": 1, "solo": 2, "hat": 1}
    again.merge(stats_from_json(stats_as_json(stats)))
    assert again.tag_counts.counts == {"1girl": 2, "solo": 4, "hat": 2}
    assert again.wildcards.mean_sum == Fraction(20, 3)


def test_too_many_tags_stay_too_many():
    """A shard that has no counts of tags gives a sum without them."""
    stats = CaptionStats()
    stats.tag_counts.overflowed = True
    again = stats_from_json(json.loads(json.dumps(stats_as_json(stats))))
    assert again.tag_counts.counts is None
