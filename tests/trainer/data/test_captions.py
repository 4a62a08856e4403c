import math
import re
from collections import Counter

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from capmerge.captions.alternatives import trained_alternatives
from capmerge.captions.merge import Merger
from capmerge.captions.templates import MergeOptions
from capmerge.captions.written import BrokenRecordError
from capmerge.rng import SampleId
from trainer.config.settings import CaptionSettings, TextSettings
from trainer.data.captions import RANDOM_WORDS, _draw, train_caption

TAGS = "1girl, solo, red hair, hat, smile, outdoors, sky, tree"
SENTENCE = "A girl in a hat, smiling, stands under a tree."


def rewritten(tags=TAGS, caption=SENTENCE, **options):
    """A record as a rewrite writes it."""
    record = {"tags": tags, "caption": caption}
    Merger(MergeOptions(**options)).merge(record)
    return record


def train(
    record,
    *,
    text=None,
    seed=7,
    epoch=0,
    key="a.png",
    dataset=0,
    repeat=0,
    step=0,
    max_steps=100,
    **settings,
):
    """The result of `train_caption` for the default sample; `settings` are those of `[caption]`."""
    return train_caption(
        record,
        CaptionSettings(**settings),
        text or TextSettings(),
        SampleId(seed, epoch, key, dataset, repeat),
        step=step,
        max_steps=max_steps,
    )


def plain(caption, letters="t", **fields):
    """A rewritten record made by hand."""
    return {"caption": caption, **fields, "capmerge": letters}


def texts(record, count=200, **settings):
    """The texts that many epochs train."""
    return [train(record, epoch=epoch, **settings).text for epoch in range(count)]


def test_nothing_asked_nothing_changed():
    """A line trains verbatim, with its separators and odd spaces, when no setting changes it."""
    assert train(plain("a,,b ,  c ||| d, ")) == ("a,,b ,  c ||| d, ", "t", ())


def test_the_drawn_line_has_its_own_style():
    """Each line comes with its own letter, under both values of `pick`."""
    record = plain("x, y\nA sentence.\nx, y, A sentence.", "tcb", capmerge_tags=[[0, 4]])
    expected = {("x, y", "t"), ("A sentence.", "c"), ("x, y, A sentence.", "b")}
    for pick in ("random", "cycle"):
        assert {train(record, epoch=epoch, pick=pick)[:2] for epoch in range(40)} == expected


def test_weights_are_honoured():
    """A line of weight 0 never trains."""
    record = plain("a\nb\nc", "ttt", capmerge_weights=[1, 0, 2])
    counts = Counter(texts(record, 600))
    assert counts["b"] == 0
    assert 330 < counts["c"] < 470


def test_wildcards_are_drawn_before_tags_are_split():
    """Options of a wildcard are tags like any other, and doubled braces become single."""
    assert {
        tuple(sorted(text.split(", "))) for text in texts(plain("{a|b, c}, d, {{e}}"), shuffle=True)
    } == {tuple(sorted(tags)) for tags in (["a", "d", "{e}"], ["b", "c", "d", "{e}"])}


def test_empty_record():
    """A record without text trains the empty caption under all settings."""
    text = TextSettings(random_caption_rate=1, word_repeat_rate=1)
    assert train(plain("", ""), text=text, shuffle=True, tag_dropout_rate=0.5, dropout_rate=1) == (
        "",
        "",
        (),
    )


# ---------------------------------------------------------------- shuffle, keep, drop


def test_shuffle_gives_every_order_equally():
    """Three tags come in six orders that are about equally frequent."""
    counts = Counter(texts(plain("a, b, c"), 1200, shuffle=True))
    assert len(counts) == math.factorial(3)
    assert min(counts.values()) > 150


def test_keep_tokens():
    """The first `keep_tokens` tags stay in place, and the others move."""
    found = texts(plain(TAGS), keep_tokens=2, shuffle=True)
    assert all(text.startswith("1girl, solo, ") for text in found)
    assert len(set(found)) > 150


def test_empty_tags_stay_without_a_separator():
    """The line `a,,b, ` has four tags, two of them empty. Source: facts B4."""
    record = plain("a,,b, ")
    assert {tuple(sorted(text.split(", "))) for text in texts(record, shuffle=True)} == {
        ("", "", "a", "b")
    }
    assert train(record, token_warmup_steps=5, step=9).text == "a, , b, "


