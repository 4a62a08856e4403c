import copy
import json
import re
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from capmerge.captions.fields import MARK, TAG_SPANS, WEIGHTS
from capmerge.captions.merge import Merger, RewrittenError
from capmerge.captions.record_texts import UnmergeableError
from capmerge.captions.tags import spaced
from capmerge.captions.tally import add_counts
from capmerge.captions.templates import MergeOptions
from capmerge.captions.wildcard import line_outcomes, outcomes, space_stand_ins

OPEN, CLOSE = "\u2985", "\u2986"
TEXT = st.text(
    st.sampled_from("{}|a, \n\r\u2985\u2986_\\%\u2028\x0c😀") | st.characters(), max_size=12
)
FIELD = st.none() | TEXT
AFFIX = st.text(st.sampled_from("{}|a ,\u2985\u2986%"), max_size=3)
TEMPLATES = [
    "{tags}",
    "{caption}",
    "{tags}, {caption}",
    "{caption}{tags}",
    "{tags}|{caption}",
    " a {tags}{caption} ",
    "{{caption}}: {tags}}",
]
LINES = st.lists(st.tuples(st.sampled_from(TEMPLATES), st.integers(1, 5)), min_size=1, max_size=3)


def options_of(lines, **others):
    """Options with weighted templates."""
    return MergeOptions(lines=tuple(f"{template}={weight}" for template, weight in lines), **others)


def merged(record, *, reserved=(), **options):
    """Return a merged copy of `record`."""
    record = copy.deepcopy(record)
    Merger(MergeOptions(**options), reserved).merge(record)
    return record


def tag_line(tags):
    """Return the tags of a record as one line, as the rule is worded."""
    return re.sub(r"[ \t,]*[\r\n][ \t,\r\n]*", ", ", (tags or "").strip()).strip()


def caption_lines(caption, how="each"):
    """Return the caption lines of a record, as the rule is worded."""
    lines = [line.strip() for line in re.split(r"\r\n|\r|\n", caption or "") if line.strip()]
    if how == "join":
        return [" ".join(lines)] if lines else []
    return lines[:1] if how == "first" else lines


def intended(lines, tags, caption, *, prefix="", suffix="", how="each"):
    """Return every text meant to be trained with its probability: the rule in plain form."""
    tags, captions = tag_line(tags), caption_lines(caption, how)
    have = {name for name, found in (("tags", tags), ("caption", captions)) if found}
    ways = []
    for template, weight in lines:
        parts = re.split(r"\{(tags|caption)\}", template)
        names = parts[1::2]
        kept = [name for name in names if name in have]
        if kept == names:
            ways.append((parts, weight))
        elif kept:
            ways.append(([parts[0], kept[0], parts[-1]], weight))
    if not ways and have:
        ways = [(["", have.pop(), ""], 1)]
    total = sum(weight for _, weight in ways)
    texts = {}
    for parts, weight in ways:
        for line in captions if "caption" in parts[1::2] else [""]:
            values = {"tags": tags, "caption": line}
            filled = "".join(values[part] if i % 2 else part for i, part in enumerate(parts))
            text = (prefix + filled + suffix).strip()
            number = len(captions) if "caption" in parts[1::2] else 1
            texts[text] = texts.get(text, 0) + Fraction(weight, total * number)
    return texts


def with_spaces(texts):
    """Return the texts with a space between a stand-in and the brace right after it."""
    spaced_texts = {}
    for text, probability in texts.items():
        written = re.sub(f"{OPEN}(?={{)", OPEN + " ", re.sub(f"{CLOSE}(?=}})", CLOSE + " ", text))
        spaced_texts[written] = spaced_texts.get(written, 0) + probability
    return spaced_texts


def without_spaces(texts):
    """Return the texts without spaces before braces, which may have been inserted."""
    plain = {}
    for text, probability in texts.items():
        key = re.sub(r" +(?=[{}])", "", text)
        plain[key] = plain.get(key, 0) + probability
    return plain


def drawn(record):
    """Return what can be drawn from a rewritten record, by its own weights if it has any."""
    if WEIGHTS not in record:
        return outcomes(record["caption"])
    found = {}
    for line, weight in zip(record["caption"].split("\n"), record[WEIGHTS], strict=True):
        for text, probability in line_outcomes(line).items():
            found[text] = found.get(text, 0) + probability * Fraction(weight, sum(record[WEIGHTS]))
    return found


