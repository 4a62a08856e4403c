import dataclasses
import gzip
import json
import os
from pathlib import Path

import pytest
from builders.blocks import set_sizes
from builders.metadata import run
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from capmerge.captions import line_counts, lines, merge_fast
from capmerge.captions.templates import MergeOptions
from capmerge.commands.merge_blocks import BlockMerger
from capmerge.commands.verify import verify
from capmerge.errors import DataError
from capmerge.files.source import open_source
from capmerge.metadata.blocks import MAX_RECORD_BYTES, read_layout
from capmerge.metadata.format import Format
from capmerge.metadata.pieces import iter_source

RECORDS = {
    f"danbooru/{i}": {
        "caption": ["A girl {smiles}.", "", "One.\nTwo.\n\nThree.", "Plain."][i % 4],
        "tags": ["1girl, :}", "solo, ^_^", "", "o_o,\nsmile"][i % 4 if i % 8 != 6 else 0],
        "train_resolution": [64, 64 * (2 + i % 5)],
        "score": [1, 1.0, -0.0, 10**25][i % 4],
        "nested": {"a": [i, {"b": None}]},
    }
    for i in range(40)
}


def changes(options):
    """The options that are not at their default, as a test's name."""
    names = [
        name
        for name in MergeOptions.__slots__
        if getattr(options, name) != getattr(MergeOptions(), name)
    ]
    return ", ".join(f"{name}={getattr(options, name)}" for name in names) or "default"


INLINE = MergeOptions(layout="inline")
CONCAT = MergeOptions(lines=("{tags}, {caption}=2", "{caption}"))


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch):
    """Make pieces of a few records, so that every test crosses some."""
    set_sizes(monkeypatch, block_bytes=2000, piece_bytes=500)


def rewritten(folder, source, merge=CONCAT, *, kind="json", on_error="stop"):
    """Write `source` and its rewrite, and return the two paths."""
    path, target = Path(folder, "m.json"), Path(folder, f"out.{kind}")
    path.write_bytes(source)
    with open_source(str(path)) as opened:
        layout = read_layout(opened)
        merger = BlockMerger(str(path), layout, merge, on_error, Format(kind))
        parts = [merger.rewrite(piece) for piece in iter_source(opened, layout)]
    bodies = [bytes(body) for body, _ in parts if body]
    text = (
        b"{\n" + b",\n".join(bodies) + b"\n}"
        if kind == "json"
        else b"".join(body + b"\n" for body in bodies)
    )
    target.write_bytes(text if bodies or kind == "jsonl" else b"{}")
    if rejects := b"".join(lines for _, lines in parts):
        Path(f"{target}.rejects.jsonl").write_bytes(rejects)
    return path, target


def verified(path, target, merge=CONCAT, *, skips=False, progress=None):
    """The result of verify for the two files."""
    with open_source(str(path)) as source, open_source(str(target)) as written:
        return verify(
            source,
            written,
            merge,
            skips=skips,
            max_record_bytes=MAX_RECORD_BYTES,
            progress=progress,
        )


def dumped(records):
    """A metadata file of `records`."""
    return json.dumps(records, indent=2).encode()


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@pytest.mark.parametrize(
    "merge",
    [
        MergeOptions(),
        CONCAT,
        MergeOptions(layout="concat-caption-first", prefix="{p}", suffix=" s", underscores="space"),
        MergeOptions(layout="inline"),
        MergeOptions(layout="inline", caption_wildcards=True, caption_lines="join"),
        MergeOptions(lines=("{tags}=999", "{caption}"), weights="field"),
        MergeOptions(lines=("{tags}=999", "{caption}=7")),
        MergeOptions(caption_lines="first", image_size=False, caption_wildcards=True),
    ],
    ids=changes,
)
def test_what_a_rewrite_wrote_is_verified(merge, kind, tmp_path):
    """The output of every kind of options is what it should be, and every record is counted."""
    path, target = rewritten(tmp_path, dumped(RECORDS), merge, kind=kind)
    done = []
    found = verified(path, target, merge, progress=done.append)
    assert (found.records, found.rejected, found.passed, found.too_many_outcomes) == (40, 0, 0, 0)
    assert done == sorted(done)
    assert done[-1] == path.stat().st_size
    assert len(done) == 5
    assert "40 records" in found.text()