def test_outer_spaces_do_not_count():
    """The whole line is stripped before it is split, as in sd-scripts."""
    assert train(plain("  a ,b  "), token_warmup_steps=1, step=5).text == "a, b"


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a, b ||| c, d ||| e, f", {"a, b, c, d, e, f", "a, b, d, c, e, f"}),
        ("a, b ||| c, d", {"a, b, c, d", "a, b, d, c"}),
        ("||| c, d", {"c, d", "d, c"}),
        ("a, b |||", {"a, b"}),
        ("a ||| c,, d, ||| e, , f ||| g", {"a, c, d, e, f ||| g", "a, d, c, e, f ||| g"}),
        ("b, a", {"a, b", "b, a"}),
    ],
)
def test_keep_tokens_separator(line, expected):
    """Tags before the first and after the second separator stay in place. Source: facts B4.

    A third separator stays in the text; empty tags are removed.
    """
    assert set(texts(plain(line), 60, keep_tokens_separator="|||", shuffle=True)) == expected


def test_keep_tokens_is_ignored_beside_the_separator():
    """`keep_tokens` has no effect on a line that contains the separator."""
    assert set(
        texts(plain("a ||| b, c"), 60, keep_tokens_separator="|||", keep_tokens=3, shuffle=True)
    ) == {"a, b, c", "a, c, b"}
    assert set(
        texts(plain("a, b, c"), 60, keep_tokens_separator="|||", keep_tokens=3, shuffle=True)
    ) == {"a, b, c"}


def test_tag_dropout_spares_what_is_kept():
    """Flexible tags are dropped at the given rate, and kept tags are never dropped."""
    found = texts(
        plain("k ||| a, b, c, d ||| z"), 500, keep_tokens_separator="|||", tag_dropout_rate=0.3
    )
    assert all(text.startswith("k, ") and text.endswith("z") for text in found)
    for tag in "abcd":
        assert 0.62 < sum(tag in text.split(", ") for text in found) / len(found) < 0.78
    assert set(texts(plain("a, b"), 20, tag_dropout_rate=1)) == {""}


def test_other_separator():
    """Tags are joined by the separator and a space, as sd-scripts does since PR #2389."""
    assert set(texts(plain("a;b, c"), 40, separator=";", shuffle=True)) == {"a; b, c", "b, c; a"}


def test_secondary_separator():
    """Tags that it joins stay together and are separated at the end. Source: facts B4.

    It is replaced even when no other setting changes the line.
    """
    assert set(texts(plain("a;;;b, c"), 40, secondary_separator=";;;", shuffle=True)) == {
        "a,b, c",
        "c, a,b",
    }
    assert train(plain("a;;;b ,c"), secondary_separator=";;;").text == "a,b ,c"


@pytest.mark.parametrize(
    ("step", "count"), [(0, 2), (1, 2), (3, 3), (5, 5), (6, 5), (9, 7), (10, 8), (99, 8)]
)
def test_token_warmup(step, count):
    """The number of tags is floor(step (n - min) / warmup) + min, and n after the warm-up."""
    expected = ", ".join(TAGS.split(", ")[:count])
    assert train(plain(TAGS), token_warmup_steps=10, token_warmup_min=2, step=step).text == expected
    assert (
        train(
            plain(TAGS), token_warmup_steps=0.1, token_warmup_min=2, step=step, max_steps=109
        ).text
        == expected
    )


def test_token_warmup_is_exact():
    """Warm-up counts in integers: with floats, 49 * (1 / 49) is below 1 and loses a tag."""
    assert (
        train(plain(", ".join("abc")), token_warmup_steps=49, token_warmup_min=1, step=49 - 24).text
        == "a, b"
    )
    assert (
        len(train(plain(", ".join("t" * 99)), token_warmup_steps=98, step=49).text.split(", "))
        == 50
    )


def test_warmup_keeps_what_is_shorter_than_its_least():
    """Captions with fewer tags than `token_warmup_min` are never shortened."""
    for step in range(10):
        assert (
            train(plain("a, b"), token_warmup_steps=10, token_warmup_min=5, step=step).text
            == "a, b"
        )


# ---------------------------------------------------------------- sentences


def test_sentences_are_not_touched():
    """Style `c` trains unchanged, and only the tags of style `b` move, in both layouts."""
    for sentence in (SENTENCE, "One,two ||| three , four"):
        asked = {
            "shuffle": True,
            "tag_dropout_rate": 0.5,
            "token_warmup_steps": 99,
            "keep_tokens_separator": "|||",
        }
        assert set(texts(plain(sentence, "c"), 30, **asked)) == {sentence}
    for layout in ("concat", "concat-caption-first"):
        found = texts(rewritten(layout=layout), 100, shuffle=True)
        assert all(SENTENCE in text for text in found)
        assert len(set(found)) > 90
        assert {
            tuple(sorted(text.replace(SENTENCE, "").strip(", ").split(", "))) for text in found
        } == {tuple(sorted(TAGS.split(", ")))}