@given(FIELD, FIELD, LINES, AFFIX, AFFIX, st.sampled_from(["each", "join", "first"]))
@example("a", OPEN, [("{caption}{tags}", 1)], "", "{", "each")
@example("{", OPEN, [("{caption}{tags}", 1)], "", "", "each")
@example("}", CLOSE, [("{caption}{tags}", 1)], "", "}", "each")
@example("a", OPEN + "{\n" + OPEN + " {", [("{caption}", 1)], "", "", "each")
@settings(max_examples=300, deadline=None)
def test_every_outcome_is_intended(tags, caption, lines, prefix, suffix, how):
    """sd-scripts draws exactly the intended alternatives of any text, with their probabilities."""
    expected = with_spaces(intended(lines, tags, caption, prefix=prefix, suffix=suffix, how=how))
    record = {"tags": tags, "caption": caption}
    options = options_of(lines, prefix=prefix, suffix=suffix, caption_lines=how, weights="field")
    Merger(options).merge(record)
    assert drawn(record) == (expected or {"": 1})
    repeated = {"tags": tags, "caption": caption}
    merger = Merger(options_of(lines, prefix=prefix, suffix=suffix, caption_lines=how))
    merger.merge(repeated)
    if merger.tally.capped:
        assert drawn(repeated).keys() <= expected.keys()
    else:
        assert drawn(repeated) == (expected or {"": 1})


@given(
    FIELD,
    FIELD,
    st.sampled_from(["lines", "concat", "concat-caption-first", "inline"]),
    AFFIX,
    AFFIX,
)
@example("a{", "b}", "inline", "", "")
@example("{a", "b", "inline", "", "")
@example("a", "b}\nc}", "inline", "", "")
@example("a|b", "c", "inline", "", "")
@example("a", "a", "inline", "", "")
@example("a", "b\nc", "inline", OPEN, CLOSE)
@settings(max_examples=300, deadline=None)
def test_every_outcome_of_a_layout_is_intended(tags, caption, layout, prefix, suffix):
    """The four layouts train what their templates say, in-line wildcards included."""
    lines = {
        "lines": [("{tags}", 1), ("{caption}", 1)],
        "concat": [("{tags}, {caption}", 1)],
        "concat-caption-first": [("{caption}, {tags}", 1)],
        "inline": [("{tags}", 1), ("{caption}", 1)],
    }[layout]
    found = merged({"tags": tags, "caption": caption}, layout=layout, prefix=prefix, suffix=suffix)
    expected = with_spaces(intended(lines, tags, caption, prefix=prefix, suffix=suffix))
    assert outcomes(found["caption"]) == (expected or {"": 1})


@given(FIELD, FIELD, LINES, AFFIX, AFFIX)
@example(
    "a",
    "{b|c}",
    [("{tags}, {caption}", 1)],
    "",
    "",
)
@example("}", "{a|b}", [("{caption}{tags}", 1)], "", "")
@example("{", "\u2985{", [("{caption}{tags}", 1)], "", "")
@example("{", "{a|b}", [("{tags}, {caption}", 1), ("{caption}{tags}", 2)], "{", "}")
@settings(max_examples=300, deadline=None)
def test_intended_wildcards_are_kept(tags, caption, lines, prefix, suffix):
    """With --caption-wildcards the caption part of a line is drawn as the caption alone would be.

    A stand-in character beside a group is left out: it may fuse with another when the group is
    drawn.
    """
    text = f"{tags}{caption}{prefix}{suffix}"
    assume(not {"{", "}"} <= set(caption or "") or not {OPEN, CLOSE} & set(text))
    captions = caption_lines(caption)
    record = {"tags": tags, "caption": caption}
    Merger(
        options_of(lines, prefix=prefix, suffix=suffix, caption_wildcards=True, weights="field")
    ).merge(record)
    names = {line: f"\ue000{number}\ue000" for number, line in enumerate(captions)}
    markers = {name: line for line, name in names.items()}
    marked = intended(
        lines, tags, "\n".join(names[line] for line in captions), prefix=prefix, suffix=suffix
    )
    expected = {}
    for text, probability in marked.items():
        name = next((name for name in markers if name in text), None)
        for part, chance in (
            line_outcomes(space_stand_ins(markers[name])) if name else {"": Fraction(1)}
        ).items():
            whole = text.replace(name, part) if name else text
            expected[whole] = expected.get(whole, 0) + probability * chance
    assert without_spaces(drawn(record)) == without_spaces(expected or {"": 1})


