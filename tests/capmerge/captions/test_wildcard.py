import json
import random
import re
from fractions import Fraction

import pytest
from builders.paths import DATA
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.captions.wildcard import (
    MOST_OUTCOMES,
    TooManyOutcomesError,
    escape,
    has_brace,
    line_outcomes,
    outcomes,
    parse_line,
    space_groups,
    space_stand_ins,
    unbreakable_spans,
)

GOLDEN = json.loads((DATA / "wildcard_outcomes.json").read_text(encoding="utf-8"))
HOSTILE = st.text(st.sampled_from("{}|a, \n\r\u2985\u2986_\\") | st.characters(), max_size=14)
BRACES = st.text(st.sampled_from("{}|ab\u2985\u2986"), max_size=10)


def drawn_as_sd_scripts_does(caption, rng):
    """Return one text for `caption`, drawn step by step as sd-scripts' process_caption does."""
    if "\n" in caption:
        caption = rng.choice(caption.split("\n"))
    hidden_open, hidden_close = "\u2985", "\u2986"
    while hidden_open in caption or hidden_close in caption:
        hidden_open += "\u2985"
        hidden_close += "\u2986"
    caption = caption.replace("{{", hidden_open).replace("}}", hidden_close)
    caption = re.sub(r"\{([^}]+)\}", lambda group: rng.choice(group[1].split("|")), caption)
    return caption.replace(hidden_open, "{").replace(hidden_close, "}")


@pytest.mark.parametrize("case", GOLDEN, ids=[repr(case["caption"]) for case in GOLDEN])
def test_outcomes_are_those_of_the_real_code(case):
    """The grammar gives exactly the texts that the real process_caption drew."""
    found = outcomes(case["caption"])
    assert sorted(found) == case["outcomes"]
    assert sum(found.values()) == 1


@given(BRACES | HOSTILE, st.integers(0, 2**32))
@settings(max_examples=300, deadline=None)
def test_outcomes_hold_every_draw(caption, seed):
    """All that sd-scripts' steps draw is among the outcomes, whose probabilities sum to one."""
    found = outcomes(caption)
    rng = random.Random(seed)
    assert {drawn_as_sd_scripts_does(caption, rng) for _ in range(8)} <= found.keys()
    assert sum(found.values()) == 1


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("a\na\nb", {"a": Fraction(2, 3), "b": Fraction(1, 3)}),
        ("{a|a|b}", {"a": Fraction(2, 3), "b": Fraction(1, 3)}),
        (
            "{a|b}{a|b}",
            {
                "aa": Fraction(1, 4),
                "ab": Fraction(1, 4),
                "ba": Fraction(1, 4),
                "bb": Fraction(1, 4),
            },
        ),
        ("{a|b}\na", {"a": Fraction(3, 4), "b": Fraction(1, 4)}),
        ("", {"": Fraction(1)}),
        ("a\n", {"a": Fraction(1, 2), "": Fraction(1, 2)}),
    ],
)
def test_probabilities_are_exact(caption, expected):
    """A line is drawn first, then each group by itself; equal options add up."""
    assert outcomes(caption) == expected


@given(BRACES | HOSTILE)
@settings(max_examples=300, deadline=None)
def test_escaped_text_has_one_outcome(text):
    """Escaped text is read back as the text, with the spaced stand-ins as its only change."""
    line = text.replace("\n", "")
    spaced = line.replace("\u2985{", "\u2985 {").replace("\u2986}", "\u2986 }")
    assert line_outcomes(escape(line)) == {spaced: 1}