TEXT = st.text(st.sampled_from("{}|a, \n\u2985\u2986_") | st.characters(), max_size=10)
MERGES = st.builds(
    lambda way, **others: MergeOptions(**way, **others),
    st.sampled_from(
        [
            {},
            {"layout": "inline"},
            {"layout": "concat"},
            {"lines": ("{caption}{tags}=3", "{tags}"), "weights": "field"},
            {"lines": ("{caption}{tags}", "{tags} {caption}=40", "{caption}=30")},
            {"lines": ("{other}{tags}", "{{{other}|{caption}=9", "{tags}=7")},
        ]
    ),
    caption_wildcards=st.booleans(),
    caption_lines=st.sampled_from(["each", "join", "first"]),
    underscores=st.sampled_from(["keep", "space"]),
    prefix=st.sampled_from(["", "{", "\u2985"]),
    suffix=st.sampled_from(["", "}", "\u2986", " {"]),
    tags_prefix=st.sampled_from(["", "", "{", "a, "]),
    drop_tags=st.sampled_from([(), (), ("a",), ("{", "|")]),
    replace_tags=st.sampled_from([(), (), ("}\t{a|b}",), ("b\ta, \u2985",)]),
)


@given(
    st.lists(
        st.fixed_dictionaries(
            {"caption": TEXT, "tags": TEXT, "": st.floats()},
            optional={"other": TEXT | st.lists(TEXT, max_size=2) | st.none()},
        ),
        max_size=4,
    ),
    MERGES,
)
@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_right_output_is_refused(tmp_path, records, merge):
    """The output is verified for any texts and options."""
    path, target = rewritten(tmp_path, dumped(dict(enumerate(records))), merge)
    assert verified(path, target, merge).records == len(records)


@given(
    st.lists(st.text(st.sampled_from("{}|a\u2985\u2986"), max_size=8), min_size=1, max_size=3),
    MERGES,
)
@example(["\u2985{{a"], MergeOptions(caption_wildcards=True))
@example(["{x|y\u2986}\u2986"], MergeOptions(caption_wildcards=True))
@example(["{\u2985|b}{|}\u2985{{"], MergeOptions(caption_wildcards=True))
@example(["\u2985{"], MergeOptions(lines=("{caption}{tags}",), caption_wildcards=True))
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_right_output_of_braces_is_refused(tmp_path, captions, merge):
    """Braces, groups and stand-ins are verified in any order, also where a draw joins them."""
    records = {
        str(i): {"caption": caption, "tags": caption[::-1], "other": caption}
        for i, caption in enumerate(captions)
    }
    path, target = rewritten(tmp_path, dumped(records), merge)
    assert verified(path, target, merge).records == len(captions)


@pytest.mark.parametrize("lines", [62, 63, 64, 65, 70])
@pytest.mark.parametrize(
    "merge", [INLINE, MergeOptions(), CONCAT, MergeOptions(weights="field")], ids=changes
)
def test_rounded_weights_are_verified(merge, lines, tmp_path):
    """Weights rounded to 64 lines, or to 64 options of a wildcard, are verified."""
    record = {"caption": "\n".join(f"line {i}" for i in range(lines)), "tags": "t"}
    path, target = rewritten(tmp_path, dumped({"k": record, "l": {"tags": "t"}}), merge)
    assert verified(path, target, merge).records == 2


def test_too_many_outcomes_are_counted(tmp_path):
    """A caption whose wildcards cannot all be listed is compared nevertheless, and counted."""
    merge = MergeOptions(caption_wildcards=True)
    records = {"k": {"caption": "{a|b}" * 13, "tags": "t"}, "l": {"caption": "{a|b}", "tags": "t"}}
    path, target = rewritten(tmp_path, dumped(records), merge)
    found = verified(path, target, merge)
    assert (found.records, found.too_many_outcomes) == (2, 1)
    assert "too many wildcard outcomes to list: 1" in found.text()
    target.write_bytes(target.read_bytes().replace(b"{a|b}" * 13, b"{a|b}" * 12))
    with pytest.raises(DataError, match='"caption"'):
        verified(path, target, merge)


