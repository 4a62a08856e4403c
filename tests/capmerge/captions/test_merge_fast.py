import copy
import json
from itertools import islice
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.captions.merge import Merger
from capmerge.captions.merge_fast import FastMerge
from capmerge.captions.templates import MergeOptions
from synthetic import Kind, records_of

PLAIN_TEXT = st.sampled_from(
    [
        "t",
        "c",
        "1girl, long_hair, ^_^",
        "A girl.",
        "100% %(tags)s %s",
        "\u2985a\u2986",
        "a\u2028b",
        "a\x0cb",
        "  c ",
        "日本 😀",
    ]
)
HOSTILE_TEXT = st.text(st.sampled_from("{}|a, \n\r\u2985\u2986_%<>"), max_size=8) | st.sampled_from(
    ["<|endoftext|>", "a\n\nb", "", " "]
)
TEXT = PLAIN_TEXT | HOSTILE_TEXT
FIELDS = {
    "caption": TEXT | st.none() | st.just(["c"]),
    "tags": TEXT | st.none() | st.just(1),
    "train_resolution": st.sampled_from([[64, 128], None, "64", [], [512.0, 5], [0, 1]]),
    "image_size": st.sampled_from([[1, 2], [64, 128], None, []]),
    "other": st.sampled_from([1.0, {"tags": "x"}, "A text.", ["a", "b"]]),
    "": st.sampled_from([0, "a, b"]),
    "text": st.just("like"),
}
OURS = {
    "capmerge": st.sampled_from(["t", None]),
    "capmerge_tags": st.just([]),
    "capmerge_weights": st.just([1]),
    "image_path": st.just("p"),
}


def record_of(texts, *, all_of_it=False):
    """Records with `texts` and the fields in any order."""
    fields = {**FIELDS, "caption": texts, "tags": texts}
    names = st.permutations(list(fields))
    kept = (
        names
        if all_of_it
        else st.tuples(names, st.integers(0, len(fields))).map(lambda drawn: drawn[0][: drawn[1]])
    )
    return kept.flatmap(lambda names: st.fixed_dictionaries({name: fields[name] for name in names}))


PLAIN_RECORD = record_of(PLAIN_TEXT, all_of_it=True)
ANY_RECORD = record_of(TEXT | st.none() | st.just(["c"]))
OUR_RECORD = st.tuples(PLAIN_RECORD, st.sampled_from(list(OURS))).flatmap(
    lambda drawn: OURS[drawn[1]].map(lambda value: {**drawn[0], drawn[1]: value})
)
RECORDS = st.tuples(
    st.lists(PLAIN_RECORD, min_size=1, max_size=2),
    st.lists(ANY_RECORD | OUR_RECORD | st.sampled_from([None, [], "text", 1]), max_size=3),
).flatmap(lambda drawn: st.permutations(drawn[0] + drawn[1]))

WEIGHT = st.sampled_from([1, 1, 2, 3, 5, 12])
TEMPLATES = [
    "{tags}",
    "{caption}",
    "{tags}, {caption}",
    "{caption}{tags}",
    "{tags}{caption}",
    " %s {caption} % {tags} %(tags)s ",
    "a {tags}",
]
PLAIN_LINES = st.permutations(TEMPLATES).flatmap(
    lambda names: st.lists(WEIGHT, min_size=1, max_size=4).map(
        lambda weights: _lines(names, weights)
    )
)
OTHER_LINES = st.lists(
    st.sampled_from([*TEMPLATES, "{tags}|", "{{tags}", "{text} {tags}", "{caption}, {text}"]),
    min_size=1,
    max_size=3,
).map(tuple)
PLAIN_AFFIX = st.sampled_from(["", "", "p ", " %s", "\u2985", " \u3000"])
LAYOUT = st.sampled_from([None, "lines", "concat", "concat-caption-first", "inline"]).map(
    lambda layout: (layout, ())
)


def _lines(templates, weights):
    return tuple(
        f"{template}={weight}" for template, weight in zip(templates, weights, strict=False)
    )


