import copy
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.captions.alternatives import fields_of, trained_alternatives
from capmerge.captions.merge import Merger
from capmerge.captions.templates import MergeOptions
from capmerge.captions.written import BrokenRecordError
from capmerge.stats.observer import Observer
from capmerge.tokens.counter import TokenCounter
from capmerge.tokens.load import load_clip

TEXT = st.text(st.sampled_from("ab ,_{}|\u2985\u2986.é<"), min_size=1, max_size=12)
RECORDS = st.lists(
    st.dictionaries(
        st.sampled_from(["tags", "caption"]), TEXT | st.builds("{}\n{}".format, TEXT, TEXT)
    ),
    min_size=1,
    max_size=8,
)
OPTIONS = [
    MergeOptions(),
    MergeOptions(layout="inline"),
    MergeOptions(layout="concat"),
    MergeOptions(lines=("{tags}=3", "x {caption}, {tags}=2", "{caption}"), weights="field"),
    MergeOptions(lines=("{tags}=70", "{caption}"), underscores="space", caption_wildcards=True),
]


def as_json(counted):
    """Return all counts as values that can be compared."""
    counted.count_tags()
    counts = (
        counted.tag_counts.counts,
        counted.resolutions.counts,
        counted.literals,
        counted.wildcards,
        counted.records,
    )
    return [
        part.as_json()
        for part in (counted.tags, counted.captions, *counted.lines.values(), counted.t5_lines)
    ], counts


def merged(record, options=OPTIONS[0]):
    """Return one record as a rewrite writes it."""
    record = copy.deepcopy(record)
    Merger(options).merge(record)
    return record


@pytest.mark.parametrize("options", OPTIONS[:4])
@settings(deadline=None)
@given(records=RECORDS)
def test_what_was_meant_is_read_back(options, records):
    """A rewritten record has the alternatives of the original: texts, styles and shares."""
    merger = Merger(options)
    for record in records:
        meant = merger.alternatives(record)
        found = trained_alternatives(merged(record, options))
        assert sum((Fraction(*alternative.share) for alternative in found), Fraction(0)) == bool(
            meant
        )
        assert [alternative.style for alternative in found] == [
            alternative.style for alternative in meant
        ]
        assert [Fraction(*alternative.share) for alternative in found] == [
            alternative.share for alternative in meant
        ]
        for alternative, expected in zip(found, meant, strict=True):
            (text,) = alternative.texts
            assert text.replace(" ", "") == expected.text.replace(" ", "")


def test_tags_and_caption_are_told_apart():
    """In a line of both, the span gives the tags; the rest without its commas is the caption."""
    record = {"tags": "a_{b}, c", "caption": "A {cat}, here."}
    (found,) = trained_alternatives(merged(record, MergeOptions(layout="concat-caption-first")))
    assert (found.tags, found.captions, found.style) == ("a_{b}, c", ("A {cat}, here.",), "b")


@pytest.mark.parametrize(
    ("options", "record", "fields"),
    [
        ({}, {"tags": "a, b", "caption": "One.\nTwo."}, ("a, b", [("One.",), ("Two.",)])),
        ({"prefix": "me, "}, {"tags": "a", "caption": "One."}, ("me, a", [("me, One.",)])),
        (
            {"prefix": "a long prefix, ", "layout": "concat"},
            {"tags": "a", "caption": "One."},
            ("a", [("a long prefix, One.",)]),
        ),
        (
            {"lines": ("{tags}", "x {caption}, {tags}", "{caption}")},
            {"tags": "a", "caption": "One."},
            ("a", [("One.",)]),
        ),
        ({"lines": ("{tags}", "x {caption}, {tags}")}, {"tags": "a"}, ("a", [])),
        ({"lines": ("{tags}",)}, {"tags": "a", "caption": "One."}, ("a", [])),
        ({"caption_wildcards": True}, {"caption": "a {b|c}"}, ("", [("a b", "a c")])),
        ({}, {}, ("", [])),
    ],
)
def test_a_records_fields_count_once(options, record, fields):
    """Tags and each caption line count once, however many templates hold them."""
    assert fields_of(trained_alternatives(merged(record, MergeOptions(**options)))) == fields


def test_intended_wildcards_give_all_their_texts():
    """A caption with {a|b} has two texts; one with too many, the longest and the shortest."""
    options = MergeOptions(lines=("{caption}",), caption_wildcards=True)
    (found,) = trained_alternatives(merged({"caption": "a {red|blue} hat"}, options))
    assert found.texts == {"a red hat": Fraction(1, 2), "a blue hat": Fraction(1, 2)}
    (found,) = trained_alternatives(merged({"caption": "{a|bb}" * 13}, options))
    assert (found.listed, set(found.texts)) == (False, {"a" * 13, "b" * 26})