def reordered(record):
    """The same fields in another order."""
    return dict(reversed(record.items()))


def changed(name, change):
    """A change of one field."""
    return lambda record: {**record, name: change(record[name])}


@pytest.mark.parametrize(
    ("change", "phrase"),
    [
        (changed("caption", lambda text: text.replace("o_o", "o.o")), 'the field "caption" is'),
        (
            changed("caption", lambda text: text + "\n" + text.split("\n")[0]),
            'the field "caption" is',
        ),
        (
            changed("caption", lambda text: "\n".join(reversed(text.split("\n")))),
            'the field "caption" is',
        ),
        (changed("caption", lambda text: text + "\n"), 'the field "caption" is'),
        (changed("caption", lambda text: text + " "), 'the field "caption" is'),
        (changed("caption", lambda text: text.split("\n")), 'the field "caption" is'),
        (changed("capmerge", lambda letters: letters[:-1] + "t"), 'the field "capmerge" is'),
        (
            changed("capmerge_tags", lambda spans: [[0, 9], *spans[1:]]),
            'the field "capmerge_tags" is',
        ),
        (changed("capmerge_tags", lambda spans: spans[1:]), 'the field "capmerge_tags" is'),
        (changed("score", int), 'the field "score" is'),
        (changed("score", lambda _: None), 'the field "score" is'),
        (
            changed("train_resolution", lambda sizes: [float(size) for size in sizes]),
            'the field "train_resolution" is',
        ),
        (
            changed("nested", lambda nested: {"a": [nested["a"][0], {"b": 0}]}),
            'the field "nested" is',
        ),
        (changed("image_size", lambda sizes: sizes[::-1]), 'the field "image_size" is'),
        (
            lambda record: {name: value for name, value in record.items() if name != "score"},
            'the field "score" is missing',
        ),
        (lambda record: {**record, "extra": 1}, 'found a field "extra", which the source'),
        (lambda record: {**record, "tags": "o_o"}, 'found a field "tags", which the source'),
        (reordered, "the fields are in another order"),
    ],
)
@pytest.mark.parametrize("number", [3, 35, 39])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_changed_record_is_found(change, phrase, number, kind, tmp_path):
    """Any change of any record is an error with its key, its place and the problem."""
    records = {
        key: {**record, "score": 10**25 if i % 4 == 1 else 1.0}
        for i, (key, record) in enumerate(RECORDS.items())
    }
    path, target = rewritten(tmp_path, dumped(records), kind=kind)
    assert verified(path, target).records == 40
    key = f"danbooru/{number}"
    if kind == "json":
        found = json.loads(target.read_bytes())
        found[key] = change(found[key])
        target.write_bytes(dumped(found))
        place = target.read_bytes().index(f'"{key}"'.encode())
    else:
        lines = [json.loads(line) for line in target.read_bytes().splitlines()]
        record = {name: value for name, value in lines[number].items() if name != "image_path"}
        lines[number] = {"image_path": key, **change(record)}
        texts = [json.dumps(line) + "\n" for line in lines]
        target.write_text("".join(texts), encoding="utf-8")
        place = len("".join(texts[:number]))
    with pytest.raises(DataError) as error:
        verified(path, target)
    assert phrase in error.value.problem
    assert (error.value.name, error.value.key, error.value.offset) == (str(target), key, place)
    assert "rewrite" in error.value.next_step


@pytest.mark.parametrize("value", [None, [], "text", 1])
def test_a_record_that_became_something_else_is_found(value, tmp_path):
    """A value that is no longer an object is shown as it is."""
    path, target = rewritten(tmp_path, dumped(RECORDS))
    target.write_bytes(dumped({**json.loads(target.read_bytes()), "danbooru/20": value}))
    with pytest.raises(DataError, match="expected an object") as error:
        verified(path, target)
    assert error.value.key == "danbooru/20"


def test_a_line_without_a_key_is_found(tmp_path):
    """A line of JSONL that lost its image_path is a difference."""
    path, target = rewritten(tmp_path, dumped(RECORDS), kind="jsonl")
    target.write_bytes(target.read_bytes().replace(b'"image_path":"danbooru/20",', b""))
    with pytest.raises(DataError, match='expected record "danbooru/20"'):
        verified(path, target)