def test_sentences_on_request():
    """With `sentences`, the clauses of sentences move like tags."""
    assert (
        len(
            {
                frozenset(text.split(", "))
                for text in texts(plain(SENTENCE, "c"), 50, shuffle=True, sentences=True)
            }
        )
        == 1
    )
    assert len(
        set(texts(plain(SENTENCE, "c"), 50, shuffle=True, sentences=True))
    ) == math.factorial(3)
    record = plain("x, y, A b, c.", "b", capmerge_tags=[[0, 4]])
    assert len(set(texts(record, 300, shuffle=True, sentences=True))) == math.factorial(4)


def test_all_tags_dropped_leaves_a_clean_sentence():
    """When no tag is left, the separator next to the sentence is removed too."""
    for layout in ("concat", "concat-caption-first"):
        assert set(texts(rewritten(layout=layout), 5, tag_dropout_rate=1)) == {SENTENCE}
    record = rewritten(lines=("by me, {tags}, {caption}",))
    assert set(texts(record, 5, tag_dropout_rate=1)) == {f"by me, {SENTENCE}"}


def test_separator_between_sentence_and_tags():
    """A keep-tokens separator in a `b` line is removed as in sd-scripts.

    The sentence stays whole.
    """
    record = rewritten(tags="a, b", caption="One, two.", lines=("{caption} ||| {tags}",))
    assert set(texts(record, 40, shuffle=True, keep_tokens_separator="|||")) == {
        "One, two., a, b",
        "One, two., b, a",
    }
    record = rewritten(tags="k ||| a, b", caption="One,two.", lines=("{tags}, {caption}",))
    assert set(texts(record, 40, shuffle=True, keep_tokens_separator="|||")) == {
        "k, a, b, One,two.",
        "k, b, a, One,two.",
    }
    record = rewritten(tags="a, b", caption="One, two.", lines=("{tags} ||| {caption}",))
    assert set(texts(record, 40, shuffle=True, keep_tokens_separator="|||")) == {"a, b, One, two."}


def test_inline_layout():
    """The options of an in-line wildcard have their own styles and spans."""
    record = rewritten(tags="a, b", caption="One, {two}.", layout="inline")
    assert record["caption"].startswith("{")
    assert set(texts(record, 60, shuffle=True)) == {"a, b", "b, a", "One, {two}."}
    assert {train(record, epoch=epoch).style for epoch in range(20)} == {"t", "c"}


PIECES = st.sampled_from(
    ["a", "b c", ",", ", ", "{", "}", "{{", "}}", "|", "{x|yy}", "\u2985", "\u2986", ".", " "]
)
TEXTS = st.lists(PIECES, min_size=1, max_size=9).map("".join)


@given(
    tags=TEXTS,
    caption=TEXTS,
    between=TEXTS,
    tags_first=st.booleans(),
    wildcards=st.booleans(),
    epoch=st.integers(0, 5),
)
@example(
    tags="\u2985",
    caption="{|}\u2985",
    between="\u2985",
    tags_first=True,
    wildcards=True,
    epoch=0,
)
def test_tags_are_found_in_whatever_a_rewrite_writes(
    tags, caption, between, tags_first, wildcards, epoch
):
    """The marked span, mapped into the drawn text, holds exactly the tags.

    Wildcards of the caption and doubled braces shift it.
    """
    between = between.replace("{", "<").replace("}", ">")
    line = f"{{tags}}{between}{{caption}}" if tags_first else f"{{caption}}{between}{{tags}}"
    record = {"tags": tags, "caption": caption}
    Merger(MergeOptions(lines=(line,), caption_wildcards=wildcards)).merge(record)
    if "b" not in record["capmerge"]:
        return
    (alternative,) = trained_alternatives(record)
    found = _draw(record, CaptionSettings(), SampleId(7, epoch, "a.png"))
    assert found.text in alternative.texts
    assert found.text[slice(*found.tags)] == alternative.tags
    # A space is inserted between U+2985 and a brace.
    assert alternative.tags.replace(" ", "") == tags.replace(" ", "")


# ---------------------------------------------------------------- dropout and random changes


def test_caption_dropout():
    """`dropout_rate` drops its share; every n-th epoch, counted from 1, drops all."""
    found = [train(plain(TAGS), epoch=epoch, dropout_rate=0.25) for epoch in range(800)]
    assert {(caption.text, caption.events) for caption in found} == {
        (TAGS, ()),
        ("", ("caption_dropped",)),
    }
    assert 0.2 < sum(not caption.text for caption in found) / 800 < 0.3
    assert [
        epoch
        for epoch in range(9)
        if not train(plain(TAGS), epoch=epoch, dropout_every_epochs=3).text
    ] == [2, 5, 8]