@given(FIELD, FIELD, LINES, AFFIX, AFFIX, st.booleans(), st.booleans())
@settings(max_examples=200, deadline=None)
def test_lines_are_clean(tags, caption, lines, prefix, suffix, wildcards, in_line):
    """No line is blank, unstripped or broken, and letters and spans fit the lines."""
    if in_line:
        options = MergeOptions(
            layout="inline", prefix=prefix, suffix=suffix, caption_wildcards=wildcards
        )
    else:
        options = options_of(lines, prefix=prefix, suffix=suffix, caption_wildcards=wildcards)
    record = {"tags": tags, "caption": caption}
    Merger(options).merge(record)
    written = record["caption"]
    assert "tags" not in record
    assert list(record)[-1] == MARK
    assert "\r" not in written
    if not written:
        assert record[MARK] == ""
        assert not tag_line(tags)
        assert not caption_lines(caption)
        return
    for line in written.split("\n"):
        assert line == line.strip() != ""
    if not in_line:
        assert len(record[MARK]) == len(written.split("\n"))
    assert set(record[MARK]) <= set("tcb")
    assert len(record.get(TAG_SPANS, [])) == record[MARK].count("b")


@given(TEXT, TEXT, LINES, AFFIX, AFFIX, st.booleans())
@settings(max_examples=200, deadline=None)
def test_spans_hold_the_tags(tags, caption, lines, prefix, suffix, wildcards):
    """A span marks the tags in its line as written, with doubled braces."""
    record = {"tags": tags, "caption": caption}
    Merger(options_of(lines, prefix=prefix, suffix=suffix, caption_wildcards=wildcards)).merge(
        record
    )
    both = [
        line
        for line, letter in zip(record["caption"].split("\n"), record[MARK], strict=False)
        if letter == "b"
    ]
    expected = next(iter(with_spaces({tag_line(tags): 1})))
    for line, (start, end) in zip(both, record.get(TAG_SPANS, []), strict=True):
        assert 0 <= start < end <= len(line)
        assert line_outcomes(line[start:end]) == {expected: 1}


@pytest.mark.parametrize(
    ("options", "caption", "letters", "spans"),
    [
        ({}, "1girl, solo\nA girl.", "tc", None),
        ({"layout": "lines"}, "1girl, solo\nA girl.", "tc", None),
        ({"layout": "concat"}, "1girl, solo, A girl.", "b", [[0, 11]]),
        ({"layout": "concat-caption-first"}, "A girl., 1girl, solo", "b", [[9, 20]]),
        ({"layout": "inline"}, "{1girl, solo|A girl.}", "tc", None),
        (
            {"lines": ("{tags}=2", "{caption}", "{tags}, {caption}=2")},
            "1girl, solo\n1girl, solo\nA girl.\n1girl, solo, A girl.\n1girl, solo, A girl.",
            "ttcbb",
            [[0, 11], [0, 11]],
        ),
        ({"prefix": "P, ", "suffix": " S"}, "P, 1girl, solo S\nP, A girl. S", "tc", None),
        ({"layout": "concat", "prefix": "{P} "}, "{{P}} 1girl, solo, A girl.", "b", [[6, 17]]),
        ({"lines": ("{caption} | {tags}",)}, "A girl. | 1girl, solo", "b", [[10, 21]]),
    ],
)
def test_options_by_example(options, caption, letters, spans):
    """Each layout and template writes exactly these lines, letters and spans."""
    record = merged({"caption": "A girl.", "tags": "1girl, solo"}, **options)
    expected = {"caption": caption, TAG_SPANS: spans, MARK: letters}
    assert record == {name: value for name, value in expected.items() if value is not None}


def test_spans_count_code_points_of_the_written_line():
    """Spans count an astral character as one and a doubled brace as two."""
    record = merged({"caption": "😀{", "tags": "😀}, ^_^"}, layout="concat-caption-first")
    assert record["caption"] == "😀{{, 😀}}, ^_^"
    assert record[TAG_SPANS] == [[5, 13]]
    assert record["caption"][5:13] == "😀}}, ^_^"


@pytest.mark.parametrize(
    ("how", "lines"),
    [
        ("each", ["A girl.", "She smiles.", "Outside."]),
        ("join", ["A girl. She smiles. Outside."]),
        ("first", ["A girl."]),
    ],
)
def test_caption_lines(how, lines):
    """A multi-line caption is several alternatives, one joined line, or its first line."""
    record = merged({"caption": " A girl. \n\n\tShe smiles.\r\nOutside.\r"}, caption_lines=how)
    assert record["caption"].split("\n") == lines
    assert record[MARK] == "c" * len(lines)