@given(st.text(st.characters(exclude_characters="{}")))
@settings(max_examples=100, deadline=None)
def test_text_without_braces_is_not_touched(text):
    """Only braces are doubled and only a brace brings a space."""
    assert escape(text) == text
    assert not has_brace(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{", "{{"),
        ("a {b|c}", "a {{b|c}}"),
        (":}", ":}}"),
        ("{{a}}", "{{{{a}}}}"),
        ("\u2985{", "\u2985 {{"),
        ("\u2986}", "\u2986 }}"),
        ("\u2985}", "\u2985}}"),
        ("\u2986{", "\u2986{{"),
        ("\u2985 {", "\u2985 {{"),
        ("\u2985a{", "\u2985a{{"),
        ("\u2985\u2985{{\u2986", "\u2985\u2985 {{{{\u2986"),
    ],
)
def test_escape(text, expected):
    """Braces are doubled once, and a space separates a stand-in from the brace it stands for."""
    assert escape(text) == expected


def test_stand_ins_before_single_braces_stay():
    """A written single brace belongs to a wildcard, and no stand-in can swap places with it."""
    assert space_stand_ins("\u2985{a|b\u2986}") == "\u2985{a|b\u2986}"
    assert space_stand_ins("\u2985{{a\u2986}}") == "\u2985 {{a\u2986 }}"


def test_too_many_outcomes_are_refused():
    """A line whose wildcards multiply past the limit is refused instead of filling the memory."""
    groups = "{a|b}" * MOST_OUTCOMES.bit_length()
    with pytest.raises(TooManyOutcomesError):
        outcomes(groups)
    assert len(outcomes(groups.removesuffix("{a|b}"))) == MOST_OUTCOMES


def test_long_outcomes_are_not_listed():
    """A line whose few outcomes are so long that they would fill the memory raises too."""
    line = "word " * 100_000 + "{a|b}" * 6
    with pytest.raises(TooManyOutcomesError):
        line_outcomes(line)
    assert len(line_outcomes(line[500_000 - 5_000 :])) == 64


@given(st.text(alphabet="{}|ab\u2985\u2986"))
def test_unbreakable_spans_are_the_grammars(line):
    """The spans hold exactly the groups that the grammar finds, and all braces it reads."""
    spans = unbreakable_spans(line)
    groups = [line[start:end] for start, end in spans if line[start:end] not in ("{{", "}}")]
    assert len(groups) == len(parse_line(line).groups)


@given(st.text(alphabet="{}|a\u2985\u2986"))
@settings(max_examples=1000)
def test_lines_are_read_as_by_the_grammars_own_expressions(line):
    """Where the search for groups ends early, nothing is missed that it would have found."""
    hidden_open, hidden_close = "\u2985", "\u2986"
    while hidden_open in line or hidden_close in line:
        hidden_open += "\u2985"
        hidden_close += "\u2986"
    parts = re.split(r"\{([^}]+)\}", line.replace("{{", hidden_open).replace("}}", hidden_close))
    if has_brace(line):
        assert parse_line(line) == (
            parts[::2],
            [options.split("|") for options in parts[1::2]],
            (hidden_open, hidden_close),
        )
    whole = re.compile(r"\{\{|\}\}|\{(?:\}\}|[^}])++\}")
    assert unbreakable_spans(line) == [match.span() for match in whole.finditer(line)]


@pytest.mark.parametrize("repeated", ["{ ", "{ }} ", "{ \u2985"])
def test_many_braces_that_open_no_group_are_read_once(repeated):
    """A line that reads on from each of its braces would take minutes."""
    line = "{a|b}" + repeated * 300_000
    parsed = parse_line(line)
    assert parsed.groups == [["a", "b"]]
    assert parsed.text([1]) == "b" + repeated.replace("}}", "}") * 300_000
    assert unbreakable_spans(line)[0] == (0, 5)
    assert len(unbreakable_spans(line)) == 1 + (300_000 if "}}" in repeated else 0)


@pytest.mark.parametrize(
    ("line", "spaced", "spaces"),
    [
        ("{x|y\u2986}\u2986", "{x|y\u2986} \u2986", [6]),
        ("\u2985{|}\u2985", "\u2985{|} \u2985", [4]),
        ("{a|\u2985}{\u2985|b}", "{a|\u2985} {\u2985|b}", [5]),
        ("{a|\u2985}{|}{{", "{a|\u2985}{|} {{", [8]),
        ("{a|\u2985}\u2986", "{a|\u2985}\u2986", []),
        ("{a|\u2985} {b|c}\u2985", "{a|\u2985} {b|c}\u2985", []),
        ("{a|b}", "{a|b}", []),
    ],
)
def test_groups_are_spaced_where_a_draw_could_join_stand_ins(line, spaced, spaces):
    """A space is put exactly where an option and its neighbour could make a hidden brace."""
    assert space_groups(line) == (spaced, spaces)
    found = {text.replace(" ", "") for text in line_outcomes(spaced)}
    assert found == {text.replace(" ", "") for text in meant_texts(line)}


def meant_texts(line):
    """Return every text that `line` is meant to become, put together without the grammar."""
    texts = [""]
    for written, options in re.findall(r"((?:[^{]|\{\{)*)(\{(?!\{)[^}]+\})?", line):
        literal = written.replace("{{", "{").replace("}}", "}")
        choices = options[1:-1].split("|") if options else [""]
        texts = [text + literal + choice for text in texts for choice in choices]
    return texts
