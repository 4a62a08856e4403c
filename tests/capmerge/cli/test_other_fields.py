"""Texts under other names and in lists: they are told, and options read them."""

import json

import pytest
from builders.metadata import as_indent_2, run

from capmerge import MergeOptions
from capmerge.captions.like_names import keep_few_names, like_name_notes, note_like_names
from capmerge.captions.merge import Merger, UnmergeableError
from capmerge.captions.tally import Tally
from capmerge.errors import UsageError


def merged(record, **options):
    """The record as a rewrite with these options writes it."""
    copy = dict(record)
    Merger(MergeOptions(**options)).merge(copy)
    return copy


def fast(record, **options):
    """The same by way of `merge_all`, which takes the fast path where it can."""
    copy = dict(record)
    assert Merger(MergeOptions(**options)).merge_all([copy]) == []
    return copy


OTHER = {"caption_field": "text", "tags_field": "words"}


def test_other_fields_are_read_and_stay():
    """The fields named are read, stay as they are, and a text under the usual name is replaced."""
    record = {"text": "A girl.", "words": "1girl, solo"}
    expected = {**record, "caption": "1girl, solo\nA girl.", "capmerge": "tc"}
    assert merged(record, **OTHER) == fast(record, **OTHER) == expected
    both = {"caption": "old", "tags": "old", **record}
    merger = Merger(MergeOptions(**OTHER))
    merger.merge_all([both])
    assert both == expected
    assert merger.tally.replaced == 1


def test_lists_are_alternatives_and_tags():
    """With lists each string of a caption is an alternative, and each string of tags is a tag."""
    record = {"caption": ["One.", " ", "Two\nlines."], "tags": ["a", "b, c"]}
    assert merged(record, lists=True)["caption"] == "a, b, c\n" * 3 + "One.\nTwo\nlines."
    joined = merged(record, lists=True, caption_lines="join")
    assert joined["caption"] == "a, b, c\na, b, c\nOne.\nTwo lines."
    assert merged({"caption": []}, lists=True)["caption"] == ""
    with pytest.raises(UnmergeableError, match="something else than strings"):
        merged({"caption": ["a", None]}, lists=True)
    with pytest.raises(UnmergeableError) as refused:
        merged({"caption": ["a"]})
    assert "--lists" in refused.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"caption_field": "tags"},
        {"tags_field": "caption"},
        {"caption_field": "capmerge"},
        {"caption_field": "x", "tags_field": "x"},
        {"caption_field": "\ud800"},
    ],
)
def test_fields_that_cannot_be_read_are_refused(options):
    """A field that a rewrite writes or removes itself is refused, and one name for two fields."""
    with pytest.raises(UsageError):
        MergeOptions(**options)


@pytest.mark.parametrize(
    ("name", "value", "told"),
    [
        ("captions", ["a", "b"], ["caption"]),
        ("Caption", "a", ["caption"]),
        ("TEXT", "a", ["caption"]),
        ("blip_caption", "a", ["caption"]),
        ("longCaption", "a", ["caption"]),
        ("tag_string", "a", ["tags"]),
        ("Tags", ["a"], ["tags"]),
        ("context", "a", []),
        ("text", " ", []),
        ("text", ["a", 5], []),
        ("text", 7, []),
        ("artist", "a", []),
    ],
)
def test_like_names_are_found(name, value, told):
    """A field is told when its name is like the missing one's and it holds a text."""
    merger = Merger(MergeOptions())
    merger.merge({name: value})
    assert dict(merger.tally.like_named) == {(what, name): 1 for what in told}


def test_many_names_take_bounded_memory():
    """Of any number of names the same few are kept, however the records were split."""
    names = [f"{number:04d} text" for number in range(1000)]
    totals = []
    for order in (names, names[::-1]):
        tally = Tally()
        for name in order:
            note_like_names({name: "a"}, MergeOptions(), tally, tags=True, caption=False)
            assert len(tally.like_named) <= 129
        keep_few_names(tally)
        totals.append(list(like_name_notes(tally)))
    assert totals[0] == totals[1]


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_every_command_agrees(tmp_path, jobs):
    """rewrite, verify, stats and preview tell the field, and read it when they are told to."""
    source, out = tmp_path / "m.json", tmp_path / "o.json"
    records = {f"k{number}": {"text": ["A girl.", "A {hat}."], "Tags": "x"} for number in range(9)}
    source.write_bytes(as_indent_2(records))
    told = ['"text"', "9 records have no caption", "--caption-field"]
    plain = run("rewrite", source, "-o", out, "-j", jobs).out.decode()
    assert all(text in plain for text in told)
    noted = run("stats", source, "-o", tmp_path / "s.json").err
    assert all(text in noted for text in told)
    assert "--caption-field" in run("preview", source).err
    options = ["--caption-field", "text", "--tags-field", "Tags"]
    refused = run("rewrite", source, "-o", out, "--force", *options, fails=1).err
    assert "Use --lists" in refused
    options.append("--lists")
    run("rewrite", source, "-o", out, "--force", "--index", "-j", jobs, *options)
    run("verify", source, out)
    run("verify", source, out, *options)
    written = json.loads(out.read_bytes())["k0"]
    assert written["caption"] == "x\nx\nA girl.\nA {{hat}}."
    assert written["text"] == records["k0"]["text"]
    assert "A {{hat}}." in run("preview", source, *options).out.decode()
    run("stats", source, "-o", tmp_path / "t.json", *options)
    run("stats", out, "-o", tmp_path / "u.json")
    counted, read = (json.loads((tmp_path / f"{name}.json").read_bytes()) for name in "tu")
    assert counted["lengths"] == read["lengths"]