@pytest.mark.parametrize("line_break", ["\n", "\r\n", "\r", "\n\n", "\r\r\n", " \n\t\r\n "])
def test_line_breaks_split_captions(line_break):
    """Every kind of line break splits a caption, and blank lines are not alternatives."""
    assert merged({"caption": f"a{line_break}b"})["caption"] == "a\nb"


@pytest.mark.parametrize(
    "char", ["\u2028", "\u2029", "\x0c", "\x0b", "\x85", "\x1c", "\x1d", "\x1e"]
)
def test_other_separators_do_not_split(char):
    """A separator at which sd-scripts breaks no line does not split a caption and stays in it."""
    assert merged({"caption": f"a{char}b"})["caption"] == f"a{char}b"


def test_text_stays_as_it_is():
    """Inner spaces, punctuation, backslashes, pipes, quotes and emoticons are not touched."""
    text = "a  b ,, c\t\\(d\\) 100% | ^_^ “q” <|>_<|> {x}"
    assert merged({"tags": text, "caption": f" {text} x"})[
        "caption"
    ] == f"{text}\n{text} x".replace("{x}", "{{x}}")


def test_lines_share_their_templates_probability():
    """Lines of a template share its part equally; repeats are adjacent, in the smallest ratio."""
    record = merged({"tags": "t", "caption": "c1\nc2\nc3"})
    assert record["caption"] == "t\nt\nt\nc1\nc2\nc3"
    assert record[MARK] == "tttccc"


@pytest.mark.parametrize(
    ("caption", "lines", "letters"),
    [
        ("t", ["t"], "t"),
        ("t\nc", ["t", "t", "t", "c"], "tttc"),
        ("c\nt", ["t", "t", "t", "c"], "tttc"),
        ("c\nc\nd", ["t", "t", "t", "c", "c", "d"], "tttccc"),
        ("c\n c \nc", ["t", "c"], "tc"),
    ],
)
def test_equal_lines_are_one_alternative(caption, lines, letters):
    """Equal finished lines become one, with the first one's position and letter and all shares."""
    record = merged({"tags": "t", "caption": caption})
    assert record["caption"].split("\n") == lines
    assert record[MARK] == letters


def test_equal_lines_of_two_templates_keep_the_first_letter():
    """If a template without its caption equals another, the first one's letter and place win."""
    record = merged({"tags": "t"}, lines=("{tags}, {caption}=3", "{caption}", "{tags}"))
    assert record == {"caption": "t", MARK: "t"}
    record = merged(
        {"tags": "t", "caption": "t, t"}, lines=("{tags}, {caption}", "{caption}=2", "{tags}")
    )
    assert record["caption"] == "t, t, t\nt, t\nt, t\nt"
    record = merged({"tags": "a, b", "caption": "b"}, lines=("{tags}", "a, {caption}", "{caption}"))
    assert record == {"caption": "a, b\na, b\nb", MARK: "ttc"}


def test_alternatives_are_distinct_and_sum_to_one():
    """The alternatives of a record have the exact shares, before any repeating or rounding."""
    merger = Merger(MergeOptions(lines=("{tags}=5", "{caption}", "{tags}, {caption}=4")))
    found = merger.alternatives({"tags": "{t}", "caption": "c\nd"})
    assert [(a.line, a.text, a.style, a.tag_span, a.share) for a in found] == [
        ("{{t}}", "{t}", "t", None, Fraction(1, 2)),
        ("c", "c", "c", None, Fraction(1, 20)),
        ("d", "d", "c", None, Fraction(1, 20)),
        ("{{t}}, c", "{t}, c", "b", (0, 5), Fraction(1, 5)),
        ("{{t}}, d", "{t}, d", "b", (0, 5), Fraction(1, 5)),
    ]


def test_over_64_lines_are_rounded_and_counted():
    """A ratio that needs more than 64 lines is rounded to 64, in order, and is counted."""
    merger = Merger(MergeOptions(lines=("{tags}=999", "{caption}")))
    record = {"tags": "t", "caption": "c"}
    merger.merge(record)
    assert record["caption"] == "\n".join(["t"] * 63 + ["c"])
    assert record[MARK] == "t" * 63 + "c"
    assert merger.tally.capped == 1
    merger.merge({"tags": "t"})
    assert merger.tally.capped == 1


