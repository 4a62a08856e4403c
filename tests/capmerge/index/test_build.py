"""The index: its columns, its tie to the metadata, and the commands that write it."""

import json
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from builders.blocks import set_sizes
from builders.columns import edit_head
from builders.metadata import (
    COMMAND,
    HANG_SECONDS,
    LAYOUTS,
    as_indent_2,
    as_jsonl,
    make_records,
    rewritten,
    run,
    temporary_files,
    wait_until,
)

from capmerge.captions.alternatives import trained_alternatives
from capmerge.errors import BusyError, CapmergeError, DataError, StaleError, UsageError
from capmerge.files.atomic import AtomicFile, ScratchFile
from capmerge.index import rows as index_rows
from capmerge.index.build import build_index, ensure_index
from capmerge.index.reader import KIND, ROW, TOKEN_COLUMNS, VERSION, index_path, open_index
from capmerge.metadata import parallel
from capmerge.tokens.chunks import a1111
from capmerge.tokens.load import load_clip

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="kill -9 and pipes by name")


def rewritten_all(records: Mapping[str, Any]) -> dict[str, Any]:
    """Return the records as the default options write them."""
    return {key: rewritten(record) for key, record in records.items()}


PLAIN = rewritten_all(make_records(2600))
NESTED = rewritten_all(make_records(300, nested=True))
FEW = rewritten_all(make_records(12))
ALTERNATIVES: dict[str, Any] = {
    "wildcards": {"caption": "a {red, very red and more red|blue} hat!", "capmerge": "c"},
    "repeated": {"caption": "1girl, solo\n1girl, solo\na cat", "capmerge": "ttc"},
    "in line": {"caption": "{1girl, solo|A girl alone at night.}", "capmerge": "tc"},
    "weights": {"caption": "1girl " * 80 + "\nshort", "capmerge": "tc", "capmerge_weights": [0, 3]},
    "both": {"caption": "1girl, solo, A girl.", "capmerge": "b", "capmerge_tags": [[0, 11]]},
    "doubled": {"caption": "a {{brace}}", "capmerge": "c"},
    "breaks": {"caption": "cat BREAK dog BREAK", "capmerge": "c"},
    "escaped": {"caption": "saber \\(fate\\), " * 15, "capmerge": "t"},
    "commas": {"caption": "word " * 60 + ", " + "word " * 78, "capmerge": "c"},
    "empty": {"caption": "", "capmerge": ""},
    "excited": {"caption": "!!! wow !\nwow", "capmerge": "tc"},
}


def write(path, data):
    """Write `data` to the file `path`, which is returned."""
    path.write_bytes(data)
    return path


def read_all(index):
    """Return every record of an index by key, in its order."""
    return dict(map(index.read, range(len(index))))


@pytest.fixture
def few(tmp_path):
    """Return a small rewritten file."""
    return write(tmp_path / "few.json", as_indent_2(FEW))


# --- what it holds --------------------------------------------------------------------------------


@pytest.mark.parametrize("records", [PLAIN, NESTED], ids=["plain", "nested"])
@pytest.mark.parametrize("layout", [*LAYOUTS, "BOM"])
def test_every_record_is_read_by_its_number(tmp_path, layout, records):
    """Any layout gives the records of json.load one by one.

    Lone surrogates, infinities, big integers and nested objects are among them.
    """
    data = b"\xef\xbb\xbf" + as_indent_2(records) if layout == "BOM" else LAYOUTS[layout](records)
    path = write(tmp_path / "m.json", data)
    index = build_index(path, tokens=False)
    assert repr(read_all(index)) == repr(records)
    for number in range(0, len(index), 37):
        start, end = (
            int(index.offset[number]),
            int(index.offset[number]) + int(index.length[number]),
        )
        key, record = list(records.items())[number]
        if layout == "jsonl":
            assert repr(json.loads(data[start:end])) == repr({"image_path": key, **record})
        else:
            assert repr(json.loads(b"{" + data[start:end] + b"}")) == repr({key: record})
            assert (data[start : start + 1], data[end - 1 : end]) == (b'"', b"}")


