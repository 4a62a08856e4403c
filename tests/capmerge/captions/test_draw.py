import json
from collections import Counter
from fractions import Fraction
from itertools import product

import pytest
from builders.paths import DATA
from hypothesis import given
from hypothesis import strategies as st

from capmerge.captions.alternatives import written_alternatives
from capmerge.captions.draw import draw_line, nth_of_turn
from capmerge.captions.merge import Merger
from capmerge.captions.templates import MergeOptions
from capmerge.captions.wildcard import outcomes, parse_line
from capmerge.captions.written import read_written
from capmerge.rng import Chance, SampleId

KEYS = [f"danbooru/{number}.png" for number in range(30_000)]


THREE = "tags\nfirst\nsecond"


def draw(caption, seed, epoch, key, *, dataset=0, repeat=0, **how):
    """Return the text that `draw_line` draws."""
    return draw_line(caption, SampleId(seed, epoch, key, dataset, repeat), **how).text


def chi_square(counts, expected):
    """Return the chi-square statistic of the counts."""
    return sum((counts.get(name, 0) - number) ** 2 / number for name, number in expected.items())


def test_golden_draws_never_change():
    """A run that is resumed by a later release draws the same lines."""
    caption = "1girl, solo\nA girl in {red|blue|green}.\n{{literal}} {a|b} and {c|d}"
    drawn = [
        draw(caption, seed, epoch, key, dataset=dataset, repeat=repeat, weights=weights, pick=pick)
        for seed, epoch, key, dataset, repeat, weights, pick in [
            (0, 0, "a.png", 0, 0, None, "random"),
            (0, 1, "a.png", 0, 0, None, "random"),
            (0, 0, "b.png", 0, 0, None, "random"),
            (0, 0, "a.png", 1, 0, None, "random"),
            (0, 0, "a.png", 0, 1, None, "random"),
            (2**63, 7, "日本/\ud83d.png", 0, 0, None, "random"),
            (-5, 7, "", 3, 2, [0, 1, 5], "random"),
            (0, 0, "a.png", 0, 0, None, "cycle"),
            (0, 1, "a.png", 0, 0, None, "cycle"),
            (9, 4, "\ud83d", 2, 1, [10**30, 3, 10**30], "cycle"),
        ]
    ]
    assert drawn == GOLDEN


GOLDEN = [
    "1girl, solo",
    "1girl, solo",
    "{literal} b and c",
    "A girl in blue.",
    "{literal} a and c",
    "{literal} a and d",
    "{literal} b and d",
    "{literal} b and c",
    "1girl, solo",
    "{literal} b and c",
]


def test_lines_are_uniform_over_keys():
    """Each of three lines is drawn for a third of the keys (chi-square, 2 d.o.f., p > 1e-4)."""
    counts = Counter(draw(THREE, 1, 0, key) for key in KEYS)
    assert chi_square(counts, dict.fromkeys(THREE.split("\n"), 10_000)) < 18.4


def test_lines_are_uniform_over_epochs_repeats_and_seeds():
    """One record draws every line equally often, whichever of its numbers grows."""
    for name in ("epoch", "repeat", "seed", "dataset"):
        counts = Counter(
            draw(THREE, **{"seed": 0, "epoch": 0, "key": "a", name: number})
            for number in range(6000)
        )
        assert chi_square(counts, dict.fromkeys(THREE.split("\n"), 2000)) < 18.4, name


def test_weights_are_probabilities():
    """A line of weight 7 is drawn seven times as often as one of weight 1; weight 0 never is."""
    counts = Counter(draw(THREE, 1, 0, key, weights=[7, 1, 0]) for key in KEYS)
    assert "second" not in counts
    assert chi_square(counts, {"tags": 26_250, "first": 3750}) < 15.1


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (lambda key: draw(THREE, 1, 0, key), lambda key: draw(THREE, 1, 1, key)),
        (lambda key: draw(THREE, 1, 0, key), lambda key: draw(THREE, 2, 0, key)),
        (lambda key: draw(THREE, 1, 0, key), lambda key: draw(THREE, 1, 0, key, repeat=1)),
        (lambda key: draw(THREE, 1, 0, key), lambda key: draw(THREE, 1, 0, key, dataset=1)),
        (
            lambda key: draw(THREE, 1, 0, key),
            lambda key: Chance(SampleId(1, 0, key)).below(3, "another purpose"),
        ),
        (
            lambda key: draw("{a|b|c} {d|e|f}", 1, 0, key)[0],
            lambda key: draw("{a|b|c} {d|e|f}", 1, 0, key)[2],
        ),
        (
            lambda key: draw_line("{a|b}\n{a|b}x\n{a|b}y", SampleId(1, 0, key)).line,
            lambda key: draw_line("{a|b}\n{a|b}x\n{a|b}y", SampleId(1, 0, key)).options,
        ),
    ],
)
def test_draws_are_independent(first, second):
    """Two draws of a key are independent: their table is flat (at most 8 d.o.f., p > 1e-4)."""
    table = Counter((first(key), second(key)) for key in KEYS)
    one, two = {a for a, _ in table}, {b for _, b in table}
    assert (
        chi_square(table, dict.fromkeys(product(one, two), len(KEYS) / len(one) / len(two))) < 31.8
    )