@pytest.mark.parametrize("number", [1, 2, 31, 32, 33, 40, 62, 63, 64, 65, 80, 1000])
def test_tags_keep_their_half_beside_any_caption(number):
    """Tags beside a caption of many lines stay half of what is drawn, and its lines are even."""
    merger = Merger(MergeOptions())
    captions = [f"c{i}" for i in range(number)]
    record = {"tags": "t", "caption": "\n".join(captions)}
    merger.merge(record)
    lines = record["caption"].split("\n")
    found = outcomes(record["caption"])
    assert found["t"] == Fraction(1, 2)
    assert len(lines) == 2 * min(number, 32)
    assert lines == sorted(lines, key=["t", *captions].index)
    kept = [i for i in range(number) if f"c{i}" in found]
    assert kept[0] == 0
    gaps = {after - before for before, after in pairwise([*kept, number])}
    assert max(gaps) - min(gaps) <= 1
    assert record[MARK] == "t" * lines.count("t") + "c" * len(kept)
    assert merger.tally.capped == (number > 32)
    assert merger.tally.capped_left_out == max(0, number - 32)
    assert merger.tally.capped_template_ppm == 0
    worst = 0 if number <= 32 else max(Fraction(1, 64) - Fraction(1, 2 * number), 0)
    worst = max(worst, Fraction(1, 2 * number) if number > 32 else 0)
    assert merger.tally.capped_line_ppm == -(-worst * 1_000_000 // 1)


@pytest.mark.parametrize(
    ("lines", "number", "expected"),
    [
        # Templates of 5 : 1 : 4 are 30, 6 and 24 of 60 lines; ten captions share 6 and 24 of them.
        (("{tags}=5", "{caption}", "{tags}, {caption}=4"), 10, (30, 6, 24)),
        (("{tags}=2", "{caption}"), 22, (42, 21, 0)),
        (("{caption}",), 200, (0, 200, 0)),
        (("{tags}, {caption}", "{caption}"), 40, (0, 40, 40)),
        (("{tags}=33", "{caption}=31"), 2, (33, 31, 0)),
        (("{tags}=33", "{caption}=32"), 2, (32, 32, 0)),
        (("{tags}=999", "{caption}"), 5, (63, 1, 0)),
        (("{caption}=999", "{tags}"), 70, (1, 63, 0)),
    ],
)
def test_templates_keep_their_shares_before_lines_do(lines, number, expected):
    """Each template has its share of the lines, whatever the number of caption lines."""
    record = merged({"tags": "t", "caption": "\n".join(map(str, range(number)))}, lines=lines)
    mark = record[MARK]
    assert (mark.count("t"), mark.count("c"), mark.count("b")) == expected


def test_equal_lines_count_towards_each_of_their_templates():
    """Where weights are rounded, a line of two templates has the lines of both."""
    captions = ["t", *(f"c{i}" for i in range(62))]
    record = merged({"tags": "t", "caption": "\n".join(captions)})
    lines = record["caption"].split("\n")
    assert (len(lines), lines.count("t")) == (64, 33)
    same = ["c", "c", *(f"c{i}" for i in range(61))]
    lines = merged({"tags": "t", "caption": "\n".join(same)})["caption"].split("\n")
    assert (len(lines), lines.count("t"), lines.count("c")) == (64, 32, 2)


def test_a_caption_with_equal_lines_is_written_whole():
    """Repeats that take no more lines than the caption has are exact: nothing is rounded."""
    merger = Merger(MergeOptions(lines=("{caption}",)))
    record = {"caption": "\n".join(["c", *map(str, range(98)), "c"])}
    merger.merge(record)
    assert record["caption"].split("\n") == ["c", "c", *map(str, range(98))]
    assert merger.tally.capped == 0


def test_field_weights_are_exact():
    """With --weights field each alternative is written once, with an exact, unlimited weight."""
    merger = Merger(MergeOptions(lines=("{tags}=999", "{caption}"), weights="field"))
    record = {"tags": "t", "caption": "c\nd", "z": 1}
    merger.merge(record)
    assert list(record.items()) == [
        ("caption", "t\nc\nd"),
        ("z", 1),
        (WEIGHTS, [1998, 1, 1]),
        (MARK, "tcc"),
    ]
    assert merger.tally.capped == 0
    assert merger.tally.lines == 3
    assert merged({"tags": "t"}, weights="field") == {"caption": "t", WEIGHTS: [1], MARK: "t"}
    assert merged({}, weights="field") == {"caption": "", MARK: ""}


@pytest.mark.parametrize(
    ("lines", "record", "expected", "letters"),
    [
        (("photo of {caption}, {tags}!",), {"tags": "t"}, "photo of t!", "t"),
        (("photo of {caption}, {tags}!",), {"caption": "c"}, "photo of c!", "c"),
        (("{tags}=3", "{caption}", "{tags}; {caption}=4"), {"tags": "t"}, "t", "t"),
        (
            ("<{tags}>=3", "{caption}", "{tags}; {caption}"),
            {"tags": "t"},
            "<t>\n<t>\n<t>\nt",
            "tttt",
        ),
        (("<{tags}>", "{caption}=7"), {"tags": "t"}, "<t>", "t"),
        (("a {caption} b",), {"tags": "t"}, "t", "t"),
        (("a {tags} b",), {"caption": "c"}, "c", "c"),
        (("a {caption} b",), {}, "", ""),
    ],
)
def test_a_missing_field_vanishes(lines, record, expected, letters):
    """A missing field goes with the text between; a template without fields yields its weight."""
    assert merged(record, lines=lines) == {"caption": expected, MARK: letters}


@pytest.mark.parametrize(
    "missing",
    [{}, {"caption": None}, {"caption": ""}, {"caption": " \n\r\t "}, {"caption": "\u3000"}],
)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layout": "concat"},
        {"layout": "inline"},
        {"lines": ("{caption}",)},
        {"weights": "field"},
    ],
)
def test_tags_are_never_lost(missing, options):
    """A record without a caption trains its tags, whatever the options."""
    record = merged({"tags": "t", **missing}, **options)
    assert outcomes(record["caption"]) == {"t": 1}
    assert record[MARK] == "t"