def test_random_caption():
    """A random caption consists of a few real words and is the same each time it is made."""
    text = TextSettings(random_caption_rate=1)
    found = [train(plain(TAGS), text=text, epoch=epoch) for epoch in range(20)]
    assert found == [train(plain(TAGS), text=text, epoch=epoch) for epoch in range(20)]
    assert all(
        caption.events == ("random_caption",) and len(caption.text.split()) == RANDOM_WORDS
        for caption in found
    )
    assert len({caption.text for caption in found}) == 20
    assert train(plain(TAGS), text=text, dropout_rate=1).events == ("caption_dropped",)


def test_word_repeated():
    """One word of the caption is repeated at a random place."""
    text = TextSettings(word_repeat_rate=1)
    words = SENTENCE.split(" ")
    places = set()
    for epoch in range(100):
        caption = train(plain(SENTENCE, "c"), text=text, epoch=epoch)
        more = Counter(caption.text.split(" ")) - Counter(words)
        assert sum(more.values()) == 1
        assert caption.events == ("word_repeated",)
        places.add(caption.text)
    assert len(places) > 60


def test_rates():
    """The rates are met, and the events are independent of each other."""
    text = TextSettings(random_caption_rate=0.3, word_repeat_rate=0.3)
    counts = Counter(
        train(plain(SENTENCE, "c"), text=text, epoch=epoch, dropout_rate=0.3).events
        for epoch in range(2000)
    )
    for events, share in (
        ("caption_dropped", 0.3),
        ("random_caption", 0.21),
        ("word_repeated", 0.147),
    ):
        assert abs(counts[events,] / 2000 - share) < 0.04


def test_pure_function_of_the_sample():
    """Only seed, epoch, key, data set and repeat change the order."""
    record = plain(", ".join(str(number) for number in range(30)))
    first = train(record, shuffle=True).text
    assert train(record, shuffle=True, step=50, max_steps=7).text == first
    others = [{"seed": 8}, {"epoch": 1}, {"key": "b.png"}, {"dataset": 1}, {"repeat": 1}]
    assert len({first} | {train(record, shuffle=True, **other).text for other in others}) == 6


# ---------------------------------------------------------------- broken records


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"caption": "a"}, 'expected strings "caption" and "capmerge"'),
        ({"caption": ["a"], "capmerge": "t"}, 'expected strings "caption" and "capmerge"'),
        (plain("a\nb", "t"), "found 2 lines and 1 letters"),
        (plain("a", "tc"), "found 1 lines and 2 letters"),
        (plain("{a|b}", "tct"), "found 1 lines and 3 letters"),
        (plain("a", "x"), "found the letter 'x'"),
        (plain("a\nb", "tt", capmerge_weights=[1]), r'"capmerge_weights" is \[1\]'),
        (plain("a\nb", "tt", capmerge_weights=[0, 0]), "not all 0"),
        (plain("a\nb", "tt", capmerge_weights=[0.5, 0.5]), "whole number"),
        (plain("a\nb", "tt", capmerge_weights=3), "whole number"),
        (plain("a, b", "b"), '"capmerge_tags" to be 1 pairs'),
        (plain("a, b", "b", capmerge_tags=[[0, "1"]]), '"capmerge_tags" to be 1 pairs'),
        (plain("{aa|bb}, b", "b", capmerge_tags=[[2, 10]]), "cuts it inside a wildcard"),
        (plain("{{a, b", "b", capmerge_tags=[[1, 6]]), "cuts it inside a wildcard"),
    ],
)
def test_broken_records(record, message):
    """The error for a record that no rewrite writes says what was found and expected."""
    with pytest.raises(BrokenRecordError, match=message):
        train(record, shuffle=True)


LINES = st.lists(st.sampled_from(["", "a", "b, c", "{x|y}", "{{a}}"]), min_size=1, max_size=3)
SPANS = st.lists(st.sampled_from([[0, 1], [0, 0], [1, 0], [0], [True, 1], "a", [0, 9]]), max_size=2)


@given(
    record=st.fixed_dictionaries(
        {"caption": LINES.map("\n".join) | st.none(), "capmerge": st.text("tcbx", max_size=3)},
        optional={
            "capmerge_weights": st.lists(st.sampled_from([0, 1, 2, -1, 1.0]), max_size=3),
            "capmerge_tags": SPANS | st.none(),
        },
    ),
    epoch=st.integers(0, 3),
)
def test_the_trainer_reads_a_record_as_statistics_do(record, epoch):
    """The trainer refuses a record in the same words, or trains one of the counted texts."""
    try:
        texts = {text for found in trained_alternatives(record) for text in found.texts} or {""}
    except BrokenRecordError as error:
        with pytest.raises(BrokenRecordError, match=f"^{re.escape(str(error))}$"):
            train(record, epoch=epoch)
        return
    try:
        trained = train(record, epoch=epoch).text
    except BrokenRecordError as error:
        trained = str(error)
    # Only a draw looks for spans that end inside a wildcard.
    assert trained in texts or "inside a wildcard" in trained