def test_columns_say_what_a_trainer_needs(tmp_path):
    """Sizes are the record's own; token lengths and chunks are the most of any alternative."""
    records = {**FEW, **ALTERNATIVES}
    index = build_index(write(tmp_path / "m.json", as_indent_2(records)))
    sd1, sd2 = load_clip("sd1"), load_clip("sd2")
    for number, record in enumerate(records.values()):
        texts = [
            text for alternative in trained_alternatives(record) for text in alternative.texts
        ] or [""]
        expected = [
            *record.get("train_resolution", [0, 0]),
            *(max(len(tokenizer.encode(text)) for text in texts) for tokenizer in (sd1, sd2)),
            *(
                max(len(a1111(text, tokenizer).chunks) for text in texts)
                for tokenizer in (sd1, sd2)
            ),
        ]
        columns = (
            index.width,
            index.height,
            index.longest_alternative("tokens", "sd1"),
            index.longest_alternative("tokens", "sd2"),
            index.longest_alternative("chunks", "sd1"),
            index.longest_alternative("chunks", "sd2"),
        )
        assert [int(column[number]) for column in columns] == expected
    assert len(set(index.longest_alternative("chunks", "sd1").tolist())) > 1
    assert (
        index.longest_alternative("tokens", "sd1").tolist()
        != index.longest_alternative("tokens", "sd2").tolist()
    )


def test_columns_are_read_only_and_small(few):
    """The index takes at most 64 bytes per record, and its columns are contiguous and read-only."""
    index = build_index(few)
    assert ROW.itemsize <= 64
    assert index.path.stat().st_size <= 64 * len(index) + 4096
    for name in ROW.names:
        column = (
            index.longest_alternative(*name.split("_"))
            if name in TOKEN_COLUMNS
            else getattr(index, name)
        )
        assert column.flags.c_contiguous
        assert not column.flags.writeable
        assert len(column) == len(index) == len(FEW)


def test_rows_may_come_in_any_parts(tmp_path):
    """Rows that were cut in transit are joined again, and offsets count from the file's start."""
    rows = np.zeros(3, ROW)
    rows["offset"] = [1, 2, 3]
    data, starts = rows.tobytes(), iter([100, 200])
    with ScratchFile(tmp_path / "x") as scratch:
        sink = index_rows.RowSink(scratch, lambda: next(starts))
        sink.write(data[:50], new_block=True)
        sink.write(data[50:51], new_block=False)
        sink.write(data[51:], new_block=False)
        sink.write(data, new_block=True)
        assert sink.column("offset").tolist() == [101, 102, 103, 201, 202, 203]
    assert list(tmp_path.iterdir()) == []


def test_records_without_resolution_are_counted(tmp_path):
    """The index counts the records whose latents decide their bucket, and the command says so."""
    path = write(tmp_path / "m.json", as_indent_2({**FEW, **ALTERNATIVES}))
    said = run("index", path).out.decode()
    assert open_index(path).without_resolution == len(ALTERNATIVES)
    assert "without train_resolution" in said
    assert "are those of their latents" in said


def test_of_repeated_keys_the_last_record_counts(tmp_path):
    """The last record of a key is kept, as by json.load; records with only equal stems all stay."""
    first = {
        f"k/{number}": {"caption": f"first {number}", "capmerge": "c"} for number in range(3000)
    }
    again = {
        f"k/{number}": {"caption": f"again {number}", "capmerge": "c"} for number in (0, 7, 2999)
    }
    pictures = {
        name: {"caption": name, "capmerge": "c"} for name in ("k/1.png", "k/1.jpg", "./k/2")
    }
    pairs = [
        *first.items(),
        *again.items(),
        ("k/7", {"caption": "third", "capmerge": "c"}),
        *pictures.items(),
    ]
    members = ",\n  ".join(f"{json.dumps(key)}: {json.dumps(record)}" for key, record in pairs)
    lines = "\n".join(json.dumps({"image_path": key, **record}) for key, record in pairs)
    for name, text in (("m.json", "{\n  " + members + "\n}"), ("m.jsonl", lines)):
        index = build_index(write(tmp_path / name, text.encode()), tokens=False)
        assert read_all(index) == dict(pairs)
        assert len(index) == len(dict(pairs))
        assert index.repeated == 4
        assert "only the last record" in run("index", tmp_path / name, "--no-tokens").out.decode()


# --- any number of processes ----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["indent=2", "compact", "jsonl"])
def test_the_number_of_jobs_changes_nothing(tmp_path, layout):
    """One process and three processes write the same bytes."""
    records = {
        f"{part}/{key}": record for part in range(3) for key, record in {**PLAIN, **NESTED}.items()
    }
    path = write(tmp_path / "m.json", LAYOUTS[layout](records))
    assert path.stat().st_size > 3 << 20
    one = build_index(path, jobs=1).path.read_bytes()
    assert build_index(path, jobs=3).path.read_bytes() == one


