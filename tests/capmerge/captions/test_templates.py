import re
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capmerge.captions.templates import (
    LAYOUTS,
    MOST_LINES,
    MergeOptions,
    Template,
    line_counts,
    parse_template,
    shares_of,
    whole_weights,
)
from capmerge.errors import UsageError

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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{tags}", Template(("tags",), ("", ""))),
        ("{caption}=4", Template(("caption",), ("", ""), 4)),
        ("{tags}, {caption}=4", Template(("tags", "caption"), ("", ", ", ""), 4)),
        ("photo of {caption}: {tags}!", Template(("caption", "tags"), ("photo of ", ": ", "!"))),
        ("{tags}{caption}", Template(("tags", "caption"), ("", "", ""))),
        ("{tags}=", Template(("tags",), ("", "="))),
        ("{tags}=a", Template(("tags",), ("", "=a"))),
        ("a=3 {tags}=2", Template(("tags",), ("a=3 ", ""), 2)),
        ("{tags}=1=2", Template(("tags",), ("", "=1"), 2)),
        ("{tags}=007", Template(("tags",), ("", ""), 7)),
        ("{tags} = 5", Template(("tags",), ("", " = 5"))),
        ("{tags}=-1", Template(("tags",), ("", "=-1"))),
        ("} {{tags}} |", Template(("tags",), ("} {", "} |"))),
        ("{tags}=\u0663", Template(("tags",), ("", "=\u0663"))),
    ],
)
def test_parse_template(text, expected):
    """A template is text around fields; ASCII digits after the last equals sign are its weight."""
    assert parse_template(text) == expected


@pytest.mark.parametrize(
    ("text", "phrase"),
    [
        ("{tags}=0", "weight is 0"),
        ("{tags}=000", "weight is 0"),
        ("{tag}", "unknown field {tag}"),
        ("{Tags}", "unknown field {Tags}"),
        ("{}", "unknown field {}"),
        ("{tags} {name}", "unknown field {name}"),
        ("{ tags }", "unknown field { tags }"),
        ("{tags}\n", "line break"),
        ("a\r{tags}", "line break"),
        ("{tags}\n=2", "line break"),
        ("no field", "no field"),
        ("", "no field"),
        ("=5", "no field"),
        ("{tags}{tags}", "found {tags} twice"),
        ("{caption} {tags} {caption}", "found {caption} twice"),
    ],
)
def test_impossible_templates_are_refused(text, phrase):
    """Each kind of impossible template is refused with its reason, and is a usage error."""
    with pytest.raises(UsageError, match=re.escape(phrase)) as error:
        parse_template(text)
    assert error.value.exit_code == 2


@pytest.mark.parametrize("digits", [5000, 30])
def test_enormous_weights_are_refused(digits):
    """A weight that no record can hold is a usage error, not a crash."""
    with pytest.raises(UsageError):
        parse_template("{tags}=" + "9" * digits)


@pytest.mark.parametrize(
    ("given_options", "phrase"),
    [
        ({"layout": "lines", "lines": ("{tags}",)}, "--line and --layout"),
        ({"layout": "inline", "weights": "field"}, "--weights field"),
        ({"prefix": "a\nb"}, "--prefix"),
        ({"suffix": "a\rb"}, "--suffix"),
        ({"lines": ("{tags}", "{tags}\n{caption}")}, "--line"),
        ({"lines": ("{nobody}",)}, "unknown field"),
        ({"prefix": "\udc80"}, "UTF-8"),
        ({"suffix": "\udc80"}, "UTF-8"),
        ({"lines": ("{tags}\udc80",)}, "UTF-8"),
    ],
)
def test_impossible_options_are_refused(given_options, phrase):
    """Options that cannot be carried out are refused when they are made."""
    with pytest.raises(UsageError, match=re.escape(phrase)):
        MergeOptions(**given_options)


@pytest.mark.parametrize("layout", [None, *LAYOUTS])
def test_layouts_are_templates(layout):
    """Every layout is a list of templates; none is the same as `lines`."""
    expected = {
        "lines": ["{tags}", "{caption}"],
        "concat": ["{tags}, {caption}"],
        "concat-caption-first": ["{caption}, {tags}"],
        "inline": ["{tags}", "{caption}"],
    }[layout or "lines"]
    options = MergeOptions(layout=layout)
    assert list(options.templates()) == [parse_template(text) for text in expected]
    assert options.inline == (layout == "inline")


@pytest.mark.parametrize(
    ("template", "missing", "expected"),
    [
        ("a{tags}b{caption}c", "tags", "a{caption}c"),
        ("a{tags}b{caption}c", "caption", "a{tags}c"),
        ("a{caption}b{tags}c", "tags", "a{caption}c"),
        ("a{caption}b{tags}c", "caption", "a{tags}c"),
        ("a{tags}c", "caption", "a{tags}c"),
    ],
)
def test_a_missing_field_goes_with_the_text_beside_it(template, missing, expected):
    """The text between two fields goes with the missing one; outer texts and the weight stay."""
    assert parse_template(template + "=3").without(missing) == parse_template(expected + "=3")


def test_a_template_without_fields_left_is_none():
    """A template whose only field is missing gives no line."""
    assert parse_template("a{tags}c").without("tags") is None


@pytest.mark.parametrize(
    ("text", "style"),
    [("{tags}", "t"), ("{caption}", "c"), ("{tags}{caption}", "b"), ("{caption} {tags}", "b")],
)
def test_style_letters(text, style):
    """The letter of a template says which fields it holds."""
    assert parse_template(text).style == style


def test_shares_are_the_weights_over_their_sum():
    """Every template has its weight's share of the probability."""
    templates = [parse_template(text) for text in ("{tags}=5", "{caption}", "{tags}, {caption}=4")]
    assert shares_of(templates) == [Fraction(1, 2), Fraction(1, 10), Fraction(2, 5)]


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