@pytest.mark.parametrize("number", [0, 20, 39])
def test_a_missing_record_is_found(number, tmp_path):
    """A record that is not in the output is named by its key."""
    path, target = rewritten(tmp_path, dumped(RECORDS))
    found = json.loads(target.read_bytes())
    del found[f"danbooru/{number}"]
    target.write_bytes(dumped(found))
    with pytest.raises(DataError, match=f'record "danbooru/{number}"'):
        verified(path, target)


@pytest.mark.parametrize("place", [0, 20, 40])
def test_an_extra_record_is_found(place, tmp_path):
    """A record that is not in the source is an error with its key and place."""
    path, target = rewritten(tmp_path, dumped(RECORDS))
    members = list(json.loads(target.read_bytes()).items())
    members.insert(place, ("extra", members[0][1]))
    target.write_bytes(dumped(dict(members)))
    with pytest.raises(DataError) as error:
        verified(path, target)
    assert error.value.key == "extra"
    assert error.value.offset == target.read_bytes().index(b'"extra"')


def test_records_in_another_order_are_found(tmp_path):
    """Two records that changed places are a difference."""
    path, target = rewritten(tmp_path, dumped(RECORDS))
    found = json.loads(target.read_bytes())
    target.write_bytes(dumped(dict(reversed(found.items()))))
    with pytest.raises(DataError, match='found this key, expected record "danbooru/0"'):
        verified(path, target)


def test_a_changed_key_is_found(tmp_path):
    """A key that differs in one letter is a difference."""
    path, target = rewritten(tmp_path, dumped(RECORDS))
    target.write_bytes(target.read_bytes().replace(b'"danbooru/7"', b'"danbooru/\\u0377"'))
    with pytest.raises(DataError, match='expected record "danbooru/7"'):
        verified(path, target)


@pytest.mark.parametrize("end", [b"", b"\n"])
def test_a_short_output_is_found(end, tmp_path):
    """An output that was cut off is no JSON, or ends before the source does."""
    path, target = rewritten(tmp_path, dumped(RECORDS))
    target.write_bytes(target.read_bytes()[: -2 if end else -100] + end)
    with pytest.raises(DataError, match="the file ends"):
        verified(path, target)
    target.write_bytes(b"{}")
    with pytest.raises(DataError, match='the output ends before record "danbooru/0"'):
        verified(path, target)


@pytest.mark.parametrize(
    "other",
    [
        MergeOptions(),
        MergeOptions(lines=("{tags}, {caption}", "{caption}")),
        MergeOptions(lines=CONCAT.lines, image_size=False),
        MergeOptions(lines=CONCAT.lines, prefix="p"),
        MergeOptions(lines=CONCAT.lines, weights="field"),
    ],
    ids=changes,
)
def test_other_options_are_found(other, tmp_path):
    """An output that other options would have written is refused."""
    path, target = rewritten(tmp_path, dumped(RECORDS), other)
    assert verified(path, target, other).records == 40
    with pytest.raises(DataError):
        verified(path, target)


@pytest.mark.parametrize("between", [0, 3, 40])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_repeated_keys_are_verified(between, kind, tmp_path):
    """A repeated key, in one piece or far apart, is verified as it was written."""
    members = list(RECORDS.items())[:between]
    texts = [
        json.dumps({key: record}, indent=2)[4:-2]
        for key, record in [("k", {"tags": "1"}), *members, ("k", {"tags": "2"})]
    ]
    path, target = rewritten(tmp_path, ("{\n  " + ",\n  ".join(texts) + "\n}").encode(), kind=kind)
    found = verified(path, target)
    assert between + 1 <= found.records <= between + 2
    if between == 40:
        spoiled = (
            target.read_bytes()
            .replace(b'"caption": "1"', b'"caption": "3"')
            .replace(b'"caption":"1"', b'"caption":"3"')
        )
        assert spoiled != target.read_bytes()
        target.write_bytes(spoiled)
        with pytest.raises(DataError, match='the field "caption" is "3", expected "1"'):
            verified(path, target)