def test_blocks_done_in_vain_leave_no_rows(tmp_path, monkeypatch):
    """An error in a block that began inside a record leaves no rows in the worker's next block."""
    set_sizes(monkeypatch, block_bytes=4_000, piece_bytes=500)
    monkeypatch.setattr(parallel, "BLOCK_BYTES", 4_000)
    some = {f"k/{number}": {"caption": "c " * 30, "capmerge": "c"} for number in range(300)}
    # These look like records inside of one. In each block several are rewritten, then one is not.
    parts = {
        f"part {i}": {"caption": "c" * 60, "capmerge": "c"} if i % 30 < 29 else {"caption": "x"}
        for i in range(300)
    }
    records = {
        **some,
        "wide": {"caption": "c", "capmerge": "c", "parts": parts},
        **{f"{key}b": record for key, record in some.items()},
    }
    path = write(tmp_path / "m.json", LAYOUTS["compact"](records))
    one = build_index(path, tokens=False).path.read_bytes()
    for jobs in (2, 3, 4):
        index = build_index(path, jobs=jobs, tokens=False)
        assert read_all(index) == records
        assert index.path.read_bytes() == one


@pytest.mark.parametrize(
    ("name", "source"), [("o.json", "m.json"), ("o.jsonl", "m.json"), ("o.json", "m.jsonl")]
)
def test_a_rewrite_writes_the_same_index(tmp_path, name, source):
    """`rewrite --index` writes what `index OUT` does, also with skipped and repeated records."""
    records = {
        f"{part}/{key}": record
        for part in range(2)
        for key, record in make_records(2000, nested=True).items()
    }
    lists = {f"list/{number}": {"caption": ["no"], "tags": "x"} for number in range(3)}
    text = (
        as_jsonl({**records, **lists})
        if source.endswith("l")
        else as_indent_2({**records, **lists})
    )
    if source.endswith("l"):
        text += as_jsonl({"0/danbooru/1000001": {"caption": "again", "tags": "tag, !"}})
    write(tmp_path / source, text)
    out = tmp_path / name
    run(
        "rewrite",
        tmp_path / source,
        "-o",
        out,
        "--on-error",
        "skip",
        "--index",
        "-j",
        "2",
        "--quiet",
    )
    beside = index_path(out).read_bytes()
    assert open_index(out).repeated == (1 if source.endswith("l") else 0)
    run("index", out, "--force", "-j", "1", "--quiet")
    assert index_path(out).read_bytes() == beside
    assert open_index(out).has_tokens


def test_a_rewrite_without_index_removes_an_older_one(tmp_path):
    """An older index would not fit the content of a file that was written again."""
    source, out = write(tmp_path / "m.json", as_indent_2(make_records(5))), tmp_path / "o.json"
    run("rewrite", source, "-o", out, "--index")
    assert index_path(out).exists()
    run("rewrite", source, "-o", out, "--force")
    assert not index_path(out).exists()


def test_an_index_travels_to_other_processes(few):
    """A pickled index opens the same file again, and many threads read through one index."""
    index = build_index(few)
    copied = pickle.loads(pickle.dumps(index))
    assert len(pickle.dumps(index)) < 1000
    assert (copied.fingerprint, copied.metadata, read_all(copied)) == (index.fingerprint, few, FEW)
    numbers = [*range(len(FEW))] * 20
    random.Random(1).shuffle(numbers)
    keys = list(FEW)
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(index.read, numbers)) == [
            (keys[number], FEW[keys[number]]) for number in numbers
        ]


@posix_only
def test_forked_processes_read_through_one_index(few):
    """Forked processes that read through one index do not disturb each other."""
    index = build_index(few)
    ends = []
    for _ in range(2):
        here, there = multiprocessing.get_context("fork").Pipe(duplex=False)
        process = multiprocessing.get_context("fork").Process(
            target=lambda end=there: end.send([read_all(index) for _ in range(20)])
        )
        process.start()
        ends.append((here, process))
    for here, process in ends:
        assert here.recv() == [FEW] * 20
        process.join()


# --- what it is tied to ---------------------------------------------------------------------------


def test_one_changed_byte_makes_it_stale(few):
    """A changed file is recognized by its content; its old index is refused, then replaced."""
    index = build_index(few)
    data = few.read_bytes()
    few.write_bytes(data.replace(b"silver", b"golden", 1))
    with pytest.raises(StaleError, match=r"other content than few\.json.*capmerge index"):
        open_index(few)
    mended = ensure_index(few)
    assert mended.fingerprint != index.fingerprint
    assert read_all(mended) == json.loads(few.read_bytes())