@pytest.mark.parametrize("missing", [{}, {"tags": None}, {"tags": ""}, {"tags": " \n"}])
def test_a_caption_alone_is_kept(missing):
    """A record without tags trains its caption, without a dangling comma."""
    assert merged({"caption": "c", **missing}, layout="concat") == {"caption": "c", MARK: "c"}


@pytest.mark.parametrize(
    "record",
    [{}, {"tags": None, "caption": None}, {"tags": " ", "caption": "\n\n"}, {"caption": ""}],
)
@pytest.mark.parametrize(
    "options", [{}, {"prefix": "P"}, {"layout": "inline"}, {"layout": "concat", "suffix": "S"}]
)
def test_a_record_without_text_has_an_empty_caption(record, options):
    """With neither field there is no line, not even a prefix, and the record is counted."""
    merger = Merger(MergeOptions(**options))
    record = dict(record)
    merger.merge(record)
    assert record == {"caption": "", MARK: ""}
    assert (merger.tally.kinds["empty"], merger.tally.lines) == (1, 0)


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"tags": "t", "caption": "c"}, "{t|c}"),
        ({"tags": "t"}, "t"),
        ({"tags": "t", "caption": "t"}, "t"),
        ({"tags": "t", "caption": "c\nd"}, "{t|t|c|d}"),
        ({"tags": "a|b", "caption": "c"}, "a|b\nc"),
        ({"tags": "t", "caption": "<|>_<|>"}, "t\n<|>_<|>"),
        ({"tags": "t {x}", "caption": "c"}, "{t {{x}}|c}"),
        ({"tags": "{x} t", "caption": "c"}, "{{x}} t\nc"),
        ({"tags": "t", "caption": "c :}"}, "{t|c :}}}"),
        ({"tags": "{x}", "caption": "{x}"}, "{{x}}"),
    ],
)
def test_inline(record, expected):
    """An in-line wildcard is written only where it reads as meant; other records are counted."""
    merger = Merger(MergeOptions(layout="inline"))
    record = dict(record)
    merger.merge(record)
    found = record["caption"]
    assert outcomes(found) == outcomes(expected)
    assert merger.tally.inline_as_lines == ("\n" in found)
    if not found.startswith("{t|c :"):
        assert found == expected


def test_inline_with_intended_wildcards_is_lines():
    """With --caption-wildcards, a caption with a brace cannot go inside a wildcard."""
    merger = Merger(MergeOptions(layout="inline", caption_wildcards=True))
    record = {"tags": "t", "caption": "a {b|c}"}
    merger.merge(record)
    assert record == {"caption": "t\na {b|c}", MARK: "tc"}
    assert merger.tally.inline_as_lines == 1
    record = {"tags": "t {x}", "caption": "c"}
    merger.merge(record)
    assert record == {"caption": "{t {{x}}|c}", MARK: "tc"}