def bad_records():
    """A source with records that cannot be merged, and the keys of these."""
    records = dict(RECORDS)
    for i, bad in (
        (0, None),
        (5, {"caption": ["a"]}),
        (6, {"tags": 10**25}),
        (39, {"caption": {"\ud800": float("nan")}}),
    ):
        records[f"danbooru/{i}"] = bad
    return dumped(records)


@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_rejected_records_are_verified(kind, tmp_path):
    """Records that were left out must be listed whole."""
    path, target = rewritten(tmp_path, bad_records(), kind=kind, on_error="skip")
    found = verified(path, target, skips=True)
    assert (found.records, found.rejected) == (36, 4)
    assert "listed whole: 4" in found.text()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda lines: lines[1:],
        lambda lines: lines[:-1],
        lambda lines: [*lines, lines[0]],
        lambda lines: [*lines, "null\n"],
        lambda lines: [lines[1], lines[0], *lines[2:]],
        lambda lines: [lines[0], lines[1].replace('["a"]', '["b"]'), *lines[2:]],
        lambda lines: [lines[0], lines[1].replace("danbooru/5", "danbooru/4"), *lines[2:]],
        lambda lines: [
            *lines[:2],
            lines[2].replace("10000000000000000000000000", "1e25"),
            lines[3],
        ],
        lambda _: [],
    ],
)
def test_changed_rejects_are_found(spoil, tmp_path):
    """A list of rejects that is not exactly the records left out is refused."""
    path, target = rewritten(tmp_path, bad_records(), on_error="skip")
    rejects = Path(f"{target}.rejects.jsonl")
    lines = rejects.read_text(encoding="utf-8").splitlines(keepends=True)
    assert len(lines) == 4
    spoiled = spoil(lines)
    assert spoiled != lines
    rejects.write_text("".join(spoiled), encoding="utf-8")
    with pytest.raises(DataError) as error:
        verified(path, target, skips=True)
    assert error.value.name == str(rejects)


def test_rejects_must_be_allowed(tmp_path):
    """Without --on-error skip no record may be missing, listed or not."""
    path, target = rewritten(tmp_path, bad_records(), on_error="skip")
    with pytest.raises(DataError):
        verified(path, target)


def test_passed_records_are_verified(tmp_path):
    """Already rewritten records pass unchanged with --allow-rewritten, and are refused without."""
    merge = MergeOptions(allow_rewritten=True)
    records = {
        "a": {"tags": "t", "caption": "c"},
        "b": {"caption": "{{x}}\n\ny", "capmerge": "tc"},
        "c": {"tags": "t"},
    }
    path, target = rewritten(tmp_path, dumped(records), merge)
    found = verified(path, target, merge)
    assert (found.records, found.passed) == (3, 1)
    assert "already rewritten in the source, and unchanged: 1" in found.text()
    with pytest.raises(DataError, match="rewritten already") as error:
        verified(path, target, MergeOptions())
    assert (error.value.name, error.value.key, error.value.offset) == (
        str(path),
        "b",
        path.read_bytes().index(b'"b"'),
    )
    target.write_bytes(target.read_bytes().replace(b"{{x}}", b"{{{{x}}}}"))
    with pytest.raises(DataError) as error:
        verified(path, target, merge)
    assert error.value.key == "b"


def test_the_grammar_is_a_proof_of_its_own(tmp_path, monkeypatch):
    """A merge rule gone wrong is found although it agrees with itself, by sd-scripts' grammar."""
    for writer in (lines, merge_fast):
        monkeypatch.setattr(writer, "escape", lambda text: text)
    merge = MergeOptions(layout="concat")
    path, target = rewritten(tmp_path, dumped({"k": {"tags": "a", "caption": "x {b|c}"}}), merge)
    with pytest.raises(DataError, match="sd-scripts draws"):
        verified(path, target, merge)


