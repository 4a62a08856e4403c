import json
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capmerge.stats.counts import BoundedCounter
from capmerge.stats.duplicates import RecordHashes, RecordPlaces
from capmerge.stats.lengths import LONGEST, LengthStats
from capmerge.stats.observer import caption_hash

SHARES = st.tuples(st.integers(1, 9), st.integers(1, 9)).map(
    lambda pair: Fraction(min(pair), max(pair)).as_integer_ratio()
)
TEXTS = st.lists(st.tuples(st.integers(0, 400), st.sampled_from("abcdefgh"), SHARES), max_size=60)


def stats_of(texts):
    """Return the statistics of entries (length, key, share)."""
    stats = LengthStats()
    for length, key, share in texts:
        stats.add([length], [key], share)
    return stats


@given(TEXTS, st.randoms(use_true_random=False), st.integers(1, 5))
def test_parts_merge_exactly(texts, random, parts):
    """Any split of texts among workers and any order of merging give the same figures."""
    dealt = [[] for _ in range(parts)]
    for text in random.sample(texts, len(texts)):
        random.choice(dealt).append(text)
    merged = LengthStats()
    for part in random.sample(dealt, parts):
        merged.merge(stats_of(part))
    assert json.dumps(merged.as_json()) == json.dumps(stats_of(texts).as_json())


@given(TEXTS)
def test_what_is_written_is_read_back(texts):
    """JSON keeps every count: what is read back writes the same again."""
    written = stats_of(texts).as_json()
    assert LengthStats.from_json(json.loads(json.dumps(written))).as_json() == written


@given(TEXTS.filter(bool), st.fractions(0, 1))
def test_quantiles_are_the_smallest_length_that_holds_enough(texts, part):
    """A quantile is the smallest length that covers at least that part of the probability."""
    weight = sum(Fraction(*share) for _, _, share in texts)
    reached = [
        length
        for length in sorted({length for length, _, _ in texts})
        if sum(Fraction(*share) for other, _, share in texts if other <= length) >= part * weight
    ]
    assert stats_of(texts).distribution().quantile(part) == reached[0]


@given(TEXTS.filter(bool), st.integers(1, 300))
def test_a_cut_counts_what_is_over(texts, limit):
    """Cut texts, dropped tokens and padding equal those of encoding every text at the limit."""
    cut = stats_of(texts).distribution().limit_effect(limit)
    weight = sum(Fraction(*share) for _, _, share in texts)
    tokens = sum(length * Fraction(*share) for length, _, share in texts)
    kept = sum(min(length, limit) * Fraction(*share) for length, _, share in texts)
    assert cut.texts == sum(length > limit for length, _, _ in texts)
    assert cut.share == float(
        sum(Fraction(*share) for length, _, share in texts if length > limit) / weight
    )
    assert cut.dropped_tokens == sum(max(0, length - limit) for length, _, _ in texts)
    assert cut.dropped_share == (float((tokens - kept) / tokens) if tokens else 0)
    assert cut.padding_share == float(1 - kept / (limit * weight))


def test_nothing_has_no_figures():
    """Without texts there is no mean and no quantile, and nothing is cut."""
    written = stats_of([]).as_json()
    assert (
        written["texts"],
        written["mean"],
        written["median"],
        written["max"],
        written["max_key"],
    ) == (0, None, None, None, None)
    assert stats_of([]).distribution().limit_effect(75).share == 0


def test_the_longest_are_kept_by_length_then_key():
    """The twenty longest are kept, equal ones by key, whichever came first."""
    stats = LengthStats()
    stats.add([7] * 30, [f"{number:02}" for number in reversed(range(30))])
    stats.add([9, 1], ["z", "a"])
    assert stats.longest == [(9, "z"), *((7, f"{number:02}") for number in range(LONGEST - 1))]


def test_groups_of_75_hold_every_length():
    """An empty text needs one chunk, 75 tokens need one, and 76 need two."""
    grouped = (
        stats_of([(length, "k", (1, 2)) for length in (0, 75, 76, 300)]).distribution().grouped(75)
    )
    assert grouped == {1: (2, 0.5), 2: (1, 0.25), 4: (1, 0.25)}


def test_shares_of_any_size_stay_exact():
    """A weight too close to another for a float to tell apart still counts."""
    share = (10**30 - 1, 10**30)
    distribution = stats_of([(10, "a", share), (20, "b", (1, 10**30))]).distribution()
    assert distribution.weight == distribution.unit
    assert distribution.quantile(Fraction(10**30 - 1, 10**30)) == 10
    assert distribution.quantile(Fraction(1)) == 20


@given(
    st.lists(st.lists(st.sampled_from(["a", "b", "c", "d", "e", "too long", "longer still"]))),
    st.integers(1, 6),
)
def test_a_bounded_counter_gives_up_whoever_counts(parts, limit):
    """More distinct texts than the limit give no counts, however split; long ones add to `long`."""
    texts = [text for part in parts for text in part]
    whole, merged = BoundedCounter(limit, 3), BoundedCounter(limit, 3)
    whole.update(texts)
    for part in parts:
        counter = BoundedCounter(limit, 3)
        counter.update(part)
        merged.merge(counter)
    expected = Counter(text for text in texts if len(text) == 1)
    assert merged.counts == whole.counts == (expected if len(expected) <= limit else None)
    if merged.counts is not None:
        assert merged.long == whole.long == len(texts) - expected.total()


@given(st.lists(st.sampled_from(["", "a", "b", "c", "d"]), max_size=40), st.integers(1, 7))
def test_groups_of_duplicates(captions, step):
    """Groups are equal captions, largest first, with their first record; empty captions are out."""
    hashes = RecordHashes()
    data = b"".join(map(caption_hash, captions))
    for start in range(0, len(data), step):
        hashes.write(data[start : start + step], new_block=False)
    groups = hashes.groups()
    counted = Counter(filter(None, captions))
    again = [(count, captions.index(caption)) for caption, count in counted.items() if count > 1]
    assert groups.captions == counted.total()
    assert groups.distinct == len(counted)
    assert groups.in_groups == sum(count for count, _ in again)
    assert groups.largest == sorted(again, key=lambda group: (-group[0], group[1]))


def test_a_record_is_found_by_its_number():
    """In pieces of 3, 0 and 2 records, number 3 is the first of the third piece."""
    places = RecordPlaces()
    for start, size, records, last in ((1, 100, 3, False), (101, 5, 0, False), (106, 50, 2, True)):
        places.write(RecordPlaces.entry(start, size, records, last=last), new_block=True)
    assert places.places([0, 2, 3, 4]) == [
        (1, 101, False, 0),
        (1, 101, False, 2),
        (106, 156, True, 0),
        (106, 156, True, 1),
    ]


@pytest.mark.parametrize(("a", "b"), [("a", "a "), ("\ud83d", "\ud83e")])
def test_unlike_captions_have_unlike_hashes(a, b):
    """A space and a lone surrogate count."""
    assert caption_hash(a) != caption_hash(b)
