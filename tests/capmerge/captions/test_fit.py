import copy
import json
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.captions.alternatives import written_alternatives
from capmerge.captions.fields import MARK, TAG_SPANS, WEIGHTS
from capmerge.captions.longest_texts import longest_texts
from capmerge.captions.merge import Merger
from capmerge.captions.templates import MergeOptions
from capmerge.captions.wildcard import outcomes
from capmerge.errors import UsageError
from capmerge.tokens.counter import TokenCounter
from capmerge.tokens.load import load_clip

SHORT_TAGS = "1girl, solo"  # 4 tokens
# Sentences of 7, 6 and 5 tokens, one with an abbreviation.
LONG = "A girl stands in the rain. She meets Mr. Smith there. The street is empty!"
CONCAT = {"layout": "concat"}


def merged(record, **options):
    """Return a record as it is written, and the counts."""
    after = copy.deepcopy(record)
    merger = Merger(MergeOptions(**options))
    merger.merge(after)
    return after, merger.tally


def count(text, family="sd1"):
    """Return the token length of a text."""
    return len(load_clip(family).encode(text))


def fit(record, tokens, by, **options):
    """Return the caption, letters and three counts of a fitted record."""
    after, tally = merged(record, fit_tokens=tokens, fit_by=by, **options)
    return after["caption"], after[MARK], (tally.fit_left_out, tally.fit_cut, tally.fit_too_long)


