import pytest
from hypothesis import given
from hypothesis import strategies as st

from capmerge.captions.tag_edits import EditedTags, TagEditor, spelled_alike
from capmerge.errors import UsageError


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("long_hair", "Long Hair"),
        ("cat_(animal)", r"cat \(animal\)"),
        (r"cat_\(animal\)", "CAT (animal)"),
        ("  a \t b ", "a_b"),
        ("^_^", "^ ^"),
        (":D", ":d"),
        ("ÉTÉ", "été"),
    ],
)
def test_spellings_of_one_tag_are_alike(one, other):
    """Underscores, spaces, capitals and escaped parentheses make no difference."""
    assert spelled_alike(one) == spelled_alike(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [("hair", "hairs"), ("_", "__"), ("a", r"\a"), ("(a)", "a"), ("longhair", "long hair")],
)
def test_other_tags_are_not_alike(one, other):
    """Two tags that differ in more than their spelling do not match."""
    assert spelled_alike(one) != spelled_alike(other)


@pytest.mark.parametrize(
    ("tags", "expected"),
    [
        ("1girl, solo", "1girl, solo"),
        ("a, 1girl,  solo ,b", "1girl,  solo ,b"),
        ("1girl, A, solo", "1girl, solo"),
        ("1girl, solo, a", "1girl, solo"),
        ("a", ""),
        ("a, a,", ""),
        ("1girl,a", "1girl"),
        ("a b, ab", "a b, ab"),
        ("a{b}", "a{b}"),
        ("{x|y}, |_|", "|_|"),
        ("long_hair", "long_hair"),
        ("kitty, 1girl", "cat, pet, 1girl"),
        (" kitty,Kitty", "cat, pet"),
        ("kitty, CAT", "pet, CAT"),
        ("CAT, kitty, pet", "CAT, pet"),
        ("old", "new"),
        ("new", "new"),
        ("one", ""),
        ("Long Hair, 1girl", "long_hair, 1girl"),
        ("Long Hair, long_hair", "long_hair"),
    ],
)
def test_tags_are_dropped_and_replaced(tags, expected):
    """Tags go or change as asked; what stands beside them stays, and no new tag comes twice."""
    editor = TagEditor(
        ["a", "{x|y}", "gone"],
        ["kitty\tcat, pet", "old\tnew", "new\tnew", "one\tgone", "Long hair\tlong_hair"],
    )
    assert editor.edit(tags).text == expected


def test_what_was_done_is_returned():
    """Each dropped and replaced tag is named once for each time, as the entry spells it."""
    editor = TagEditor(["Solo", "b"], ["a\tb", "x\ty"])
    assert editor.edit("solo, SOLO, a, X") == EditedTags("y", ("Solo", "Solo", "b"), ("a", "x"))
    assert editor.edit("y") == EditedTags("y")


def test_a_replacement_is_not_replaced_again():
    """Replacements are made once, so that two tags can change places."""
    assert TagEditor((), ["a\tb", "b\ta"]).edit("a, b, c").text == "b, a, c"


@given(st.text(st.sampled_from("ab, _\\()\u2985{}|")))
def test_tags_that_match_nothing_stay_to_the_letter(tags):
    """Text without a match is returned as it is, odd commas and spaces included."""
    assert TagEditor(["no"], ["yes\tmaybe"]).edit(tags) == EditedTags(tags)


@given(st.lists(st.sampled_from(["a", " B", "c_d", "", "x "]), min_size=1).map(",".join))
def test_no_dropped_tag_is_left(tags):
    """Whatever the order and the spelling, no tag is left that should go."""
    left = TagEditor(["a", "c d"], ["b\tx"]).edit(tags.strip()).text
    found = [tag.strip() for tag in left.split(",")]
    assert set(found) <= {"x", ""}
    assert found.count("x") <= tags.count("x") + 1


@pytest.mark.parametrize(
    ("drop", "replace", "phrase"),
    [
        (["a, b"], [], '--drop-tags, "a, b": found a comma'),
        ([" "], [], "found no tag"),
        (["a\tb"], [], "--replace-tags takes an old tag"),
        (["a\nb"], [], "line break"),
        ([], ["a"], "found 0 tabs"),
        ([], ["a\tb\tc"], "found 2 tabs"),
        ([], ["a\t , "], "--drop-tags drops tags"),
        ([], ["\tb"], "found no tag"),
        ([], ["a, b\tc"], "found a comma"),
        ([], ["a\tb\nc"], "line break"),
        (["A_b"], ["a b\tc"], "Name it in one of them"),
        ([], ["a\tb", "A\tc"], "both are the same tag"),
    ],
)
def test_entries_that_cannot_be_carried_out_are_refused(drop, replace, phrase):
    """An entry that is no tag, or that contradicts another one, is a usage error."""
    with pytest.raises(UsageError) as error:
        TagEditor(drop, replace)
    assert phrase in str(error.value)


def test_long_tags_cost_linear_time():
    """A record of a million tags, and a tag of a million letters, are edited at once."""
    editor = TagEditor(["a"], ["b\tc"])
    many = ",".join(["x", "a", "b"] * 300_000)
    assert editor.edit(many).text == ",".join(["x", "c"] + ["x"] * 299_999)
    assert editor.edit("_" * 1_000_000 + ",a").text == "_" * 1_000_000
