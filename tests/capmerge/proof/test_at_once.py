"""Blocks compared at once, and draws looked at without a call, against the ways that they spare."""

import json
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capmerge.captions.merge import Merger
from capmerge.captions.record_texts import copy_of
from capmerge.captions.templates import MergeOptions
from capmerge.captions.wildcard import TooManyOutcomesError, only_outcome
from capmerge.captions.written import BrokenRecordError
from capmerge.commands.rewrite import RewriteOptions, rewrite
from capmerge.commands.verify import verify
from capmerge.errors import DataError
from capmerge.files.source import open_source
from capmerge.metadata import cuts
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.metadata.format import Format
from capmerge.proof.alignment import Alignment
from capmerge.proof.digests import BlockDigests
from capmerge.proof.draws import DrawProof
from synthetic import write_metadata

TEXT = st.text(st.sampled_from("{}|ab, \n\r\u2985\u2986\ud83d"), max_size=6)
RECORD = st.fixed_dictionaries(
    {}, optional={"caption": TEXT, "tags": TEXT, "x": st.floats() | st.integers() | st.booleans()}
)
MERGES = st.sampled_from(
    [
        MergeOptions(),
        MergeOptions(layout="inline"),
        MergeOptions(layout="concat"),
        MergeOptions(weights="field"),
        MergeOptions(caption_wildcards=True),
        MergeOptions(caption_lines="join", underscores="space"),
        MergeOptions(lines=("{tags}=5", "{caption}")),
        MergeOptions(lines=("{tags}=99", "{caption}=70")),
    ]
)


@contextmanager
def small_blocks():
    """Make blocks of few records for a while."""
    kept = cuts.BLOCK_BYTES
    cuts.BLOCK_BYTES = 150
    try:
        yield
    finally:
        cuts.BLOCK_BYTES = kept


@contextmanager
def without_alignment():
    """Make every comparison one of digests for a while."""
    kept = Alignment.range_of
    Alignment.range_of = lambda *_: None
    try:
        yield
    finally:
        Alignment.range_of = kept


def rewritten(path, out, merge=None):
    """Rewrite a file by the real command's function, without the records that cannot be merged."""
    kind = Format("jsonl" if out.suffix == ".jsonl" else "json")
    with open_source(str(path)) as source:
        rewrite(source, RewriteOptions(out, kind, merge or MergeOptions(), "skip", 1, force=True))


def verdict(path, out, merge=None):
    """The counts of verify, or its error."""
    try:
        with open_source(str(path)) as source, open_source(str(out)) as written:
            found = verify(
                source,
                written,
                merge or MergeOptions(),
                skips=True,
                max_record_bytes=MAX_RECORD_BYTES,
            )
    except DataError as error:
        return str(error)
    return asdict(found)


@pytest.mark.parametrize("kind", ["json", "jsonl"])
@given(
    members=st.lists(
        st.tuples(st.sampled_from("abcd"), RECORD | st.just([])), min_size=1, max_size=12
    ),
    merge=MERGES,
    change=st.none() | st.tuples(st.integers(0, 500), st.sampled_from(list('a9 "{}|,'))),
    dropped=st.none() | st.integers(0, 11),
)
@settings(
    max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_both_ways_say_the_same(tmp_path, kind, members, merge, change, dropped):
    """A block compared at once and the digests of its records give one verdict, in one message."""
    path, out = tmp_path / "m.json", Path(tmp_path, f"out.{kind}")
    path.write_text("{" + ",\n".join(f"{json.dumps(k)}: {json.dumps(r)}" for k, r in members) + "}")
    with small_blocks():
        rewritten(path, out, merge)
        text = out.read_bytes()
        if change and text:
            place = change[0] % len(text)
            text = text[:place] + change[1].encode() + text[place + 1 :]
        if dropped is not None:
            lines = text.split(b"\n")
            del lines[dropped % len(lines)]
            text = b"\n".join(lines)
        out.write_bytes(text)
        found = verdict(path, out, merge)
        with without_alignment():
            assert found == verdict(path, out, merge)


@pytest.mark.parametrize("kind", ["plain", "mixed", "hostile"])
@pytest.mark.parametrize("ending", ["json", "jsonl"])
def test_right_blocks_need_no_digests(kind, ending, tmp_path, monkeypatch):
    """No block of a right output has to be looked at record by record."""
    path, out = tmp_path / "m.json", tmp_path / f"out.{ending}"
    write_metadata(path, 2_500_000, kind=kind)
    rewritten(path, out)
    monkeypatch.setattr(BlockDigests, "_digests", lambda *_: 1 / 0)
    assert verdict(path, out)["records"] > 500


@given(st.lists(RECORD, min_size=1, max_size=3), MERGES, TEXT, st.integers(0, 3))
@settings(max_examples=500, deadline=None)
def test_draws_that_are_not_doubted_are_right(records, merge, other, place):
    """What is passed over is what the general rule finds right, also in captions that are wrong."""
    befores = [copy_of(record) for record in records]
    merger = Merger(merge)
    merger.merge_all(records)
    if place < len(records):
        lines = records[place]["caption"].split("\n")
        lines[place % len(lines)] = other
        records[place]["caption"] = "\n".join(lines)
    pairs = [("k", record) for record in records]
    proof = DrawProof(merger)
    for _ in range(2):  # plans are made when a record is doubted
        doubted = proof.doubtful(befores, pairs)
    for number, (before, record) in enumerate(zip(befores, records, strict=True)):
        if number not in doubted:
            assert misread(proof, merger, before, record) == ""


def misread(proof, merger, before, record):
    """What the general rule finds wrong with the draws of a record."""
    try:
        return proof.problem(before, record, merger.draws(before))
    except BrokenRecordError as error:
        return str(error)
    except TooManyOutcomesError:
        return ""


@given(st.text(st.sampled_from("{}|ab ") | st.characters(exclude_characters="\n\u2985\u2986")))
@settings(max_examples=500, deadline=None)
def test_doubled_braces_read_as_braces(text):
    """The grammar gives back any line whose braces were doubled, if no stand-in is in it."""
    assert only_outcome(text.replace("{", "{{").replace("}", "}}")) == text