def test_an_edit_between_the_sampled_blocks_is_seen(tmp_path):
    """An edit that keeps the size and the fingerprint is an error where the record is read.

    An index that is made anew tells other records.
    """
    records = {f"k{number}": {"caption": "a red fox " * 40} for number in range(3000)}
    path = write(tmp_path / "many.json", as_indent_2(rewritten_all(records)))
    before = build_index(path)
    for number in range(1000, 1100):
        data = path.read_bytes()
        start = int(before.offset[number])
        edited = data[:start] + data[start:].replace(b"red fox", b"fox red", 1)
        assert len(edited) == len(data)
        write(path, edited)
        if open_index_fits(path):
            break
        write(path, data)
    index = ensure_index(path)
    assert index.fingerprint == before.fingerprint
    assert index.read(number - 1)[0] == f"k{number - 1}"
    with pytest.raises(StaleError, match=rf"not record {number} of its index.*index .* --force"):
        index.read(number)
    anew = build_index(path)
    assert anew.read(number)[1]["caption"].startswith("a fox red")
    assert anew.fingerprint == before.fingerprint
    assert anew.records_fingerprint() != before.records_fingerprint()


def open_index_fits(path):
    """True if the index of a file fits it, as far as its fingerprint tells."""
    try:
        open_index(path)
    except StaleError:
        return False
    return True


def test_a_record_that_is_not_there_any_more_is_an_error(few):
    """A file that is written to while it is in use never gives another record's text."""
    index = build_index(few)
    data = few.read_bytes()
    with few.open("r+b") as file:
        file.write(b" " + data[:-1])
    with pytest.raises(StaleError, match="not record 3 of its index"):
        index.read(3)
    few.write_bytes(data.replace(b"1000003", b"9999993"))
    with pytest.raises(StaleError, match="not record 3 of its index"):
        index.read(3)
    assert index.read(4)[0] == "danbooru/1000004"


def test_an_index_that_was_replaced_is_not_mixed_up(few):
    """A pickled index does not open another one that has replaced its file."""
    pickled = pickle.dumps(build_index(few))
    few.write_bytes(as_indent_2(rewritten_all(make_records(5))))
    ensure_index(few)
    with pytest.raises(StaleError, match="replaced while it was in use"):
        pickle.loads(pickled)


def damage(path, how):
    """Break an index in one of several ways."""
    data = path.read_bytes()
    broken = {
        "missing": None,
        "empty": b"",
        "cut off": data[:-64],
        "other file": b"{}" * 100,
        "broken head": data[:20] + b"\xff" * 40 + data[60:],
        "other version": data.replace(
            f'"version": {VERSION}'.encode(), f'"version": {VERSION + 1}'.encode(), 1
        ),
        "other kind": data.replace(KIND.encode(), b"X" * len(KIND), 1),
        "wrong places": data.replace(b'"rows": 12', b'"rows": 99', 1),
    }[how]
    if broken is None:
        path.unlink()
    else:
        path.write_bytes(broken)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("missing", "no such file"),
        ("empty", "broken"),
        ("cut off", r"found [\d,]+ bytes, expected [\d,]+"),
        ("other file", "broken"),
        ("broken head", "broken"),
        ("other version", f"expected '{KIND}' of version {VERSION}"),
        ("other kind", f"expected '{KIND}'"),
        ("wrong places", "broken"),
    ],
)
def test_what_is_no_index_is_made_anew(few, how, message):
    """The message says what is wrong and what to do, and `ensure_index` does it."""
    whole = build_index(few).path.read_bytes()
    damage(index_path(few), how)
    with pytest.raises(StaleError, match=rf"{message}.*capmerge index"):
        open_index(few)
    assert ensure_index(few).path.read_bytes() == whole


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda head: head.update(rows=head["rows"] + 1), "no record in the last of its 13 rows"),
        (lambda head: head.update(rows=head["rows"] - 1), "belong to no column"),
        (lambda head: head.update(layout="jsom"), "found 'jsom' as its 'layout'"),
        (lambda head: head.pop("layout"), "'layout'"),
        (lambda head: head.pop("fingerprint"), "'fingerprint'"),
        (lambda head: head.pop("repeated"), "'repeated'"),
        (lambda head: head.pop("without_resolution"), "'without_resolution'"),
        (lambda head: head["columns"].pop("width"), "found the columns"),
        (lambda head: head["columns"].pop("tokens_sd2"), "found the columns"),
        (lambda head: head["columns"]["leads"].__setitem__(0, "|i1"), "as its column 'leads'"),
        (lambda head: head["columns"]["length"].__setitem__(1, 64), "column 'length' begins"),
    ],
)
def test_an_index_with_a_damaged_head_is_built_again(few, edit, message):
    """A wrong head of the right version raises no other error and is not believed."""
    whole = build_index(few).path.read_bytes()
    edit_head(index_path(few), edit)
    with pytest.raises(StaleError, match=rf"the file is broken: .*{message}.*capmerge index"):
        open_index(few)
    assert ensure_index(few).path.read_bytes() == whole