def test_inline_of_thousands_of_caption_lines():
    """A caption with more lines than the grammar lists is written all the same."""
    captions = ["{t}", *(f"c{i}" for i in range(5000))]
    record = merged({"caption": "\n".join(captions)}, layout="inline")
    assert len(record[MARK]) == 5001


def test_intended_wildcards_by_example():
    """The caption's braces stay single; those of tags, prefix and template are still doubled."""
    record = merged(
        {"tags": ":}", "caption": "a {b|c}"},
        lines=("{tags} {{caption}}",),
        caption_wildcards=True,
        prefix="{p}",
    )
    assert record["caption"] == "{{p}}:}} {{a {b|c} }}"
    assert outcomes(record["caption"]) == {
        "{p}:} {a b }": Fraction(1, 2),
        "{p}:} {a c }": Fraction(1, 2),
    }


def test_underscores_become_spaces_in_tags_only():
    """--underscores space leaves captions, emoticons and template text alone."""
    record = merged(
        {"tags": "long_hair, ^_^", "caption": "a_b_c"}, underscores="space", prefix="p_p "
    )
    assert record["caption"] == "p_p long hair, ^_^\np_p a_b_c"
    assert spaced("long_hair, ^_^") == "long hair, ^_^"


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"train_resolution": [1, 2]}, [1, 2]),
        ({"train_resolution": [1, 2], "image_size": [3, 4]}, [3, 4]),
        ({"train_resolution": [1, 2], "image_size": None}, None),
        ({"train_resolution": None}, "absent"),
        ({"train_resolution": "1x2"}, "absent"),
        ({}, "absent"),
    ],
)
def test_image_size(record, expected):
    """A missing image_size is set to train_resolution, and an existing one is never changed."""
    merger = Merger(MergeOptions())
    found = {"tags": "t", "caption": "c", **record}
    merger.merge(found)
    assert found.get("image_size", "absent") == expected
    assert merger.tally.image_size_added == ("image_size" not in record and expected != "absent")
    assert "image_size" not in merged({"train_resolution": [1, 2]}, image_size=False)


@pytest.mark.parametrize(
    "names",
    [
        ["z", "caption", "a", "tags", "train_resolution", "", "b"],
        ["tags", "caption"],
        ["tags", "x"],
        ["x"],
    ],
)
@pytest.mark.parametrize("text", ["x", "{x|", " "])
def test_the_order_of_fields(names, text):
    """A caption keeps its place or comes after the rest; added fields come last, in fixed order."""
    record = {name: [64, 64] if name == "train_resolution" else text for name in names}
    found = merged(record, lines=("{tags}{caption}",), weights="field")
    kept = [name for name in names if name != "tags"]
    caption = [] if "caption" in names else ["caption"]
    size = ["image_size"] if "train_resolution" in names else []
    lines = bool(text.strip()) and bool({"tags", "caption"} & set(names))
    both = bool(text.strip()) and {"tags", "caption"} <= set(names)
    assert list(found) == kept + caption + size + [WEIGHTS] * lines + [TAG_SPANS] * both + [MARK]


@given(
    st.dictionaries(
        st.text(st.characters(), max_size=4).filter(
            lambda name: name not in {"caption", "tags", "train_resolution"}
        ),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.text(max_size=2), inner, max_size=3)
            ),
            max_leaves=6,
        ),
        max_size=4,
    ),
    FIELD,
    FIELD,
)
@settings(max_examples=100, deadline=None)
def test_nothing_else_changes(others, tags, caption):
    """Every other field keeps its value and its place."""
    found = merged({**others, "tags": tags, "caption": caption}, layout="concat")
    assert repr([(name, found[name]) for name in others]) == repr(list(others.items()))
    assert found.keys() - others.keys() <= {"caption", TAG_SPANS, MARK}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([], "the record is a list, expected an object."),
        ("text", "the record is a string, expected an object."),
        (None, "the record is null, expected an object."),
        (True, "the record is true or false, expected an object."),
        (1.5, "the record is a number, expected an object."),
        ({"caption": ["a"]}, '"caption" is a list, expected a string.'),
        ({"tags": {"a": 1}}, '"tags" is an object, expected a string.'),
        ({"caption": "c", "tags": 1}, '"tags" is a number, expected a string.'),
        ({"caption": False, "tags": "t"}, '"caption" is true or false, expected a string.'),
        (
            {"caption": "c", TAG_SPANS: []},
            f'found a field "{TAG_SPANS}", which the output needs for itself.',
        ),
        (
            {"caption": "c", WEIGHTS: [1]},
            f'found a field "{WEIGHTS}", which the output needs for itself.',
        ),
        (
            {"caption": "c", "image_path": 1},
            'found a field "image_path", which the output needs for itself.',
        ),
    ],
)
def test_records_that_cannot_be_merged(record, message):
    """The error says why, nothing is changed and nothing is counted as rewritten."""
    merger = Merger(MergeOptions(), ("image_path",))
    before = copy.deepcopy(record)
    with pytest.raises(UnmergeableError) as error:
        merger.merge(record)
    assert str(error.value) == message
    assert record == before
    assert merger.tally.rewritten == 0