@st.composite
def option_sets(draw):
    """Any options that can be carried out, most of them with a fast path."""
    layout, lines = draw(
        LAYOUT
        | PLAIN_LINES.map(lambda lines: (None, lines))
        | OTHER_LINES.map(lambda lines: (None, lines))
    )
    affix = PLAIN_AFFIX | st.sampled_from(["{", "a|"])
    fit_tokens, fit_by = draw(
        st.sampled_from([(None, "drop"), (None, "drop"), (2, "drop"), (9, "drop"), (24, "trim")])
    )
    return MergeOptions(
        layout=layout,
        lines=lines,
        weights="repeat" if layout == "inline" else draw(st.sampled_from(["repeat", "field"])),
        caption_lines=draw(st.sampled_from(["each", "join", "first"])),
        underscores=draw(st.sampled_from(["keep", "space"])),
        caption_wildcards=draw(st.booleans()),
        prefix=draw(affix),
        suffix=draw(affix),
        image_size=draw(st.sampled_from([True, False, None])),
        caption_field=draw(st.sampled_from(["caption", "caption", "other"])),
        tags_field=draw(st.sampled_from(["tags", "tags", ""])),
        lists=draw(st.booleans()),
        tags_prefix=draw(affix),
        drop_tags=draw(
            st.sampled_from([(), (), ("T", "LONG hair"), ("c", "a\u2028b", "\u2985a\u2986")])
        ),
        replace_tags=draw(st.sampled_from([(), (), ("1girl\t1boy, a",), ("A\t{b}|",)])),
        allow_rewritten=draw(st.booleans()),
        fit_tokens=fit_tokens,
        fit_by=fit_by,
    )


FAST_OPTIONS = [
    {},
    {"layout": "concat"},
    {"layout": "concat-caption-first", "underscores": "space"},
    {"layout": "inline"},
    {"lines": ("{tags}=5", "{caption}", "{tags}, {caption}=4")},
    {
        "lines": ("{tags}=5", "{caption}", "{tags}, {caption}=4"),
        "weights": "field",
        "underscores": "space",
    },
    {
        "lines": ("{caption}{tags} %s", "%% {tags}{caption}", "{tags} {caption}=3"),
        "prefix": " p",
        "suffix": "\u2985 ",
    },
    {"lines": ("{tags}=999", "{caption}"), "weights": "field"},
    {"lines": ("{tags}=999", "{caption}")},
    {
        "prefix": "p ",
        "suffix": " 100%",
        "caption_lines": "join",
        "caption_wildcards": True,
        "image_size": False,
    },
    {"drop_tags": ("solo", "a "), "replace_tags": ("Long hair\tshort_hair, ^_^",)},
    {"drop_tags": ("c",), "layout": "concat", "underscores": "space", "tags_prefix": "tags: "},
    {"drop_tags": ("a",), "replace_tags": ("t\tlong_hair",), "fit_tokens": 8},
    {"fit_tokens": 8},
    {"lines": ("{tags}=5", "{caption}", "{tags}, {caption}=4"), "fit_tokens": 20, "fit_by": "trim"},
]


def merged_all(merger, found):
    """Return the merged records as bytes, the failures with reasons, and the counts."""
    found = copy.deepcopy(found)
    failures = [(number, type(error), str(error)) for number, error in merger.merge_all(found)]
    return json.dumps(found), failures, merger.tally.as_dict()


@given(option_sets(), RECORDS, st.sampled_from([(), ("image_path",)]))
@settings(max_examples=300, deadline=None)
def test_the_fast_way_is_the_general_rule(options, found, reserved):
    """The fast path and the general rule alone give the same bytes, failures and counts."""
    general = Merger(options, reserved)
    general._fast = None
    assert merged_all(Merger(options, reserved), found) == merged_all(general, found)


