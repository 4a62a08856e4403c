"""Records read the fast way are read as by the rule."""

from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.captions.alternatives import fields_of, trained_alternatives
from capmerge.captions.flat import only_text, read_flat
from capmerge.captions.tally import kind_of
from capmerge.captions.wildcard import line_outcomes
from capmerge.captions.written import BrokenRecordError

LINES = st.text(st.sampled_from("ab{}|\u2985\u2986\0\1"), max_size=6) | st.sampled_from("abc")
RECORDS = st.lists(st.tuples(LINES, st.sampled_from("tcb")), min_size=1, max_size=6).map(
    lambda lines: {
        "caption": "\n".join(line for line, _ in lines),
        "capmerge": "".join(letter for _, letter in lines),
    }
)


@settings(max_examples=1500, deadline=None)
@given(RECORDS)
def test_flat_records_are_read_as_by_the_rule(record):
    """Texts, styles, shares, tags and captions are those of the alternatives."""
    flat = read_flat(record)
    try:
        alternatives = trained_alternatives(record)
    except BrokenRecordError:
        assert flat is None
        return
    if flat is None:
        lines = record["caption"].split("\n")
        texts = {only_text(line) for line in lines}
        # There is a reason why the rule has to read it.
        assert (
            "b" in record["capmerge"]
            or texts & {None, ""}
            or len(texts) < len(set(lines))
            or "ct" in "".join(a.style for a in alternatives).lstrip("t").rstrip("t") + "."
            or "tc" in "".join(a.style for a in alternatives).lstrip("t")
        )
        return
    pattern, texts = flat
    assert [{text} for text in texts] == [a.texts.keys() for a in alternatives]
    assert list(pattern.styles) == [a.style for a in alternatives]
    assert list(pattern.shares) == [a.share for a in alternatives]
    tags, captions = fields_of(alternatives)
    assert ("" if pattern.tags is None else texts[pattern.tags]) == tags
    assert [(text,) for text in texts[pattern.captions]] == captions
    assert pattern.kind == kind_of(tags, captions)


@settings(max_examples=1000, deadline=None)
@given(LINES)
def test_the_only_text_of_a_line(line):
    """It is the one outcome of the line, and there is none where a group could be drawn from."""
    text = only_text(line)
    if text is not None:
        assert line_outcomes(line) == {text: 1}