@pytest.mark.parametrize("layout", ["lines", "concat", "inline"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("c", "d"),
        lambda text: text.replace("t", "{t|u}"),
        lambda text: text.replace("t", "}t"),
        lambda text: text.replace("c2", "c1"),
    ],
)
def test_the_fast_way_of_the_merge_is_proven_too(layout, spoil, tmp_path, monkeypatch):
    """A fault in the fast way of the merge is found although the rewrite has it, too."""
    merge_all = merge_fast.FastMerge.merge_all

    def spoiled(self, records, *others):
        left = merge_all(self, records, *others)
        for record in records:
            record["caption"] = spoil(record["caption"])
        return left

    records = {"k": {"tags": "t", "caption": "c1\nc2"}, "l": {"tags": "t", "caption": "c1\nc2"}}
    merge = MergeOptions(layout=layout)
    path, target = rewritten(tmp_path, dumped(records), merge)
    assert verified(path, target, merge).records == 2
    monkeypatch.setattr(merge_fast.FastMerge, "merge_all", spoiled)
    path, target = rewritten(tmp_path, dumped(records), merge)
    with pytest.raises(DataError) as error:
        verified(path, target, merge)
    assert error.value.key == "k"


def test_wrong_probabilities_are_found(tmp_path, monkeypatch):
    """A merge rule that repeats lines in another ratio than asked for is found."""
    merge = MergeOptions(lines=("{tags}=3", "{caption}"))
    equally = lambda shares: [1] * len(shares)  # noqa: E731
    monkeypatch.setattr(line_counts, "whole_weights", equally)
    path, target = rewritten(tmp_path, dumped({"k": {"tags": "t", "caption": "c"}}), merge)
    with pytest.raises(DataError, match="other probabilities"):
        verified(path, target, merge)


def test_wrong_spans_are_found(tmp_path, monkeypatch):
    """A span that does not hold the tags is found although the merge rule agrees with itself."""
    whole = lines.LineWriter.fill

    def shifted(self, draw):
        return dataclasses.replace(whole(self, draw), tag_span=(0, 3))

    monkeypatch.setattr(lines.LineWriter, "fill", shifted)
    monkeypatch.setattr(merge_fast.FastMerge, "serves", lambda _: False)
    merge = MergeOptions(layout="concat-caption-first")
    path, target = rewritten(tmp_path, dumped({"k": {"tags": "tags", "caption": "caption"}}), merge)
    with pytest.raises(DataError, match=r"the span \[0, 3\)"):
        verified(path, target, merge)


def tampered(text: str, kind: str) -> str:
    """OUT of `RECORDS` with one thing changed."""
    match kind:
        case "caption":
            return text.replace("Only words.", "Only werds.")
        case "brace":
            return text.replace("{{smiles}}", "{smiles}")
        case "mark":
            return text.replace('"capmerge": "tc"', '"capmerge": "ct"')
        case "number":
            return text.replace('"score": 3', '"score": 3.0')
        case "key":
            return text.replace("danbooru/2", "danbooru/9")
        case "extra field":
            return text.replace('"score": 3', '"score": 3,\n    "extra": null')
    records = json.loads(text)
    match kind:
        case "missing record":
            del records["danbooru/2"]
        case "missing last record":
            del records["danbooru/3"]
        case "extra record":
            records["danbooru/4"] = {"caption": "", "capmerge": ""}
        case "order of records":
            records = dict(reversed(records.items()))
        case "order of fields":
            records["danbooru/1"] = dict(reversed(records["danbooru/1"].items()))
        case "missing field":
            del records["danbooru/3"]["image_size"]
        case "record is no object":
            records["danbooru/2"] = ["x"]
    return json.dumps(records, indent=2)


@pytest.mark.parametrize(
    ("kind", "place"),
    [
        ("caption", "danbooru/3"),
        ("brace", "danbooru/1"),
        ("mark", "danbooru/1"),
        ("number", "danbooru/2"),
        ("key", "danbooru/2"),
        ("extra field", "danbooru/2"),
        ("missing record", "danbooru/2"),
        ("missing last record", "danbooru/3"),
        ("extra record", "danbooru/4"),
        ("order of records", "danbooru/1"),
        ("order of fields", "danbooru/1"),
        ("missing field", "danbooru/3"),
        ("record is no object", "danbooru/2"),
    ],
)
def test_verify_finds_any_change(source, kind, place):
    """One changed place in OUT makes verify exit 1 and name it; the untouched output passes."""
    out = source.with_name("out.json")
    run("rewrite", source, "-o", out)
    assert "verified: 3 records" in run("verify", source, out).out.decode()
    text = out.read_text(encoding="utf-8")
    out.write_text(tampered(text, kind), encoding="utf-8")
    assert out.read_text(encoding="utf-8") != text
    done = run("verify", source, out, fails=1)
    assert done.out == b""
    assert done.err.startswith(f"capmerge: {out}")
    assert place in done.err
    assert done.err.count("\n") == 1