@pytest.mark.parametrize("options", FAST_OPTIONS)
@given(found=RECORDS)
@settings(max_examples=40, deadline=None)
def test_the_fast_way_is_the_general_rule_for(options, found):
    """They agree too for the most important options, on hostile records among plain ones."""
    options = MergeOptions(**options)
    general = Merger(options)
    general._fast = None
    assert merged_all(Merger(options), found) == merged_all(general, found)


@pytest.mark.parametrize("options", FAST_OPTIONS)
def test_plain_records_take_the_fast_way(options, monkeypatch):
    """No plain record is left to the general rule, which is right but many times slower."""
    found = [
        {"caption": "A girl.", "tags": "long_hair, ^_^", "train_resolution": [64, 64]},
        {"tags": "b, a", "image_size": None, "caption": "50% \u2985", "x": {"y": [1.5]}},
    ]
    merger = Merger(MergeOptions(**options))
    general = Merger(MergeOptions(**options))
    general._fast = None
    expected = merged_all(general, found)
    monkeypatch.setattr(merger, "merge", None)
    assert merged_all(merger, found) == expected


@pytest.mark.parametrize(
    ("record", "options"),
    [
        ({"tags": "t", "caption": "c", "capmerge": ""}, {}),
        ({"tags": "t", "caption": "c", "capmerge_tags": []}, {}),
        ({"tags": "t", "caption": "c", "capmerge_weights": []}, {}),
        ({"tags": "t", "caption": ["c"]}, {}),
        ({"tags": 1, "caption": "c"}, {}),
        ([], {}),
        ({"tags": "t", "caption": "{a|b}"}, {"caption_wildcards": True}),
        ({"tags": "t", "caption": "{a}"}, {"layout": "inline"}),
        ({"tags": "t", "caption": "a {b} \u2985"}, {"prefix": "\u2985"}),
        ({"tags": "t\u2985", "caption": "{b"}, {"lines": ("{tags}{caption}",)}),
    ],
)
def test_records_that_need_care_are_left_alone(record, options):
    """The number of such a record is returned, and the record is not touched."""
    fast = Merger(MergeOptions(**options))._fast
    before = copy.deepcopy(record)
    assert fast.merge_all([{"tags": "t", "caption": "c"}, record]) == [1]
    assert record == before


SYNTHETIC_OPTIONS = [
    {},
    {"lines": ("{tags}=5", "{caption}", "{tags}, {caption}=4")},
    {"weights": "field", "prefix": "p, ", "suffix": "."},
    {"caption_lines": "join", "underscores": "space"},
    {"caption_lines": "first", "layout": "concat-caption-first"},
    {"layout": "inline"},
]


@pytest.mark.parametrize("options", SYNTHETIC_OPTIONS)
@pytest.mark.parametrize("kind", get_args(Kind))
def test_what_people_have_takes_the_fast_way(kind, options):
    """It is merged as by the general rule, and no record of it goes through that.

    Only in-line wildcards of braces do: one record in a hundred, or most of the hostile ones.
    """
    found = [record for _, record in islice(records_of(kind), 400)]
    merger, general = Merger(MergeOptions(**options)), Merger(MergeOptions(**options))
    general._fast = None
    rest = len(merger._merge_fast(copy.deepcopy(found))[0])
    assert rest <= len(found) * (0.01 if kind == "mixed" else 0.6) * ("layout" in options)
    assert rest == 0 or options == {"layout": "inline"}
    merger = Merger(MergeOptions(**options))
    assert merged_all(merger, found) == merged_all(general, found)


@pytest.mark.parametrize(
    ("text", "serves"), [("p %s \u2985", True), ("{", False), ("a}", False), ("|", False)]
)
def test_literal_text_that_needs_care_has_no_fast_way(text, serves):
    """Options with braces or pipes in their own text are left to the general rule."""
    assert FastMerge.serves(MergeOptions(prefix=text)) == serves
    assert FastMerge.serves(MergeOptions(suffix=text)) == serves
    assert FastMerge.serves(MergeOptions(tags_prefix=text)) == serves
    assert FastMerge.serves(MergeOptions(lines=(f"{text} {{tags}}",))) == serves