def test_draws_what_sd_scripts_draws():
    """Over many epochs each golden caption gives the texts and frequencies of sd-scripts."""
    cases = json.loads((DATA / "wildcard_outcomes.json").read_text())
    assert cases
    for case in cases:
        caption, expected = case["caption"], outcomes(case["caption"])
        counts = Counter(draw(caption, 5, epoch, "k") for epoch in range(60 * len(expected)))
        assert counts.keys() <= expected.keys()
        in_turn = {
            draw(caption, 5, epoch, "k", pick="cycle")
            for epoch in range(10 * parse_line(caption).ways * len(caption.split("\n")) ** 2)
        }
        assert in_turn == expected.keys() or len(expected) > 100
        if len(expected) < 20:
            assert (
                chi_square(
                    counts, {text: sum(counts.values()) * float(p) for text, p in expected.items()}
                )
                < 3 * len(expected) + 30
            )


def test_cycle_takes_every_alternative_in_turn():
    """As many epochs or repeats as lines show each line once; the start differs between keys."""
    lines = THREE.split("\n")
    for key in KEYS[:50]:
        over_epochs = [draw(THREE, 3, epoch, key, pick="cycle") for epoch in range(3)]
        assert sorted(over_epochs) == sorted(lines)
        assert over_epochs == [
            draw(THREE, 3, 0, key, pick="cycle", repeat=repeat) for repeat in range(3)
        ]
        assert over_epochs[0] == draw(THREE, 3, 3, key, pick="cycle")
    counts = Counter(draw(THREE, 3, 0, key, pick="cycle") for key in KEYS)
    assert chi_square(counts, dict.fromkeys(lines, 10_000)) < 18.4


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=7).filter(any),
    st.integers(0, 2**40),
    st.text(),
)
def test_cycle_honours_weights_in_any_turn(weights, epoch, key):
    """Any run of as many epochs as the sum of the weights shows line i weight_i times."""
    caption = "\n".join(map(str, range(len(weights))))
    drawn = Counter(
        draw(caption, 1, epoch + step, key, weights=weights, pick="cycle")
        for step in range(sum(weights))
    )
    assert drawn == {str(line): weight for line, weight in enumerate(weights) if weight}


def test_cycle_spreads_repeated_lines():
    """Lines that are repeated for their weight do not come in a row."""
    drawn = "".join(draw("t\nt\nt\nc\nc\nc", 1, epoch, "k", pick="cycle") for epoch in range(12))
    assert drawn in ("tc" * 6, "ct" * 6)


def test_cycle_goes_through_all_options_of_a_line():
    """In-line wildcards go through their combinations, one each time their line comes up."""
    drawn = Counter(
        draw("plain\n{a|b|b} {c|d}", 1, epoch, "k", pick="cycle") for epoch in range(12)
    )
    assert drawn == {"plain": 6, "a c": 1, "a d": 1, "b c": 2, "b d": 2}


@given(st.lists(st.integers(1, 400), min_size=1, max_size=8), st.data())
def test_nth_of_turn_is_the_sorted_turn(weights, data):
    """The line at a place equals that of the whole cycle, written out and sorted."""
    turn = sorted(
        (Fraction(2 * j + 1, 2 * weight), number, j)
        for number, weight in enumerate(weights)
        for j in range(weight)
    )
    place = data.draw(st.integers(0, len(turn) - 1))
    assert nth_of_turn(tuple(weights), place) == turn[place][1:]


def test_nth_of_turn_takes_huge_weights():
    """Weights over 64 bits cost no more than small ones."""
    counts = Counter(nth_of_turn((10**40, 3 * 10**40), 10**39 + place)[0] for place in range(400))
    assert counts == {0: 100, 1: 300}


def test_style_of_what_was_drawn_is_found_again():
    """A drawn alternative has its letter, for lines, repeated lines and an in-line wildcard."""
    record = {"tags": "a, {b}|c", "caption": "One.\nTwo {x}."}
    for options in (
        MergeOptions(),
        MergeOptions(layout="inline"),
        MergeOptions(lines=("{tags}=3", "{caption}", "{tags}: {caption}")),
    ):
        merged = dict(record)
        Merger(options).merge(merged)
        texts = {draw.text: draw.style for draw in Merger(options).alternatives(record)}
        for epoch, pick in product(range(40), ("random", "cycle")):
            drawn = draw_line(merged["caption"], SampleId(1, epoch, "k"), pick=pick)
            written = read_written(merged)
            assert written.letters[written.place_of(drawn)] == texts[drawn.text]
        assert sum(alternative.share for alternative in written_alternatives(merged)) == 1


def test_wrong_arguments_are_refused():
    """Weights that do not match the lines, and an unknown pick, are errors."""
    for weights in ([1], [1, -1], [0, 0], []):
        with pytest.raises(ValueError, match="expected one of 0 or more per line"):
            draw("a\nb", 1, 0, "k", weights=weights)
    with pytest.raises(ValueError, match="random or cycle"):
        draw("a\nb", 1, 0, "k", pick="shuffle")
    assert draw("", 1, 0, "k") == draw("", 1, 0, "k", pick="cycle") == ""
