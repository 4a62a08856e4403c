import pytest

from capmerge.captions.merge import Merger
from capmerge.captions.templates import MergeOptions


@pytest.mark.parametrize(
    ("lines", "record", "caption"),
    [
        (("{artist}: {tags}", "{caption}"), {"tags": "t", "caption": "c"}, "c"),
        (("{artist}: {tags}",), {"tags": "t", "caption": "c"}, "t"),
        (("{artist}: {tags}, {caption}",), {"tags": "t", "caption": "c"}, "t\nc"),
        (("{artist}: {tags}",), {"artist": "a", "caption": "c"}, "a"),
        (("{artist}: {tags}",), {"caption": "c"}, "c"),
        (("{artist}",), {"tags": "t", "caption": "c"}, "t\nc"),
        (("{artist}",), {"artist": "a", "tags": "t"}, "a"),
        (("{artist} {rating}", "{tags}"), {"artist": "a", "tags": "t"}, "t"),
        (("{artist}=3", "{tags}"), {"artist": "a\n b", "tags": "t"}, "a b\na b\na b\nt"),
        (("by {artist}",), {}, ""),
        (("{artist}",), {"artist": [" ", ""], "tags": "t"}, "t"),
        (("{artist}",), {"artist": ["a", " ", "b\nc, d"]}, "a, b c, d"),
    ],
)
def test_templates_that_name_a_missing_field_are_left_out(lines, record, caption):
    """A line goes where its field is missing or empty, but never the whole text of a record."""
    copy = dict(record)
    Merger(MergeOptions(lines=lines)).merge(copy)
    assert copy["caption"] == caption


def test_missing_fields_are_counted():
    """Each field is counted once per record, however many templates name it."""
    merger = Merger(MergeOptions(lines=("{a} {tags}", "{a}", "{b}", "{tags}")))
    for record in ({"tags": "t"}, {"a": "x"}, {"a": "x", "b": "y", "tags": "t"}):
        merger.merge(record)
    assert merger.tally.lacking_fields == {"a": 1, "b": 2}
    assert merger.tally.capped == 0