@pytest.mark.parametrize(
    "change",
    [
        {"caption": "one"},
        {"capmerge": "t"},
        {"capmerge": 3},
        {"capmerge_weights": [1]},
        {"capmerge": "bb"},
        {"capmerge": "xy"},
    ],
)
def test_a_record_that_was_edited_is_refused(change):
    """Lines, letters, weights and spans must belong together."""
    with pytest.raises(BrokenRecordError):
        trained_alternatives({"caption": "a\nb", "capmerge": "tc", **change})


@pytest.mark.parametrize("options", OPTIONS)
@settings(deadline=None)
@given(records=RECORDS)
def test_the_fast_way_counts_as_the_general_one(options, records):
    """Counting many records at once equals counting each with `trained_alternatives` alone."""
    tokenizer = load_clip("sd1")
    pairs = [(f"k{number}", merged(record, options)) for number, record in enumerate(records)]
    observer = Observer(TokenCounter(tokenizer), per_record=True)
    assert observer.note(pairs, b"") == []
    observed = observer.count()
    expected = [
        [max(len(tokenizer.encode(t)) for t in a.texts) for a in trained_alternatives(record)]
        for _, record in pairs
    ]
    lines = "".join(
        f'{{"key": "k{number}", "tokens": {tokens}}}\n' for number, tokens in enumerate(expected)
    )
    assert observed.per_record.decode() == lines
    assert len(observed.caption_hashes) == 8 * len(records)
    counted = observer.take()
    written = counted.all_lines().distribution().summary()
    assert (written["texts"], written["tokens"]) == (
        sum(map(len, expected)),
        sum(map(sum, expected)),
    )
    assert written["weight"] == sum(map(bool, expected))
    assert counted.tags.distribution().summary()["texts"] == sum(
        record["capmerge"].strip("c") != "" for _, record in pairs
    )


@settings(deadline=None)
@given(records=RECORDS)
def test_plain_records_count_as_any_other(records):
    """A plain record counts the same when weights of no effect send it through the general path."""
    found = []
    for more in ({}, {"capmerge_weights": [1, 1]}):
        pairs = [(f"k{number}", merged(record)) for number, record in enumerate(records)]
        pairs = [
            (key, record | (more if len(record["capmerge"]) == 2 else {})) for key, record in pairs
        ]
        observer = Observer(
            TokenCounter(load_clip("sd1")),
            TokenCounter(load_clip("sd2")),
            per_record=True,
        )
        assert observer.note(pairs, b"") == []
        found.append((observer.count(), as_json(observer.take())))
    assert found[0] == found[1]


@pytest.mark.parametrize("change", [{"caption": 5}, {"caption": None}, {"caption": ["a", "b"]}])
def test_an_edited_caption_is_no_traceback(change):
    """A rewritten record whose caption is not text is reported as broken and counted nowhere."""
    observer = Observer(TokenCounter(load_clip("sd1")))
    ((number, error),) = observer.note(
        [("k", {"caption": "a\nb", "capmerge": "tc", **change})], b""
    )
    assert number == 0
    assert "expected strings" in str(error)
    assert observer.count().caption_hashes == bytes(8)
    assert observer.take().records.rejected == 1


@pytest.mark.parametrize("caption", ["\nA cat.", "tags\n"])
def test_an_empty_line_is_no_tags_and_no_caption(caption):
    """An empty line, which only an edit leaves, is trained but is neither tags nor a caption."""
    observer = Observer(TokenCounter(load_clip("sd1")))
    assert observer.note([("k", {"caption": caption, "capmerge": "tc"})], b"") == []
    observer.count()
    counted = observer.take()
    assert (
        counted.records.kinds["both"],
        counted.records.counted,
        counted.all_lines().as_json()["texts"],
    ) == (0, 1, 2)


def test_too_many_equally_long_texts_are_one_text_with_all_the_probability():
    """The probabilities of too many wildcards add up to 1, and statistics count the line."""
    record = merged({"caption": "{b|c}" * 13}, MergeOptions(caption_wildcards=True))
    (alternative,) = trained_alternatives(record)
    assert alternative.texts == {"b" * 13: 1}
    assert not alternative.listed
    observer = Observer(TokenCounter(load_clip("sd1")))
    observer.note([("a.png", record)], b"")
    observer.count()
    wildcards = observer.stats.wildcards
    assert (wildcards.alternatives, wildcards.not_listed) == (1, 1)
    assert wildcards.mean_sum == wildcards.longest_sum == wildcards.shortest_sum > 0
