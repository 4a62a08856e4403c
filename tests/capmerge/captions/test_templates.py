import re
from fractions import Fraction

import pytest

from capmerge.captions.line_template import Template, parse_template
from capmerge.captions.templates import LAYOUTS, MergeOptions, shares_of
from capmerge.errors import UsageError


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{tags}", Template(("tags",), ("", ""))),
        ("{caption}=4", Template(("caption",), ("", ""), 4)),
        ("{tags}, {caption}=4", Template(("tags", "caption"), ("", ", ", ""), 4)),
        ("photo of {caption}: {tags}!", Template(("caption", "tags"), ("photo of ", ": ", "!"))),
        ("{tags}{caption}", Template(("tags", "caption"), ("", "", ""))),
        ("{tags}, score=high", Template(("tags",), ("", ", score=high"))),
        ("{tags}, score=0.5", Template(("tags",), ("", ", score=0.5"))),
        ("{tags}, score = 5", Template(("tags",), ("", ", score = 5"))),
        ("a=3 {tags}=2", Template(("tags",), ("a=3 ", ""), 2)),
        ("{tags}=007", Template(("tags",), ("", ""), 7)),
        ("{tags} = 5", Template(("tags",), ("", " "), 5)),
        ("{tags}=\t5 ", Template(("tags",), ("", ""), 5)),
        ("{tags}!=5", Template(("tags",), ("", "!"), 5)),
        ("<{{tags}} = 5", Template(("tags",), ("<{", "} "), 5)),
        ("{artist}: {tags}", Template(("artist", "tags"), ("", ": ", ""))),
        ("{Tags} {rating 1}", Template(("Tags", "rating 1"), ("", " ", ""))),
        ("} {{tags}} |", Template(("tags",), ("} {", "} |"))),
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
        ("{}", "no field can have the name {}"),
        ("{ tags }", "no field can have the name { tags }"),
        ("{red|blue} {tags}", "no field can have the name {red|blue}"),
        ("{artist} {artist}", "found {artist} twice"),
        ("{capmerge}", "writes the field {capmerge} itself"),
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


@pytest.mark.parametrize(
    "weight",
    [
        *(
            "",
            "0.5",
            "1.5",
            "-1",
            "x",
            " 0.5",
            "1=2",
            "5 times",
            "5, {caption}",
            "+5",
            "1e99999999",
        ),
        *("\u0663", "\u00b2", "1/0", "nan", "0x1", "1_0", "{caption}"),
    ],
)
@pytest.mark.parametrize("before", ["{tags}", "{tags} ", "a {caption} {tags}", "{{tags}}"])
def test_an_equals_sign_behind_a_brace_needs_a_whole_number(before, weight):
    """What stands behind `}=` is a whole number from 1 on; anything else is refused, never text."""
    with pytest.raises(UsageError, match=r"after the =, expected a whole number from 1 on"):
        parse_template(f"{before}={weight}")


@pytest.mark.parametrize(
    ("lines", "advice"),
    [
        (("{tags}=0.5", "{caption}"), "0.5 : 1 is 1:2 in whole numbers: give --line '{tags}=1' -"),
        (("{tags}=1.5", "a {caption}=2"), "--line '{tags}=3' --line 'a {caption}=4'."),
        (("{tags}", "{caption}= ,25", "{tags} {caption}=1.5"), "4:1:6"),
        (("{tags}=50%", "{caption}=1/3"), "3:2"),
        (("{tags} = 0.5",), "A single line needs no weight: give --line '{tags}'."),
    ],
)
def test_fractions_are_scaled_for_all_lines_together(lines, advice):
    """The message about a fraction shows whole weights with the ratio of all lines."""
    with pytest.raises(UsageError) as error:
        MergeOptions(lines=lines)
    assert advice in str(error.value)


@pytest.mark.parametrize("other", ["{caption}=x", "{caption}=-1", "{caption}=0.0", "{caption}="])
def test_weights_without_a_ratio_are_not_scaled(other):
    """No whole numbers are shown where a weight is no number above 0."""
    with pytest.raises(UsageError) as error:
        MergeOptions(lines=("{tags}=0.5", other))
    assert "in whole numbers" not in str(error.value)


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
        ({"lines": ("{}",)}, "no field can have"),
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
        ("a{x}b{tags}c{caption}d", "tags", "a{x}c{caption}d"),
        ("a{tags}b{x}c{caption}d", "tags", "a{x}c{caption}d"),
        ("a{x}b{caption}c{tags}d", "tags", "a{x}b{caption}d"),
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
    [
        ("{tags}", "t"),
        ("{caption}", "c"),
        ("{tags}{caption}", "b"),
        ("{caption} {tags}", "b"),
        ("{artist}", "c"),
        ("{artist} {caption}", "c"),
        ("{artist} {tags}", "b"),
    ],
)
def test_style_letters(text, style):
    """The letter of a template says which fields it holds; any but the tags count as caption."""
    assert parse_template(text).style == style


def test_shares_are_the_weights_over_their_sum():
    """Every template has its weight's share of the probability."""
    templates = [parse_template(text) for text in ("{tags}=5", "{caption}", "{tags}, {caption}=4")]
    assert shares_of(templates) == [Fraction(1, 2), Fraction(1, 10), Fraction(2, 5)]
