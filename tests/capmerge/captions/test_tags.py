import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from capmerge.captions.tags import one_line, spaced

TAGS = st.text(st.sampled_from("ab_, \t\r\n\u2028\x0c^o>") | st.characters(), max_size=30).map(
    str.strip
)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("1girl, solo", "1girl, solo"),
        ("1girl\nsolo", "1girl, solo"),
        ("1girl,\n solo", "1girl, solo"),
        ("1girl ,\r\n, solo", "1girl, solo"),
        ("1girl\r\r\n\n\tsolo", "1girl, solo"),
        ("1girl, ,\n ,, \n solo", "1girl, solo"),
        ("a,,b\nc", "a,,b, c"),
        ("a  b\nc", "a  b, c"),
        ("a\u2028b", "a\u2028b"),
        ("a\x0cb\x0bc\x85d", "a\x0cb\x0bc\x85d"),
        ("", ""),
    ],
)
def test_line_breaks_in_tags_become_commas(tags, expected):
    """A line break with the commas and spaces around it is one comma; the rest stays as it is."""
    assert one_line(tags) == expected


@given(TAGS)
@settings(max_examples=200, deadline=None)
def test_tags_end_up_on_one_line(tags):
    """No line break is left, and all but breaks, commas and spaces stays in its order."""
    found = one_line(tags)
    assert "\n" not in found
    assert "\r" not in found
    ignored = str.maketrans("", "", "\r\n\t ,")
    assert found.translate(ignored) == tags.translate(ignored)


def test_a_long_run_of_spaces_is_read_once():
    """A long run of spaces without a line break is read quickly, or this test never ends."""
    tags = "a" + " " * 200_000 + "b\nc"
    assert one_line(tags) == "a" + " " * 200_000 + "b, c"


@pytest.mark.parametrize(
    "emoticon",
    [
        "^_^",
        ">_<",
        "o_o",
        "0_0",
        "|_|",
        "||_||",
        "<|>_<|>",
        "+_+",
        "u_u",
        "x_x",
        "@_@",
        "=_=",
        "._.",
        "(o)_(o)",
        "<o>_<o>",
        "3_3",
        "_",
    ],
)
def test_emoticons_stay(emoticon):
    """Tags whose underscore is part of a face are not words."""
    assert spaced(f"long_hair, {emoticon}, cat_ears") == f"long hair, {emoticon}, cat ears"


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("long_hair", "long hair"),
        ("cat_(animal)", "cat (animal)"),
        ("hatsune_miku,1girl", "hatsune miku,1girl"),
        ("very_long_hair , a b", "very long hair , a b"),
        ("長い_髪", "長い 髪"),
        ("no underscore", "no underscore"),
        ("long_hair_", "long hair"),
        ("r-18_x", "r-18 x"),
    ],
)
def test_underscores_become_spaces(tags, expected):
    """Underscores in words become spaces, and nothing else changes."""
    assert spaced(tags) == expected


@given(TAGS)
@example("0\x1f_")
@example("0a\x1f_")
@settings(max_examples=200, deadline=None)
def test_spaced_tags_keep_every_other_character(tags):
    """Only underscores become spaces, and tags with text keep some text."""
    found = spaced(tags)
    # Other white space at an end goes where an underscore beyond it does.
    kept, given_tags = (text.replace(" ", "").replace("_", "").strip() for text in (found, tags))
    assert kept == given_tags
    assert bool(found) == bool(tags)