@pytest.mark.parametrize(
    "record",
    [
        {MARK: "t", "caption": "t"},
        {MARK: ""},
        {MARK: None},
        {MARK: [], "tags": "t", "caption": "c"},
    ],
)
def test_a_marked_record_is_refused(record):
    """A record that has the mark is never rewritten again."""
    with pytest.raises(RewrittenError):
        Merger(MergeOptions()).merge(record)


def test_a_marked_record_passes_when_allowed():
    """--allow-rewritten passes marked records through, counts them and rewrites the others."""
    merger = Merger(MergeOptions(allow_rewritten=True))
    done = merged(
        {"tags": "t", "caption": "{c}", "train_resolution": [1, 2]},
        layout="concat",
        image_size=False,
    )
    records = [copy.deepcopy(done), {"tags": "t", "caption": "{c}"}]
    assert merger.merge_all(records) == []
    assert records == [done, {"caption": "t\n{{c}}", MARK: "tc"}]
    assert (merger.tally.passed, merger.tally.rewritten, merger.tally.records) == (1, 1, 2)


def test_a_mark_that_is_no_string_does_not_pass():
    """With --allow-rewritten, a mark that no rewrite writes is refused."""
    with pytest.raises(UnmergeableError, match="expected the string"):
        Merger(MergeOptions(allow_rewritten=True)).merge({MARK: ["t"], "caption": "t"})


def test_a_marked_record_must_not_have_the_formats_own_field():
    """A marked record with an image_path, which would overwrite its key in JSONL, is refused."""
    with pytest.raises(UnmergeableError, match="image_path"):
        Merger(MergeOptions(allow_rewritten=True), ("image_path",)).merge(
            {"image_path": "x", MARK: "c", "caption": "y"}
        )


def test_counts():
    """Each record is counted once by its kind, besides lines, special tokens and paragraphs."""
    merger = Merger(MergeOptions())
    failures = merger.merge_all(
        [
            {"tags": "t", "caption": "c"},
            {"tags": "t <|EndOfText|>", "caption": "a\n\nb"},
            {"tags": "t"},
            {"caption": "a\nb <|startoftext|>", "train_resolution": [64, 64]},
            {"caption": "\n\n"},
            {"caption": ["c"]},
            {"caption": "\n\na\n\n", "tags": "t <|endoftext |>"},
        ]
    )
    assert [(number, str(error)) for number, error in failures] == [
        (5, '"caption" is a list, expected a string.')
    ]
    found = merger.tally.as_dict()
    expected = {
        "records": 7,
        "rewritten": 6,
        "both": 3,
        "tags_only": 1,
        "caption_only": 1,
        "empty": 1,
        "special_tokens": 2,
        "paragraphs": 1,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["lines"] == 2 + 4 + 1 + 2 + 0 + 2
    assert found["image_size_added"] == 1


def test_counts_add_up():
    """The counts of two workers add up to those of one that did both shares."""
    records = [{"tags": "t", "caption": "c\nd"}, {"tags": "t"}, {}, {"tags": "a|{", "caption": "c"}]
    whole, first, second = (Merger(MergeOptions(layout="inline")) for _ in range(3))
    whole.merge_all(copy.deepcopy(records))
    first.merge_all(copy.deepcopy(records[:2]))
    second.merge_all(copy.deepcopy(records[2:]))
    add_counts(first.tally, second.tally)
    assert first.tally == whole.tally
    assert json.loads(json.dumps(first.tally.as_dict()))["records"] == 4