def test_an_index_without_tokens_says_so(few):
    """Reading lengths that were not counted is an error, and asking for them builds it again.

    An index with token lengths serves every use.
    """
    index = build_index(few, tokens=False)
    assert not index.has_tokens
    for name in TOKEN_COLUMNS:
        with pytest.raises(UsageError, match=r"without token lengths.*capmerge index"):
            index.longest_alternative(*name.split("_"))
    assert not ensure_index(few).has_tokens
    assert ensure_index(few, tokens=True).has_tokens
    before = index_path(few).stat().st_mtime_ns
    run("index", few, "--no-tokens")
    assert index_path(few).stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("name", "data"),
    [("m.json", b"{}"), ("m.json", b" {\n}\n"), ("m.jsonl", b""), ("m.jsonl", b"\n")],
)
def test_no_records_are_an_index_too(tmp_path, name, data):
    """An empty object and an empty file of lines give an index of nothing."""
    path = write(tmp_path / name, data)
    index = ensure_index(path)
    assert len(index) == 0
    assert index.offset.tolist() == index.longest_alternative("tokens", "sd1").tolist() == []
    assert len(ensure_index(path)) == 0
    assert len(pickle.loads(pickle.dumps(index))) == 0


# --- what cannot be indexed -----------------------------------------------------------------------


def test_an_original_file_is_sent_to_rewrite(tmp_path):
    """The error names the record and the command to run first, and no index is left."""
    path = write(tmp_path / "m.json", as_indent_2({**FEW, "new": {"caption": "a", "tags": "b"}}))
    error = run("index", path, fails=1).err
    assert 'record "new"' in error
    assert "capmerge rewrite" in error
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.json"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"caption": "a\nb", "capmerge": "t"}, "one letter per line"),
        ({"caption": "a", "capmerge": "x"}, "expected t, c or b"),
        ({"caption": ["a"], "capmerge": "t"}, "expected strings"),
        (["no object"], "without"),
    ],
)
def test_a_broken_record_is_named(tmp_path, record, message):
    """A record whose fields do not agree stops the index, with or without tokens."""
    path = write(tmp_path / "m.json", as_indent_2({**FEW, "broken": record}))
    for tokens in (True, False):
        with pytest.raises(DataError, match=rf'byte [\d,]+, record "broken".*{message}'):
            build_index(path, tokens=tokens)


def test_a_stray_line_is_named(tmp_path):
    """A line of JSON lines that is no record stops the index."""
    path = write(tmp_path / "m.jsonl", as_jsonl(FEW) + b"[3]\n")
    with pytest.raises(DataError, match="not an object"):
        build_index(path)


@pytest.mark.parametrize("name", ["m.json.gz", "m.json.zst", "m.parquet"])
def test_what_has_no_offsets_names_convert(tmp_path, name):
    """The error for compressed files and Parquet gives the command that makes what is needed."""
    path = write(tmp_path / "m.json", as_indent_2(FEW))
    run("convert", path, "-o", name, cwd=tmp_path)
    error = run("index", name, cwd=tmp_path, fails=2).err
    command = error.rpartition(": capmerge ")[2].split()
    run(*command, cwd=tmp_path)
    run("index", command[-1], cwd=tmp_path)