def run(*arguments):
    """Run the command and return it finished."""
    command = [
        sys.executable,
        "-c",
        "from capmerge.cli.app import main; main()",
        *map(str, arguments),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_drop_leaves_out_what_is_too_long():
    """The long caption is left out, and the tags get its share."""
    assert fit({"tags": SHORT_TAGS, "caption": LONG}, 10, "drop") == (SHORT_TAGS, "t", (1, 0, 0))
    assert fit({"tags": SHORT_TAGS, "caption": LONG}, count(LONG), "drop") == (
        f"{SHORT_TAGS}\n{LONG}",
        "tc",
        (0, 0, 0),
    )


def test_drop_keeps_the_shortest_when_nothing_fits():
    """A record always keeps some text: the shortest alternatives stay, and are counted."""
    assert fit({"tags": SHORT_TAGS, "caption": LONG}, 3, "drop") == (SHORT_TAGS, "t", (1, 0, 1))
    assert fit({"tags": "solo, 1girl", "caption": SHORT_TAGS}, 3, "drop") == (
        f"solo, 1girl\n{SHORT_TAGS}",
        "tc",
        (0, 0, 2),
    )
    assert fit({"caption": LONG}, 3, "drop") == (LONG, "c", (0, 0, 1))
    assert fit({}, 3, "drop") == ("", "", (0, 0, 0))


def test_drop_deals_the_share_inside_the_template_first():
    """If one of three caption lines is too long, the others share the half of the caption."""
    after, _ = merged(
        {"tags": SHORT_TAGS, "caption": f"One.\nTwo.\n{LONG}"},
        fit_tokens=9,
        fit_by="drop",
        weights="field",
    )
    assert (after["caption"], after[WEIGHTS]) == (f"{SHORT_TAGS}\nOne.\nTwo.", [2, 1, 1])
    after, _ = merged(
        {"tags": SHORT_TAGS, "caption": LONG},
        fit_tokens=9,
        fit_by="drop",
        lines=("{tags}=3", "{caption}=4", "x {tags}=1"),
    )
    assert after["caption"].split("\n") == [SHORT_TAGS] * 3 + [f"x {SHORT_TAGS}"]


def test_trim_cuts_at_whole_tags_and_sentences():
    """Tags end after a whole tag and captions after a whole sentence; "Mr." ends none."""
    record = {"tags": "long hair, blue eyes, solo, 1girl", "caption": LONG}
    assert fit(record, 8, "trim") == (
        "long hair, blue eyes, solo\nA girl stands in the rain.",
        "tc",
        (0, 2, 0),
    )
    assert (
        fit({"caption": LONG}, count(LONG) - 1, "trim")[0]
        == "A girl stands in the rain. She meets Mr. Smith there."
    )
    assert (
        fit({"caption": "雨の中の少女。傘を持っている。通りは空だ。"}, 16, "trim")[0]
        == "雨の中の少女。"
    )


def test_trim_cuts_a_first_unit_that_is_too_long_at_a_word():
    """A first sentence is cut at a word, a first word inside it, and one character always stays."""
    assert fit({"caption": LONG}, 4, "trim") == ("A girl stands in", "c", (0, 1, 0))
    assert fit({"tags": "very long tag name of words, solo"}, 3, "trim") == (
        "very long tag",
        "t",
        (0, 1, 0),
    )
    caption, letters, counts = fit(
        {"caption": "pneumonoultramicroscopicsilicovolcanoconiosis now"}, 3, "trim"
    )
    assert caption
    assert "pneumonoultramicroscopicsilicovolcanoconiosis".startswith(caption)
    assert (count(caption), letters, counts) == (3, "c", (0, 1, 0))
    assert fit({"caption": "\U0001f9d1\u200d\U0001f680 in space"}, 1, "trim")[0] == "\U0001f9d1"


def test_a_line_of_both_loses_its_last_field_first():
    """A `b` line keeps whole sentences after the tags; if none fits, it becomes a `t` line."""
    record = {"tags": SHORT_TAGS, "caption": LONG}
    after, _ = merged(record, fit_tokens=12, fit_by="trim", **CONCAT)
    assert (after["caption"], after[MARK]) == (f"{SHORT_TAGS}, A girl stands in the rain.", "b")
    assert after[TAG_SPANS] == [[0, len(SHORT_TAGS)]]
    after, _ = merged(record, fit_tokens=11, fit_by="trim", **CONCAT)
    assert (after["caption"], after[MARK]) == (SHORT_TAGS, "t")
    assert TAG_SPANS not in after
    after, _ = merged(record, fit_tokens=21, fit_by="trim", layout="concat-caption-first")
    assert (after["caption"], after[MARK], after[TAG_SPANS]) == (
        f"{LONG}, 1girl",
        "b",
        [[len(LONG) + 2, len(LONG) + 7]],
    )


def test_fixed_text_stays_and_must_leave_room():
    """Prefix and suffix are never cut; if they alone fill the limit, the run does not start."""
    assert (
        fit({"caption": LONG}, 9, "trim", prefix="photo, ")[0]
        == "photo, A girl stands in the rain."
    )
    with pytest.raises(UsageError, match="'photo of ' has 2 tokens by itself"):
        Merger(MergeOptions(fit_tokens=2, fit_by="trim", prefix="photo of "))


def test_equal_cuts_become_one_alternative():
    """Two templates that are cut to the same line are one line with both shares."""
    after, _ = merged(
        {"tags": SHORT_TAGS, "caption": LONG},
        fit_tokens=5,
        fit_by="trim",
        lines=("{tags}", "{tags}, {caption}", "{caption}"),
    )
    assert after["caption"].split("\n") == [SHORT_TAGS, SHORT_TAGS, "A girl stands in the"]
    assert after[MARK] == "ttc"


def test_the_family_counts():
    """SD2 splits every "!", so the same text is longer there."""
    assert fit({"tags": "x", "caption": "wow!!!!!!"}, 4, "drop")[0] == "x\nwow!!!!!!"
    assert fit({"tags": "x", "caption": "wow!!!!!!"}, 4, "drop", fit_family="sd2")[0] == "x"


def test_an_intended_wildcard_counts_at_its_longest_and_is_not_cut_inside():
    """With --caption-wildcards the longest text decides, and no cut falls inside {a|b}."""
    caption = "A {cat. Or|very big and very hungry dog} sits. It sleeps."
    (longest,) = longest_texts([caption], TokenCounter(load_clip("sd1")))
    assert longest == ("A very big and very hungry dog sits. It sleeps.", 12)
    assert (
        fit({"caption": caption}, 9, "trim", caption_wildcards=True)[0]
        == "A {cat. Or|very big and very hungry dog} sits."
    )
    assert (
        fit({"caption": caption}, 8, "trim", caption_wildcards=True)[0]
        == "A {cat. Or|very big and very hungry dog}"
    )
    assert fit({"caption": caption}, 6, "trim", caption_wildcards=True)[0] == "A"
    assert fit({"caption": "{a b c|d e f} g"}, 1, "trim", caption_wildcards=True) == (
        "{a b c|d e f}",
        "c",
        (0, 1, 1),
    )


def test_a_line_with_too_many_texts_is_measured_by_its_longest_options():
    """Thirteen groups of two make 8,192 texts; the longest option of each is taken."""
    (longest,) = longest_texts(["{a|b c}" * 13], TokenCounter(load_clip("sd1")))
    assert longest == ("b c" * 13, count("b c" * 13))


WORDS = st.sampled_from(
    [
        "1girl",
        "solo",
        "^_^",
        "long hair",
        "a",
        "{x}",
        "}",
        "|",
        "don't",
        "e.g.",
        "“",
        "é",
        "!",
        "...",
        "日本。",
        "\u2985{",
        "&amp;",
    ]
)
TEXTS = st.lists(
    st.tuples(WORDS, st.sampled_from([", ", " ", ". ", "! ", "\n", ""])), max_size=12
).map(lambda pairs: "".join(map("".join, pairs)))
RECORDS = st.fixed_dictionaries({}, optional={"tags": TEXTS, "caption": TEXTS})
OPTIONS = st.fixed_dictionaries(
    {"fit_tokens": st.integers(3, 20), "fit_by": st.sampled_from(["drop", "trim"])},
    optional={
        "layout": st.sampled_from(["lines", "concat", "concat-caption-first", "inline"]),
        "caption_lines": st.sampled_from(["each", "join", "first"]),
        "prefix": st.just("x "),
        "caption_wildcards": st.booleans(),
        "underscores": st.just("space"),
    },
)


@settings(deadline=None)
@given(RECORDS, OPTIONS)
def test_what_is_written_fits(record, options):
    """Every alternative fits or counts as too long, and none becomes empty."""
    before, _ = merged(
        record, **{name: value for name, value in options.items() if not name.startswith("fit")}
    )
    after, tally = merged(record, **options)
    assert bool(after["caption"]) == bool(before["caption"])
    if not after["caption"]:
        return
    texts = outcomes(after["caption"])
    assert all(text.strip() for text in texts) or options.get("caption_wildcards")
    if not tally.fit_too_long:
        assert all(count(text) <= options["fit_tokens"] for text in texts)
    if options["fit_by"] == "drop":
        assert texts.keys() <= outcomes(before["caption"]).keys()
    spans = iter(after.get(TAG_SPANS, []))
    for alternative in written_alternatives(after):
        for _ in alternative.places if alternative.style == "b" else ():
            start, end = next(spans)
            assert alternative.line[start:end].strip()
    assert next(spans, None) is None


@settings(deadline=None)
@given(st.lists(RECORDS, max_size=8), OPTIONS)
def test_a_block_is_fitted_as_its_records_are(records, options):
    """Counting many records at once changes nothing."""
    block = copy.deepcopy(records)
    merger = Merger(MergeOptions(**options))
    assert merger.merge_all(block) == []
    assert block == [merged(record, **options)[0] for record in records]


@settings(deadline=None)
@given(st.lists(RECORDS, max_size=8))
def test_a_limit_that_nothing_reaches_changes_nothing(records):
    """With room for everything, the fast path and the path through --fit give the same."""
    plain, fitted = copy.deepcopy(records), copy.deepcopy(records)
    Merger(MergeOptions()).merge_all(plain)
    Merger(MergeOptions(fit_tokens=10_000)).merge_all(fitted)
    assert plain == fitted


@settings(deadline=None, max_examples=50)
@given(
    st.lists(
        st.sampled_from(["1girl", "solo", "long hair", "blue_eyes", ":d", "x"]),
        min_size=1,
        max_size=30,
    ),
    st.integers(2, 40),
)
def test_trim_keeps_as_much_as_fits(tags, limit):
    """One tag more would not fit."""
    kept = fit({"tags": ", ".join(tags)}, limit, "trim")[0]
    number = len(kept.split(", "))
    if kept == ", ".join(tags[:number]) and number < len(tags):
        assert count(", ".join(tags[: number + 1])) > limit
    else:
        assert number == 1 or number == len(tags)


@pytest.mark.parametrize("by", ["drop", "trim"])
@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--layout", "concat"),
        ("--layout", "inline"),
        ("--weights", "field", "--line", "{tags}=3", "--line", "{caption}"),
    ],
)
def test_rewrite_and_verify_from_the_command_line(tmp_path, by, more):
    """`verify` finds a line put back that --fit left out, as OUT.capmerge.json has the limit."""
    source, out = tmp_path / "meta.json", tmp_path / "out.json"
    records = {
        f"{n}.png": {
            "tags": SHORT_TAGS + ", cat" * (n % 9),
            "caption": LONG[: 20 + n] + ".\nShort {x}.",
        }
        for n in range(60)
    }
    source.write_text(json.dumps(records, indent=2))
    done = run("rewrite", source, "-o", out, "--fit", 10, by, "-j", 2, *more)
    assert done.returncode == 0, done.stderr
    counts = json.loads((tmp_path / "out.json.capmerge.json").read_text())["counts"]
    assert counts["fit_left_out" if by == "drop" else "fit_cut"] > 20
    assert f"{'left out' if by == 'drop' else 'cut'} by --fit" in done.stdout
    checked = run("verify", source, out)
    assert checked.returncode == 0, checked.stderr
    written = json.loads(out.read_text())
    for record in written.values():
        assert (
            all(count(text) <= 10 for text in outcomes(record["caption"])) or counts["fit_too_long"]
        )
    written["0.png"]["caption"] += "\n" + LONG
    written["0.png"][MARK] += "c"
    out.write_text(json.dumps(written))
    assert run("verify", source, out).returncode == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fit", "0", "drop"), "expected 1 token or more"),
        (("--fit", "75", "cut"), "Invalid value for '--fit': 'cut' is not one of 'drop', 'trim'."),
        (("--family", "sd2"), "says whose tokens are counted"),
        (("--fit", "75"), "requires 2 arguments"),
        (("--fit", "2", "trim", "--prefix", "photo of "), "has 2 tokens by itself"),
    ],
)
def test_wrong_options_are_usage_errors(tmp_path, arguments, message):
    """Each mistake ends with exit code 2 and one message."""
    source = tmp_path / "meta.json"
    source.write_text('{"a": {"tags": "x"}}')
    done = run("rewrite", source, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [source]


def test_shares_sum_to_one_after_a_drop():
    """The probabilities of what remains are exact and sum to 1, whatever is left out."""
    merger = Merger(
        MergeOptions(
            fit_tokens=7, fit_by="drop", lines=("{tags}=5", "{caption}=2", "{tags}, {caption}=3")
        )
    )
    found = merger.alternatives({"tags": SHORT_TAGS, "caption": f"{LONG}\nOne.\nTwo two."})
    assert sum(alternative.share for alternative in found) == 1
    assert found[0].share == Fraction(5, 10)


@pytest.mark.parametrize(
    ("fit_by", "shares", "left_out", "cut"),
    [("drop", [1], [80], []), ("trim", [Fraction(1, 2)] * 2, [], [(80, 74)])],
)
def test_the_example_of_the_module_head(fit_by, shares, left_out, cut):
    """At a limit of 75, tags of 80 tokens beside a short caption go or are cut at a comma."""
    record = {"tags": "1girl, solo, " + ", ".join(["hat"] * 38), "caption": "A girl."}
    fit = Merger(MergeOptions(fit_tokens=75, fit_by=fit_by)).fit(record)
    assert [draw.share for draw in fit.draws] == shares
    assert [count(draw.tags) for draw in fit.left_out] == left_out
    assert [(count(was.tags), count(now.tags)) for was, now in fit.cut] == cut
