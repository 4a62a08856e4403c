"""A cutter that loses, doubles or swaps a record at the border of a block must be found out.

It is broken on purpose, in the processes of `rewrite` and of `verify` at once or of one of them.
"""

import dataclasses
import json
from pathlib import Path

import pytest
from builders.blocks import set_sizes

from capmerge.captions.templates import MergeOptions
from capmerge.commands.rewrite import RewriteOptions, rewrite
from capmerge.commands.verify import verify
from capmerge.errors import DataError
from capmerge.files.source import open_source
from capmerge.metadata import blocks, cuts, parallel, pieces, pool
from capmerge.metadata.blocks import MAX_RECORD_BYTES
from capmerge.metadata.format import Format
from capmerge.proof import borders

COUNT = 200
RIGHT = cuts.next_block


def after_record(source, layout, start):
    """The end of the record that begins at `start`, and the start of the next; None at the end."""
    cut = layout.find_cut(source.window(start, 1 << 12), 1)
    return cut and (start + cut[0], start + cut[1])


def losing(source, layout, start, careful=0):
    """Blocks of which each leaves out the record behind it."""
    block = RIGHT(source, layout, start, careful)
    lost = None if block.last else after_record(source, layout, block.next_start)
    return dataclasses.replace(block, next_start=lost[1]) if lost else block


def doubling(source, layout, start, careful=0):
    """Blocks of which each also holds the first record of the next one."""
    block = RIGHT(source, layout, start, careful)
    twice = None if block.last else after_record(source, layout, block.next_start)
    return dataclasses.replace(block, end=twice[0]) if twice else block


def swapping(source, layout, start, careful=0):
    """The second record as a block of its own, then the first, and then the others."""
    first_end, second_start = after_record(source, layout, layout.first)
    second_end, third_start = after_record(source, layout, second_start)
    if start == layout.first:
        return blocks.Block(second_start, second_end, start + 1, last=False)
    if start == layout.first + 1:
        return blocks.Block(layout.first, first_end, third_start, last=False)
    return RIGHT(source, layout, start, careful)


def ending(source, layout, start, careful=0):
    """A last block that ends before the last record. JSON would lack its closing brace."""
    block = RIGHT(source, layout, start, careful)
    cut = after_record(source, layout, start)
    if not block.last or layout.kind == "json" or cut[1] == block.end:
        return block
    return dataclasses.replace(block, end=cut[0], next_start=cut[0])


def write_source(folder, kind):
    """A file of records of one line each, or of indented JSON."""
    path = folder / f"m.{kind}"
    records = {f"k{n}": {"tags": f"t{n}", "caption": f"c{n}"} for n in range(COUNT)}
    if kind == "json":
        path.write_text(json.dumps(records, indent=2), encoding="utf-8")
    else:
        lines = [json.dumps({"image_path": key, **record}) for key, record in records.items()]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rewritten(path: Path, jobs: int) -> Path:
    """The rewrite of a file by the real command's function."""
    out = path.with_name("out.json")
    options = RewriteOptions(out, Format("json"), MergeOptions(), "stop", jobs)
    with open_source(str(path)) as source:
        rewrite(source, options)
    return out


def verified(path: Path, out: Path, jobs: int, start_method: str | None = None):
    """What `verify` says of the two files."""
    with open_source(str(path)) as source, open_source(str(out)) as written:
        return verify(
            source,
            written,
            MergeOptions(),
            skips=False,
            max_record_bytes=MAX_RECORD_BYTES,
            jobs=jobs,
            start_method=start_method,
        )


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
    """Blocks of some records, cut by a look at a few bytes."""
    set_sizes(monkeypatch, block_bytes=1000, piece_bytes=400)
    monkeypatch.setattr(parallel, "BLOCK_BYTES", 1000)


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_a_sound_cutter_passes(kind, jobs, tmp_path):
    """Without a fault the same files are verified, with any number of processes."""
    path = write_source(tmp_path, kind)
    assert verified(path, rewritten(path, jobs), jobs).records == COUNT


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize(
    ("broken", "kind"),
    [
        *((broken, kind) for broken in (losing, doubling, swapping) for kind in ("json", "jsonl")),
        (ending, "jsonl"),
    ],
)
def test_a_broken_cutter_is_found_out(broken, kind, jobs, tmp_path, monkeypatch):
    """A fault of the cutter shows in verify when both have it, and when only the rewrite had it."""
    path = write_source(tmp_path, kind)
    for module in (parallel, pool, pieces):
        monkeypatch.setattr(module, "next_block", broken)
    out = rewritten(path, jobs)
    records = json.loads(out.read_bytes(), object_pairs_hook=list)
    assert [key for key, _ in records] != [f"k{n}" for n in range(COUNT)]

    # Only the rewrite had the fault: a record is missing, or is there twice.
    with pytest.raises(DataError) as error:
        verified(path, out, jobs)
    assert error.value.name == str(out)

    # Both have it, so that verify sees the same blocks as the rewrite.
    monkeypatch.setattr(borders, "next_block", broken)
    with pytest.raises(DataError) as error:
        verified(path, out, jobs)
    assert "bug of capmerge" in error.value.next_step
    assert error.value.offset is not None


@pytest.mark.parametrize("start_method", ["fork", "spawn"])
def test_processes_started_in_any_way_agree(start_method, tmp_path, monkeypatch):
    """Spawned processes do not share the key of hash(), and verify all the same."""
    monkeypatch.undo()
    path = tmp_path / "m.json"
    records = {f"k{n}": {"tags": f"t{n} " * 100, "caption": "c"} for n in range(6000)}
    path.write_text(json.dumps(records), encoding="utf-8")
    out = rewritten(path, 1)
    assert verified(path, out, 2, start_method).records == 6000
    out.write_bytes(out.read_bytes().replace(b"t5999 ", b"t5998 ", 1))
    with pytest.raises(DataError, match='the field "caption" is'):
        verified(path, out, 2, start_method)