def test_pipes_have_no_offsets(tmp_path):
    """The error for a pipe names the next step."""
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        # Nobody writes to it: the command does not wait for that.
        assert "Write it to a file first" in run("index", tmp_path / "pipe", fails=2).err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "-", "--index"], "Give a file with -o OUT"),
        (["-o", "o.json.gz", "--index"], "does not end in .gz"),
        (["-o", "o.json.zst", "--index"], "does not end in .zst"),
    ],
)
def test_a_rewrite_that_has_no_offsets_is_refused(tmp_path, options, message):
    """--index with standard output or gzip is an error before anything is written."""
    path = write(tmp_path / "m.json", as_indent_2(make_records(5)))
    assert message in run("rewrite", path, *options, cwd=tmp_path, fails=2).err
    assert [entry.name for entry in tmp_path.iterdir()] == ["m.json"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.json"], "no such file"),
        (["few.json", "--relist"], "--latents"),
        (["few.json", "--allow-outside"], "--latents"),
        (["few.json", "--latents", "nowhere"], "no such folder"),
        (["."], "a folder"),
    ],
)
def test_wrong_options_are_usage_errors(few, arguments, message):
    """Wrong options end with exit code 2 and one message, and write no index."""
    assert message in run("index", *arguments, cwd=few.parent, fails=2).err
    assert not index_path(few).exists()


def test_the_help_names_every_option():
    """`capmerge index --help` names every option, and `rewrite --help` names --index."""
    text = run("index", "--help", env={**os.environ, "COLUMNS": "200"}).out.decode()
    options = (
        "FILE",
        "--latents",
        "--relist",
        "--allow-outside",
        "--no-tokens",
        "--jobs",
        "--force",
        "--quiet",
        "--max-record",
    )
    assert [name for name in options if name not in text] == []
    assert "--index" in run("rewrite", "--help", env={**os.environ, "COLUMNS": "200"}).out.decode()
    assert "index" in run("--help").out.decode()


# --- several runs at once, and runs that end early ------------------------------------------------


def test_a_second_run_waits_for_the_first(few):
    """While another run builds, `build_index` raises, and `ensure_index` waits for its turn."""
    file = AtomicFile(index_path(few))
    with pytest.raises(BusyError, match="another run is writing"):
        build_index(few)
    found: list[Any] = []
    waiting = threading.Thread(target=lambda: found.append(ensure_index(few)))
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    file.discard()  # as when the first run is killed
    waiting.join(HANG_SECONDS)
    assert read_all(found[0]) == FEW


def test_two_commands_at_once_share_one_index(tmp_path):
    """Both commands succeed, with one whole index and no other file beside it."""
    path = write(tmp_path / "m.json", as_indent_2(PLAIN))
    both = [
        subprocess.Popen([*COMMAND, "index", path, "-j", "1"], stdout=subprocess.PIPE)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=HANG_SECONDS)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert all(b"records" in text for text in said)
    assert len(open_index(path)) == len(PLAIN)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.json", "m.json.index"]


@posix_only
def test_a_killed_run_leaves_no_half_index(tmp_path):
    """After kill -9 there is no index, and the next run builds it and removes the remains."""
    path = write(
        tmp_path / "m.json",
        as_indent_2(
            {f"{part}/{key}": record for part in range(3) for key, record in PLAIN.items()}
        ),
    )
    process = subprocess.Popen([*COMMAND, "index", path, "-j", "1"])
    assert wait_until(lambda: temporary_files(tmp_path))
    process.send_signal(signal.SIGKILL)
    process.wait(HANG_SECONDS)
    assert not index_path(path).exists()
    assert len(ensure_index(path, jobs=2)) == 3 * len(PLAIN)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["m.json", "m.json.index"]


def test_an_error_leaves_the_older_index(few):
    """A build that fails leaves the older index unchanged."""
    build_index(few)
    whole = index_path(few).read_bytes()
    few.write_bytes(as_indent_2(make_records(5)))
    with pytest.raises(CapmergeError):
        ensure_index(few)
    assert index_path(few).read_bytes() == whole
    assert temporary_files(few.parent) == []


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_reading_takes_little_memory_of_ones_own(tmp_path):
    """A process that reads records at random has less than 50 MB of private memory."""
    path = write(
        tmp_path / "m.json",
        as_indent_2(
            {f"{part}/{key}": record for part in range(4) for key, record in PLAIN.items()}
        ),
    )
    build_index(path, tokens=False)
    code = (
        "import random, sys, pathlib\nfrom capmerge.index.reader import open_index\n"
        "index = open_index(pathlib.Path(sys.argv[1]))\n"
        "for _ in range(2000): index.read(random.randrange(len(index)))\n"
        "lines = [line.split() for line in open('/proc/self/smaps_rollup')]\n"
        "print(sum(int(line[1]) for line in lines if line[0].startswith('Private')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, path], capture_output=True, check=True, timeout=HANG_SECONDS
    )
    assert int(done.stdout) * 1024 < 50e6