def test_verify_finds_another_source(source):
    """Verify of OUT against a changed source exits 1."""
    out = source.with_name("out.json")
    run("rewrite", source, "-o", out)
    source.write_bytes(source.read_bytes().replace(b"no_humans", b"no_human_"))
    run("verify", source, out, fails=1)


def test_verify_finds_other_options(source):
    """Verify under options that OUT was not made with exits 1."""
    out = source.with_name("out.json")
    run("rewrite", source, "-o", out)
    run("verify", source, out, "--layout", "concat", fails=1)
    run("verify", source, out, "--layout", "lines")


@pytest.mark.parametrize(
    "change",
    [
        "missing line",
        "changed line",
        "extra line",
        "no file",
        "broken line",
        "other value",
        "no key",
        "no text",
    ],
)
def test_verify_reads_the_rejects(unmergeable, change):
    """A record missing in OUT must be whole in OUT.rejects.jsonl, else verify exits 1."""
    out, rejects = (
        unmergeable.with_name("out.json"),
        unmergeable.with_name("out.json.rejects.jsonl"),
    )
    run("rewrite", unmergeable, "-o", out, "--on-error", "skip")
    lines = rejects.read_bytes().splitlines(keepends=True)
    match change:
        case "missing line":
            rejects.write_bytes(lines[0])
        case "changed line":
            rejects.write_bytes(lines[0].replace(b"two", b"six") + lines[1])
        case "extra line":
            rejects.write_bytes(b"".join([*lines, lines[1]]))
        case "no file":
            rejects.unlink()
        case "broken line":
            rejects.write_bytes(lines[0][:-5])
        case "other value":
            rejects.write_bytes(b"[]\n" + lines[1])
        case "no key":
            rejects.write_bytes(b"[1]\n" + lines[1])
        case "no text":
            rejects.write_bytes(b"\xff\n")
    assert "rejects.jsonl" in run("verify", unmergeable, out, fails=1).err


def test_verify_of_a_cut_output(source):
    """An OUT that was cut off is a damaged file for verify."""
    out = source.with_name("out.json")
    run("rewrite", source, "-o", out)
    out.write_bytes(out.read_bytes()[:-20])
    assert "cut off" in run("verify", source, out, fails=1).err


def test_verify_of_standard_input(source):
    """Verify reads SRC from `-` too."""
    out = source.with_name("out.json")
    run("rewrite", source, "-o", out)
    run("verify", "-", out, stdin=source.read_bytes())


@pytest.mark.parametrize("changed", ["source", "output", "gzip"])
@pytest.mark.parametrize("change", ["touched", "cut off"])
def test_a_file_that_changes_while_it_is_verified_is_an_error(tmp_path, changed, change):
    """A change of either file is told as such, also where it looks like a wrong record."""
    source, target = rewritten(tmp_path, json.dumps(RECORDS, indent=2).encode())
    if changed == "gzip":
        packed = tmp_path / "out.json.gz"
        packed.write_bytes(gzip.compress(target.read_bytes()))
        target = packed
    path = source if changed == "source" else target

    def disturb(_offset):
        if change == "touched":
            os.utime(path, (1, 1))
        else:
            os.truncate(path, path.stat().st_size // 2)

    with (
        pytest.raises(DataError) as raised,
        open_source(str(source)) as opened,
        open_source(str(target)) as written,
    ):
        verify(
            opened,
            written,
            CONCAT,
            skips=False,
            max_record_bytes=MAX_RECORD_BYTES,
            progress=disturb,
        )
    assert str(raised.value).startswith(f"{path}: the file changed while it was read.")
