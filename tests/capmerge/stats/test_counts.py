import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.captions.merge import Merger
from capmerge.captions.templates import MergeOptions
from capmerge.stats.counts import LONGEST_TAG, BoundedCounter, CaptionStats
from capmerge.stats.document import build_document
from capmerge.stats.observer import Observer
from capmerge.tokens.counter import TokenCounter
from capmerge.tokens.load import load_clip

LONG = "x" * LONGEST_TAG
TAGS = st.lists(
    st.sampled_from(["1girl", "solo", "long_hair", LONG, LONG + "y", "", "a{b"]), max_size=5
)
TAG_TEXTS = st.builds(
    lambda tags, comma: comma.join(tags), TAGS, st.sampled_from([", ", ",", " , ", ",\n"])
)
CAPTIONS = st.lists(
    st.sampled_from(["A cat.", "A {red|blue} hat", "BREAK <|endoftext|>", "dog " * 90, "", "|"]),
    max_size=3,
).map("\n".join)
RECORDS = st.lists(
    st.fixed_dictionaries(
        {},
        optional={
            "tags": TAG_TEXTS,
            "caption": CAPTIONS,
            "train_resolution": st.lists(st.integers(1, 3), min_size=2, max_size=2),
            "image_size": st.just([1, "z" * 90]),
        },
    ),
    max_size=12,
)
OPTIONS = [
    MergeOptions(),
    MergeOptions(
        lines=("{tags}=3", "x {caption}, {tags}=2", "{caption}"),
        weights="field",
        caption_wildcards=True,
    ),
    MergeOptions(layout="concat", prefix="me, "),
]


@cache
def counters():
    """Return a CLIP tokenizer, and another tokenizer in place of a T5."""
    return TokenCounter(load_clip("sd1")), TokenCounter(load_clip("sd2"))


def count(numbered, options):
    """Return the counts of some records, counted block by block."""
    merger, observer = Merger(options), Observer(*counters())
    kept = CaptionStats()
    for number, original in numbered:
        merger.merge(record := dict(original))
        assert observer.note([(f"k{number}", record)], b"") == []
        if number % 3 == 0:
            observer.count()
            kept.merge(observer.take())
    observer.count()
    kept.merge(observer.take())
    return kept


def as_json(stats, options):
    """Return the document of the counts."""
    stats.count_tags()
    clip, t5 = counters()
    document = build_document(
        stats,
        source="m.json",
        merge=options,
        family="flux",
        counter=clip,
        t5=t5,
        duplicates={},
        loops={},
    )
    return json.dumps(document)


@pytest.mark.parametrize("options", OPTIONS)
@settings(deadline=None)
@given(records=RECORDS, parts=st.integers(1, 5), random=st.randoms(use_true_random=False))
def test_parts_merge_to_the_same_document(options, records, parts, random):
    """Any split of records among processes and any order of adding give the same JSON."""
    numbered = list(enumerate(records))
    whole = as_json(count(numbered, options), options)
    dealt = [[] for _ in range(parts)]
    for pair in random.sample(numbered, len(numbered)):
        random.choice(dealt).append(pair)
    counted = [count(part, options) for part in dealt]
    while len(counted) > 1:
        first, second = random.sample(counted, 2)
        if random.random() < 0.5:
            second.count_tags()  # as a process does before it hands over its counts
        first.merge(second)
        counted = [part for part in counted if part is not second]
    assert as_json(counted[0], options) == whole


@pytest.mark.parametrize("texts", [[f" {LONG}", LONG], [f"{LONG} ", "", "  "]])
def test_white_space_around_a_text_does_not_count(texts):
    """White space around a longest text is ignored, and blank texts are not counted."""
    counter = BoundedCounter(10, LONGEST_TAG)
    counter.update(texts)
    assert counter.counts == {LONG: sum(1 for text in texts if text.strip())}
    assert counter.long == 0


def test_a_large_part_is_handed_over():
    """A process with very many tags is large, and the empty counts it goes on with are not."""
    stats = CaptionStats()
    assert not stats.is_large
    stats.tag_counts.update(f"tag{number}" for number in range(1 << 18))
    assert stats.is_large


def test_long_texts_of_tags_are_counted_soon(monkeypatch):
    """Only short texts wait to be counted, as a megabyte of tags per record would fill memory."""
    monkeypatch.setattr("capmerge.stats.counts._MOST_UNCOUNTED_LETTERS", 100)
    kept = CaptionStats()
    for _ in range(30):
        block = CaptionStats(uncounted_tags=["solo, " * 4 + "1girl"])
        kept.merge(block)
        assert sum(map(len, kept.uncounted_tags)) < 100
    kept.count_tags()
    assert kept.tag_counts.counts == {"solo": 120, "1girl": 30}
