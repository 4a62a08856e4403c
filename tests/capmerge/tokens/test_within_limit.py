"""The places within a limit are those that cutting and counting at every place finds."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.tokens.counter import TokenCounter
from capmerge.tokens.load import load_clip
from capmerge.tokens.within_limit import count_within

TOKENIZER = load_clip("sd1")
PIECES = st.sampled_from(
    [
        "1girl",
        "a",
        "solo",
        "^_^",
        "x_(y)",
        "don't",
        ":d",
        "é",
        "Ã©",
        "日本",
        "&amp;",
        "!!",
        "\t",
        "",
    ]
)
TEXTS = st.lists(
    st.tuples(PIECES, st.sampled_from([", ", " ", ",", ",, ", " , ", "), "])), max_size=14
).map(lambda pairs: "".join(map("".join, pairs)))


def counted(text):
    """Return the number of tokens of a text."""
    return len(TOKENIZER.encode(text))


@settings(deadline=None)
@given(st.lists(st.tuples(TEXTS, st.integers(-1, 6)), min_size=4, max_size=12), st.integers(1, 20))
def test_places_are_the_only_ones_that_a_search_can_find(asked, limit):
    """Up to a place a text fits, as at all earlier ends, and it fits at no later one."""
    texts, commas_from = map(list, zip(*asked, strict=True))
    counts, places = count_within(TokenCounter(TOKENIZER), texts, limit, commas_from)
    assert counts == [counted(text) for text in texts]
    for number, place in places.items():
        text, start = texts[number], commas_from[number]
        assert counts[number] > limit
        if start < 0:
            ends = [match.start() for match in re.finditer(" ", text)]
        else:
            ends = [
                match.start()
                for match in re.finditer(",", text)
                if len(text[: match.start()].encode()) >= start
            ]
        assert place in ends
        for end in ends:
            assert (counted(text[:end]) <= limit) == (end <= place), text[:end]


def test_ordinary_tags_and_sentences_have_a_place():
    """The example of the module: it is told from the counts of the pieces alone."""
    texts = ["1girl, solo, long hair"] * 2 + ["short", "1girl,solo,long hair"]
    counts, places = count_within(TokenCounter(TOKENIZER), texts, 5, [0, -1, 0, 0])
    assert counts == [7, 7, 1, 7]
    assert places == {0: len("1girl, solo"), 1: len("1girl, solo,")}
