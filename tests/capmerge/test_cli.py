import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from metadata_builder import COMMAND, HANG_SECONDS, as_indent_2, as_jsonl, assert_rewritten, make_records, read_jsonl, run, run_shell

import capmerge

RECORDS = {
    "danbooru/1": {"tags": "1girl, solo", "caption": "A girl {smiles}.", "train_resolution": [128, 192]},
    "danbooru/2": {"tags": "no_humans", "score": 3},
    "danbooru/3": {"caption": "Only words.", "train_resolution": [192, 128], "image_size": [1, 2]},
}
UNMERGEABLE = {"a": {"caption": "fine"}, "b": {"caption": ["one\ntwo", "\u00a0\x7f"], "id": 10**30}, "c": 7, "d": {"tags": "fine"}}
ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e\x00\x7f"
needs_shell = pytest.mark.skipif(sys.platform == "win32", reason="the test is written for bash")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the test needs a Linux file system")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """`RECORDS` as a file."""
    path = tmp_path / "meta_lat.json"
    path.write_bytes(as_indent_2(RECORDS))
    return path


@pytest.fixture
def unmergeable(tmp_path: Path) -> Path:
    """`UNMERGEABLE` as a file."""
    path = tmp_path / "bad.json"
    path.write_bytes(as_indent_2(UNMERGEABLE))
    return path


# --- what is written where -------------------------------------------------------------------------------------------


def test_the_default_output_lies_beside_the_source(source):
    """Without -o, OUT is `<stem>_wildcard.json` in the folder of SRC, with its two side files."""
    run("rewrite", source)
    names = {path.name for path in source.parent.iterdir()} - {source.name}
    assert names == {"meta_lat_wildcard.json", "meta_lat_wildcard.json.capmerge.json", "meta_lat_wildcard.json.dataset.toml"}
    assert_rewritten(RECORDS, json.loads(source.with_name("meta_lat_wildcard.json").read_bytes()))


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("m.json", [], "m_wildcard.json"),
        ("m.jsonl", [], "m_wildcard.json"),
        ("m.json.gz", [], "m_wildcard.json"),
        ("m.v2.json", [], "m.v2_wildcard.json"),
        ("m", [], "m_wildcard.json"),
        ("m.json", ["--format", "jsonl"], "m_wildcard.jsonl"),
        ("m.json", ["--format", "json.gz"], "m_wildcard.json.gz"),
    ],
)
def test_the_default_name_follows_source_and_format(tmp_path, name, options, expected):
    """The endings of SRC are taken off and that of the format is put on."""
    (tmp_path / name).write_bytes(as_indent_2(RECORDS))
    run("rewrite", tmp_path / name, *options)
    assert (tmp_path / expected).is_file()


def test_an_existing_output_needs_force(source):
    """A second run exits 2 and changes nothing; --force replaces OUT."""
    out = source.with_name("out.json")
    out.write_text("precious")
    error = run("rewrite", source, "-o", out, fails=2).err
    assert "exists" in error
    assert "--force" in error
    assert out.read_text() == "precious"
    assert sorted(path.name for path in source.parent.iterdir()) == ["meta_lat.json", "out.json"]
    run("rewrite", source, "-o", out, "--force")
    assert_rewritten(RECORDS, json.loads(out.read_bytes()))


def test_existing_side_files_need_no_force(source):
    """Side files without OUT are those of an earlier run: they are replaced."""
    out = source.with_name("out.json")
    stale = source.with_name("out.json.capmerge.json")
    stale.write_text("stale")
    run("rewrite", source, "-o", out)
    assert json.loads(stale.read_bytes())["version"] == capmerge.__version__


def test_a_stale_list_of_rejects_disappears(unmergeable, source):
    """OUT.rejects.jsonl of an earlier run does not outlive a run without rejects."""
    out = source.with_name("out.json")
    rejects = source.with_name("out.json.rejects.jsonl")
    run("rewrite", unmergeable, "-o", out, "--on-error", "skip")
    assert [entry["key"] for entry in read_jsonl(rejects)] == ["b", "c"]
    run("rewrite", source, "-o", out, "--force")
    assert not rejects.exists()


def test_a_list_of_rejects_is_replaced(unmergeable, tmp_path):
    """OUT.rejects.jsonl holds the rejects of the last run only."""
    out, rejects = tmp_path / "out.json", tmp_path / "out.json.rejects.jsonl"
    run("rewrite", unmergeable, "-o", out, "--on-error", "skip")
    other = tmp_path / "other.json"
    other.write_bytes(as_indent_2({"z": None}))
    run("rewrite", other, "-o", out, "--on-error", "skip", "--force")
    assert [entry["key"] for entry in read_jsonl(rejects)] == ["z"]
    assert out.read_bytes() == b"{}"


@pytest.mark.parametrize("way", ["same name", "other spelling", "symlink", "hard link"])
def test_the_output_is_never_the_source(source, way):
    """OUT = SRC is refused with exit 2 even with --force, however SRC is named."""
    before = source.read_bytes()
    out = source.with_name("link.json")
    match way:
        case "same name":
            out = source
        case "other spelling":
            out = source.parent / "." / ".." / source.parent.name / source.name
        case "symlink":
            out.symlink_to(source)
        case "hard link":
            out.hardlink_to(source)
    error = run("rewrite", source, "-o", out, "--force", fails=2).err
    assert "source itself" in error
    assert source.read_bytes() == before


def test_the_output_is_never_a_gzip_source(tmp_path):
    """OUT = SRC is refused for a compressed source too."""
    path = tmp_path / "m.json.gz"
    run("rewrite", "-", "-o", path, stdin=as_indent_2(RECORDS))
    before = path.read_bytes()
    done = subprocess.run([*COMMAND, "rewrite", path, "-o", path, "--force", "--allow-rewritten"], capture_output=True, check=False)
    assert path.read_bytes() == before
    assert done.returncode == 2


@needs_shell
def test_the_output_is_never_the_file_on_standard_input(source):
    """OUT = SRC is refused for `- < SRC -o SRC --force` too."""
    before = source.read_bytes()
    run_shell('CAPMERGE rewrite - -o "$1" --force < "$1"', source)
    assert source.read_bytes() == before


@pytest.mark.parametrize("which", ["source", "output"])
def test_the_summary_never_replaces_source_or_output(source, which):
    """`--summary SRC` and `--summary OUT` are refused with exit 2 before anything is written."""
    before = source.read_bytes()
    out = source.with_name("out.json")
    done = subprocess.run(
        [*COMMAND, "rewrite", source, "-o", out, "--summary", source if which == "source" else out], capture_output=True, check=False
    )
    assert source.read_bytes() == before
    assert done.returncode == 2
    assert not out.exists()


@pytest.mark.parametrize("ending", [".rejects.jsonl", ".capmerge.json", ".dataset.toml"])
def test_a_side_file_never_replaces_the_source(tmp_path, ending):
    """A source that bears the name of one of OUT's side files is kept, and the run refused with exit 2."""
    path = tmp_path / f"out.json{ending}"
    path.write_bytes(as_indent_2(RECORDS))
    done = subprocess.run([*COMMAND, "rewrite", path, "-o", tmp_path / "out.json"], capture_output=True, check=False)
    assert path.exists()
    assert path.read_bytes() == as_indent_2(RECORDS)
    assert done.returncode == 2


def test_an_output_that_is_a_link_is_written_through(source):
    """With --force a link to another file stays a link, and its target is replaced."""
    target, link = source.with_name("target.json"), source.with_name("link.json")
    target.write_text("old")
    link.symlink_to(target)
    run("rewrite", source, "-o", link, "--force")
    assert link.is_symlink()
    assert_rewritten(RECORDS, json.loads(target.read_bytes()))


def test_the_source_is_left_alone(source):
    """SRC keeps its bytes and its time."""
    before = source.read_bytes(), source.stat().st_mtime_ns
    run("rewrite", source)
    assert (source.read_bytes(), source.stat().st_mtime_ns) == before


# --- mistakes on the command line ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["rewrite", "missing.json"], ["missing.json: no such file"]),
        (["rewrite", "folder"], ["folder: found a folder"]),
        (["rewrite", "meta_lat.json", "-o", "folder"], ["folder: found a folder"]),
        (["rewrite", "meta_lat.json", "-o", "nowhere/out.json"], ["nowhere/out.json: there is no folder", "Create it"]),
        (["rewrite", "-"], ["-o OUT"]),
        (["rewrite"], ["SRC"]),
        (["rewrite", "meta_lat.json", "--no-such-option"], ["--no-such-option"]),
        (["rewrite", "meta_lat.json", "--layout", "diagonal"], ["diagonal", "concat-caption-first"]),
        (["rewrite", "meta_lat.json", "--weights", "heavy"], ["heavy", "field"]),
        (["rewrite", "meta_lat.json", "--format", "xml"], ["xml", "jsonl.gz"]),
        (["rewrite", "meta_lat.json", "-j", "0"], ["jobs", "0"]),
        (["rewrite", "meta_lat.json", "-j", "two"], ["jobs", "two"]),
        (["rewrite", "meta_lat.json", "--dry-run", "0"], ["dry-run", "0"]),
        (["rewrite", "meta_lat.json", "--max-record", "10"], ["max-record"]),
        (["rewrite", "meta_lat.json", "--line", "{tags}", "--layout", "concat"], ["--line", "--layout"]),
        (["rewrite", "meta_lat.json", "--layout", "inline", "--weights", "field"], ["--weights field", "inline"]),
        (["rewrite", "meta_lat.json", "--line", "{tags}=0"], ["{tags}=0", "weight is 0"]),
        (["rewrite", "meta_lat.json", "--line", "{artist}"], ["{artist}", "{caption}"]),
        (["rewrite", "meta_lat.json", "--line", "{}"], ["{}", "{caption}"]),
        (["rewrite", "meta_lat.json", "--line", "words"], ["words", "no field"]),
        (["rewrite", "meta_lat.json", "--line", "{tags}\n{caption}"], ["line break"]),
        (["rewrite", "meta_lat.json", "--prefix", "a\nb"], ["--prefix", "line break"]),
        (["rewrite", "meta_lat.json", "--suffix", "a\rb"], ["--suffix", "line break"]),
        (["rewrite", "meta_lat.json", "-o", "out.jsonl", "--format", "json"], ["out.jsonl", "--format json"]),
        (["rewrite", "meta_lat.json", "-o", "out.json", "--format", "jsonl"], ["out.json", ".jsonl"]),
        (["rewrite", "meta_lat.json", "-o", "out.txt", "--format", "jsonl"], ["out.txt", ".jsonl"]),
        (["rewrite", "meta_lat.json", "-o", "out.json", "--format", "json.gz"], ["out.json", ".json.gz"]),
        (["rewrite", "meta_lat.json", "-o", "out.json.gz", "--format", "json"], ["out.json.gz"]),
        (["verify", "meta_lat.json", "missing.json"], ["missing.json"]),
        (["verify", "missing.json", "meta_lat.json", "--layout", "lines"], ["missing.json: no such file"]),
        (["no-such-command"], ["no-such-command"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_command_line_exits_2_and_says_why(source, arguments, said):
    """A mistake on the command line exits 2, names what is wrong and writes nothing."""
    (source.parent / "folder").mkdir()
    done = run(*arguments, fails=2, cwd=source.parent)
    for words in said:
        assert words in done.err
    assert done.out == b""
    assert sorted(path.name for path in source.parent.iterdir()) == ["folder", "meta_lat.json"]


@needs_linux
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="folders are writable for root")
def test_an_unwritable_folder_is_an_error(source):
    """A folder without write permission gives exit 1 and one message."""
    folder = source.with_name("locked")
    folder.mkdir(mode=0o555)
    error = run("rewrite", source, "-o", folder / "out.json", fails=1).err
    assert "out.json: cannot write" in error


@needs_linux
def test_a_folder_that_takes_no_files_is_an_error(source):
    """A folder where nobody can create files, not even root, gives exit 1 and one message."""
    error = run("rewrite", "-", "-o", "/proc/out.json", stdin=source.read_bytes(), fails=1).err
    assert error.startswith("capmerge: /proc/out.json: cannot write")
    assert error.count("\n") == 1


@needs_linux
def test_a_file_system_without_a_size_is_not_called_full(source):
    """A file system that reports a size of 0 bytes is tried, not taken for full."""
    error = run("rewrite", source, "-o", "/proc/out.json", fails=1).err
    assert "GB are free" not in error


@needs_linux
def test_an_output_that_is_a_device_is_refused(source):
    """`-o /dev/null` exits 2 and tells the way that works."""
    assert "-o -" in run("rewrite", source, "-o", "/dev/null", fails=2).err


@needs_linux
@pytest.mark.parametrize(
    "length",
    [300, pytest.param(240, id="side files only")],
)
def test_a_name_that_is_too_long_is_an_error(source, length):
    """A name that the file system refuses gives a message, no traceback."""
    done = subprocess.run([*COMMAND, "rewrite", source, "-o", source.with_name("x" * length)], capture_output=True, check=False)
    assert b"Traceback" not in done.stderr
    assert done.returncode in (1, 2)


@needs_linux
def test_an_output_in_a_loop_of_links_is_an_error(source):
    """A link to itself as OUT gives a message, no traceback."""
    loop = source.with_name("loop.json")
    loop.symlink_to(loop)
    done = subprocess.run([*COMMAND, "rewrite", source, "-o", loop, "--force"], capture_output=True, check=False)
    assert b"Traceback" not in done.stderr
    assert done.returncode in (1, 2)


@needs_shell
@pytest.mark.parametrize("script", ["CAPMERGE rewrite - -o - <&-", 'CAPMERGE rewrite "$1" -o - >&-'], ids=["input", "output"])
def test_a_closed_standard_stream_is_an_error(source, script):
    """A closed standard input or output gives a message, no traceback."""
    done = run_shell(script, source)
    assert "Traceback" not in done.err
    assert done.code in (1, 2)


def test_an_unreadable_receipt_is_an_error(source):
    """`verify` says so when OUT.capmerge.json is no receipt."""
    out = source.with_name("out.json")
    run("rewrite", source, "-o", out)
    receipt = source.with_name("out.json.capmerge.json")
    for text in (b"", b"[]", b"{}", b'{"options": 3}', b'{"options": {"lines": 5, "on_error": "stop"}}', b"\xff"):
        receipt.write_bytes(text)
        assert "receipt" in run("verify", source, out, fails=1).err


# --- standard output -------------------------------------------------------------------------------------------------


def test_standard_output_holds_the_records_only(source):
    """`-o -` writes OUT's bytes to standard output, the table to standard error, and no file."""
    done = run("rewrite", source, "-o", "-", cwd=source.parent)
    assert_rewritten(RECORDS, json.loads(done.out))
    assert "records" in done.err
    assert "enable_wildcard" in done.err
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def test_standard_output_gets_the_bytes_of_a_file(source):
    """`-o -` and `-o FILE` write the same bytes, from `-` as from SRC."""
    out = source.with_name("out.json")
    run("rewrite", source, "-o", out)
    assert run("rewrite", source, "-o", "-").out == out.read_bytes()
    assert run("rewrite", "-", "-o", "-", stdin=source.read_bytes()).out == out.read_bytes()


@needs_shell
@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("reader", ["head -c 100", "true"])
def test_a_closed_pipe_ends_quietly(tmp_path, jobs, reader):
    """When the reader of `-o -` has seen enough there is no traceback and not a word."""
    path = tmp_path / "m.json"
    path.write_bytes(as_indent_2(make_records(5000)))
    done = run_shell(f'CAPMERGE rewrite "$1" -o - -j {jobs} | {reader}; exit ${{PIPESTATUS[0]}}', path)
    assert done.err == ""
    assert done.code == 141


@needs_shell
@pytest.mark.parametrize("arguments", ['-o "$2"', "--dry-run 2"])
def test_a_closed_pipe_behind_the_table_ends_quietly(source, arguments):
    """A reader that is gone before the table or the --dry-run comes causes no complaint either."""
    out = source.with_name("out.json")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = run_shell(f'CAPMERGE rewrite "$1" {arguments} | (exec <&-; sleep 1)', source, out, env=environment)
    assert done.err == ""


@needs_linux
def test_a_full_device_behind_standard_output_is_an_error(source):
    """`-o - > /dev/full` exits 1 with a message."""
    done = run_shell('CAPMERGE rewrite "$1" -o - > /dev/full', source)
    assert done.code == 1
    assert done.err.startswith("capmerge: standard output: cannot write")


# --- quiet, summary, notes -------------------------------------------------------------------------------------------


def test_quiet_prints_nothing(source):
    """--quiet leaves both streams empty when all is well."""
    assert run("rewrite", source, "--quiet") == (0, b"", "")
    assert run("verify", source, source.with_name("meta_lat_wildcard.json"), "--quiet") == (0, b"", "")


def test_quiet_still_prints_errors(source):
    """--quiet does not hide an error."""
    source.write_text("[]")
    assert "array" in run("rewrite", source, "--quiet", fails=1).err


def test_no_bar_without_a_terminal(source):
    """The progress bar is for terminals: with streams caught there is only the table."""
    done = run("rewrite", source)
    assert done.err == ""
    assert b"%" not in done.out


def test_the_table_and_the_summary_tell_the_same(source):
    """--summary FILE holds the numbers of the table as JSON."""
    summary = source.with_name("numbers.json")
    table = run("rewrite", source, "--summary", summary).out.decode()
    numbers = json.loads(summary.read_bytes())
    expected = {"records": 3, "rewritten": 3, "both": 1, "tags_only": 1, "caption_only": 1, "empty": 0, "rejected": 0, "lines": 4}
    assert {name: numbers[name] for name in expected} == expected
    assert numbers["read_bytes"] == source.stat().st_size
    assert numbers["written_bytes"] == source.with_name("meta_lat_wildcard.json").stat().st_size
    assert numbers["lines_per_record"] == 1.333
    assert {"seconds", "megabytes_per_second"} <= numbers.keys()
    rows = dict(line.rsplit(maxsplit=1) for line in table.splitlines()[:12])
    assert {name.strip(): value for name, value in rows.items()} | {
        "records": "3",
        "rewritten": "3",
        "tags only": "1",
        "caption only": "1",
        "empty": "0",
        "rejected": "0",
        "lines a record": "1.33",
        "bytes read": f"{numbers['read_bytes']:,}",
        "bytes written": f"{numbers['written_bytes']:,}",
    } == {name.strip(): value for name, value in rows.items()}


def test_the_summary_of_standard_output(source):
    """--summary is written beside `-o -` too: it was asked for by name."""
    summary = source.with_name("numbers.json")
    done = run("rewrite", source, "-o", "-", "--summary", summary)
    assert json.loads(summary.read_bytes())["written_bytes"] == len(done.out)


def test_the_table_names_what_sd_scripts_needs(source):
    """The end of the table gives the settings of sd-scripts and the file that holds them."""
    table = run("rewrite", source).out.decode()
    assert "enable_wildcard" in table
    assert "cache_text_encoder_outputs" in table
    assert "meta_lat_wildcard.json.dataset.toml" in table


def note_of(records: dict, *options: str) -> str:
    """The end table of a run over `records`."""
    return run("rewrite", "-", "-o", "-", *options, stdin=as_indent_2(records)).err


def test_the_image_size_note_counts_the_records_it_was_added_to():
    """image_size is added where train_resolution is there and image_size is not, and the table says for how many."""
    assert re.search(r"image_size = train_resolution was added to 1 record\b", note_of(RECORDS))
    assert "image_size" not in note_of(RECORDS, "--no-image-size")


@pytest.mark.parametrize(("paragraphs", "advised"), [(2, True), (1, False)])
def test_paragraphs_in_over_one_percent_advise_join(paragraphs, advised):
    """The advice of --caption-lines join comes above 1 % of the captions, not at 1 %."""
    records = {str(i): {"caption": "one\n\ntwo" if i < paragraphs else "one\ntwo"} for i in range(100)}
    assert ("--caption-lines join" in note_of(records)) == advised


def test_special_tokens_are_counted_in_any_case():
    """Literal special tokens in tags or caption are reported with the number of records."""
    records = {
        "a": {"caption": "x <|endoftext|>"},
        "b": {"tags": "<|StartOfText|>", "caption": "<|ENDOFTEXT|>"},
        "c": {"caption": "<endoftext>"},
    }
    assert re.search(r"<\|endoftext\|>.* 2 records\b", note_of(records))
    assert "endoftext" not in note_of(RECORDS)


def test_records_over_64_lines_are_counted():
    """Weights that do not fit into 64 lines are reported."""
    note = note_of(RECORDS, "--line", "{tags}=99", "--line", "{caption}")
    assert re.search(r"note: the weights of 1 record\b.* 64 lines", note)


def test_inline_written_as_lines_is_counted():
    """Records that an in-line wildcard cannot hold are reported."""
    records = {"a": {"tags": "|_|", "caption": "x"}, "b": {"tags": "t", "caption": "c"}}
    assert re.search(r"note: 1 record\b.* in-line wildcard", note_of(records, "--layout", "inline"))


def test_growth_above_twice_is_warned_of():
    """An output of over twice the input is announced before it is written; --weights field is not warned of."""
    records = as_indent_2(make_records(200))
    heavy = ["--line", "{tags}=7", "--line", "{caption}=8"]
    assert "times the input" in run("rewrite", "-", "-o", "-", *heavy, stdin=records).err
    assert "times the input" not in run("rewrite", "-", "-o", "-", *heavy, "--weights", "field", stdin=records).err
    assert "times the input" not in run("rewrite", "-", "-o", "-", stdin=records).err


def test_quiet_prints_no_warning():
    """--quiet prints errors only, not the warning of a large output."""
    heavy = ["--line", "{tags}=7", "--line", "{caption}=8"]
    assert run("rewrite", "-", "-o", "-", "--quiet", *heavy, stdin=as_indent_2(make_records(200))).err == ""


# --- dry run ---------------------------------------------------------------------------------------------------------


def test_a_dry_run_prints_before_and_after_and_writes_nothing(source):
    """--dry-run N prints the first N records as they are and as they would be."""
    done = run("rewrite", source, "--dry-run", "2", cwd=source.parent)
    text = done.out.decode()
    assert text.count("before:") == text.count("after:") == 2
    assert '"danbooru/1"' in text
    assert '"danbooru/3"' not in text
    assert '"A girl {smiles}."' in text
    assert '"1girl, solo\\nA girl {{smiles}}."' in text
    assert [path.name for path in source.parent.iterdir()] == [source.name]


def test_a_dry_run_of_more_than_there_is(source):
    """--dry-run with a larger number than there are records prints them all, with OUT there already."""
    run("rewrite", source)
    assert run("rewrite", source, "--dry-run", "99").out.decode().count("before:") == 3


def test_a_dry_run_shows_what_cannot_be_merged(unmergeable):
    """--dry-run goes on behind a record that cannot be merged and says why it cannot."""
    text = run("rewrite", unmergeable, "--dry-run", "9").out.decode()
    assert '"caption" is a list, expected a string.' in text
    assert "the record is a number, expected an object." in text
    assert text.count("after:") == 4


def test_a_dry_run_under_a_narrow_encoding(source):
    """Characters that standard output's encoding lacks are shown as escapes."""
    source.write_bytes(as_indent_2({"k": {"caption": "日本"}}))
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run([*COMMAND, "rewrite", source, "--dry-run", "1"], capture_output=True, env=environment, check=False)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0


# --- what reaches the terminal ---------------------------------------------------------------------------------------


def assert_safe(text: str) -> None:
    """Fail when `text` holds a character that a terminal would act on."""
    assert [char for char in text if char != "\n" and not char.isprintable()] == []


@pytest.mark.parametrize("kind", ["dry run", "error", "skip", "rewritten", "verify"])
def test_control_characters_never_reach_the_terminal(tmp_path, kind):
    """Keys and text with terminal escapes are shown as escapes in errors, in --dry-run and among the rejects."""
    path, out = tmp_path / "m.json", tmp_path / "o.json"
    path.write_bytes(as_indent_2({f"key{ESCAPES}": {"caption": ESCAPES if kind in ("dry run", "verify") else [ESCAPES], "x": ESCAPES}}))
    match kind:
        case "dry run":
            done = run("rewrite", path, "--dry-run", "1")
        case "error":
            done = run("rewrite", path, fails=1)
        case "skip":
            done = run("rewrite", path, "--on-error", "skip", "-o", "-")
        case "rewritten":
            path.write_bytes(as_indent_2({f"key{ESCAPES}": {"capmerge": ESCAPES}}))
            done = run("rewrite", path, fails=1)
        case "verify":
            run("rewrite", path, "-o", out)
            out.write_text(out.read_text(encoding="utf-8").replace("title", "other"), encoding="utf-8")
            done = run("verify", path, out, fails=1)
    text = done.out.decode() + done.err
    assert_safe(text)
    assert "\\u001b" in text


@needs_linux
def test_control_characters_in_a_missing_name_are_escaped(tmp_path):
    """The name of a file that is not there is safe to print."""
    error = run("rewrite", tmp_path / "m\x1b[2J.json", fails=2).err
    assert_safe(error)
    assert "m\\x1b[2J.json: no such file" in error


@needs_linux
def test_control_characters_in_the_output_name_are_escaped(source):
    """The table shows OUT's name without letting it act on the terminal."""
    assert_safe(run("rewrite", source, "-o", source.with_name("m\x1b[2J.json")).out.decode())


@needs_linux
def test_a_name_that_is_no_utf8_works(source):
    """A folder or file whose name is not valid UTF-8 can be written to."""
    out = os.path.join(os.fsencode(source.parent), b"m\xff.json")  # noqa: PTH118  # bytes
    done = subprocess.run([*COMMAND, "rewrite", source, "-o", out], capture_output=True, check=False)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0


@needs_shell
def test_a_terminal_gets_a_bar(source):
    """On a terminal the progress over the source's bytes is drawn."""
    import pty  # noqa: PLC0415  # POSIX only
    import termios  # noqa: PLC0415  # POSIX only

    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 120))
    with subprocess.Popen([*COMMAND, "rewrite", source], stdout=subprocess.DEVNULL, stderr=child) as process:
        os.close(child)
        drawn = b""
        try:
            while piece := os.read(parent, 4096):
                drawn += piece
        except OSError:  # Linux says so when the other side is closed
            pass
        assert process.wait(HANG_SECONDS) == 0
    os.close(parent)
    assert b"meta_lat.json" in drawn
    assert b"B/s" in drawn


# --- records that cannot be merged -----------------------------------------------------------------------------------


def test_a_record_that_cannot_be_merged_stops_the_run(unmergeable):
    """By default the first such record is an error with its place and the way out, and nothing is written."""
    error = run("rewrite", unmergeable, fails=1).err
    offset = unmergeable.read_bytes().index(b'"b"')
    assert error == (
        f'capmerge: {unmergeable}, byte {offset}, record "b": "caption" is a list, expected a string. '
        "Mend the record, or use --on-error skip to leave such records out and list them.\n"
    )
    assert [path.name for path in unmergeable.parent.iterdir()] == [unmergeable.name]


def test_skipped_records_are_listed_whole(unmergeable):
    """--on-error skip writes the others to OUT and these to OUT.rejects.jsonl with key, reason and record."""
    out = unmergeable.with_name("out.json")
    table = run("rewrite", unmergeable, "-o", out, "--on-error", "skip").out.decode()
    assert_rewritten({key: UNMERGEABLE[key] for key in ("a", "d")}, json.loads(out.read_bytes()))
    assert read_jsonl(unmergeable.with_name("out.json.rejects.jsonl")) == [
        {"key": "b", "reason": '"caption" is a list, expected a string.', "record": UNMERGEABLE["b"]},
        {"key": "c", "reason": "the record is a number, expected an object.", "record": 7},
    ]
    assert "2 records could not be merged" in table
    run("verify", unmergeable, out)


def test_what_cannot_be_merged(tmp_path):
    """Each kind of record that cannot be merged is listed with what was found, and the others are written."""
    kinds = {
        '"caption" is a list': {"caption": ["a"]},
        '"caption" is an object': {"caption": {"a": 1}},
        '"caption" is a number': {"caption": 5},
        '"caption" is true or false': {"caption": True},
        '"tags" is a list': {"tags": ["a"], "caption": "x"},
        '"tags" is a number': {"tags": 1.5},
        "the record is a list": [],
        "the record is a string": "text",
        "the record is null": None,
        '"capmerge_tags"': {"caption": "x", "capmerge_tags": []},
        '"capmerge_weights"': {"caption": "x", "capmerge_weights": []},
    }
    path, out = tmp_path / "m.json", tmp_path / "o.json"
    path.write_bytes(as_indent_2({"first": {"caption": "x"}, **kinds, "last": {"tags": "y"}}))
    run("rewrite", path, "-o", out, "--on-error", "skip")
    assert list(json.loads(out.read_bytes())) == ["first", "last"]
    for (reason, record), entry in zip(kinds.items(), read_jsonl(tmp_path / "o.json.rejects.jsonl"), strict=True):
        assert entry["key"] == reason
        assert reason in entry["reason"]
        assert entry["record"] == record


def test_strays_among_json_lines(tmp_path):
    """A line of JSONL that is no object or has no image_path stops the run, or is listed whole."""
    path, out = tmp_path / "m.jsonl", tmp_path / "o.jsonl"
    strays = [{"caption": "no key"}, [1, "x"], 7, None, {"image_path": 5, "caption": "x"}]
    lines = [json.dumps({"image_path": "a", "caption": "x"}), *map(json.dumps, strays), json.dumps({"image_path": "b", "tags": "y"})]
    path.write_text("\n".join(lines))
    error = run("rewrite", path, "-o", out, fails=1).err
    assert f"m.jsonl, byte {len(lines[0]) + 1}: " in error
    assert '"image_path"' in error
    run("rewrite", path, "-o", out, "--on-error", "skip")
    assert [record["image_path"] for record in read_jsonl(out)] == ["a", "b"]
    rejects = read_jsonl(tmp_path / "o.jsonl.rejects.jsonl")
    assert [entry["record"] for entry in rejects] == strays
    assert all(entry["key"] == "" and entry["reason"] for entry in rejects)
    run("verify", path, out)


def test_rejects_of_standard_output_go_to_standard_error(unmergeable):
    """With `-o -` there is no file for rejects: each is a line on standard error."""
    done = run("rewrite", unmergeable, "-o", "-", "--on-error", "skip", "--quiet")
    assert list(json.loads(done.out)) == ["a", "d"]
    assert done.err.count('"reason"') == 2
    assert [path.name for path in unmergeable.parent.iterdir()] == [unmergeable.name]


def test_rejects_on_standard_error_are_json_lines(unmergeable):
    """Each line on standard error reads back as the reject, and no character of it acts on a terminal."""
    done = run("rewrite", unmergeable, "-o", "-", "--on-error", "skip", "--quiet")
    assert_safe(done.err)
    assert [json.loads(line)["record"] for line in done.err.splitlines()] == [UNMERGEABLE["b"], UNMERGEABLE["c"]]


# --- rewritten records -----------------------------------------------------------------------------------------------


def test_a_rewritten_source_is_refused(source):
    """A file that bears the mark is refused, for its braces would double; --on-error skip does not skip that."""
    once, twice = source.with_name("once.json"), source.with_name("twice.json")
    run("rewrite", source, "-o", once)
    for options in ([], ["--on-error", "skip"]):
        error = run("rewrite", once, "-o", twice, *options, fails=1).err
        assert 'byte 4, record "danbooru/1"' in error
        assert "rewritten already" in error
        assert "--allow-rewritten" in error
    assert not twice.exists()


def test_allow_rewritten_passes_records_through(source):
    """--allow-rewritten leaves marked records as they are, rewrites the others, and counts both."""
    once, mixed, twice = (source.with_name(f"{name}.json") for name in ("once", "mixed", "twice"))
    run("rewrite", source, "-o", once)
    run("rewrite", once, "-o", twice, "--allow-rewritten", "--layout", "concat")
    assert twice.read_bytes() == once.read_bytes()
    records = json.loads(once.read_bytes())
    mixed.write_bytes(as_indent_2({**records, "new": {"tags": "a", "caption": "b"}}))
    done = run("rewrite", mixed, "-o", twice, "--allow-rewritten", "--force")
    assert json.loads(twice.read_bytes()) == {**records, "new": {"caption": "a\nb", "capmerge": "tc"}}
    assert re.search(r"passed through +3\b", done.out.decode())
    assert re.search(r"rewritten before.* 3\b", run("verify", mixed, twice).out.decode())


# --- options end to end ----------------------------------------------------------------------------------------------

BOTH = {"k": {"tags": "long_hair, ^_^", "caption": "One {a|b}\n\nTwo"}}


@pytest.mark.parametrize(
    ("options", "caption", "mark"),
    [
        ([], "long_hair, ^_^\nlong_hair, ^_^\nOne {{a|b}}\nTwo", "ttcc"),
        (["--layout", "lines"], "long_hair, ^_^\nlong_hair, ^_^\nOne {{a|b}}\nTwo", "ttcc"),
        (["--layout", "concat"], "long_hair, ^_^, One {{a|b}}\nlong_hair, ^_^, Two", "bb"),
        (["--layout", "concat-caption-first"], "One {{a|b}}, long_hair, ^_^\nTwo, long_hair, ^_^", "bb"),
        (["--layout", "inline", "--caption-lines", "join"], "long_hair, ^_^\nOne {{a|b}} Two", "tc"),
        (["--line", "{tags}=2", "--line", "x {caption}"], "long_hair, ^_^\n" * 4 + "x One {{a|b}}\nx Two", "ttttcc"),
        (["--line", "{tags}=2", "--line", "x {caption}", "--weights", "field"], "long_hair, ^_^\nx One {{a|b}}\nx Two", "tcc"),
        (["--caption-lines", "join"], "long_hair, ^_^\nOne {{a|b}} Two", "tc"),
        (["--caption-lines", "first"], "long_hair, ^_^\nOne {{a|b}}", "tc"),
        (["--underscores", "space", "--caption-lines", "first"], "long hair, ^_^\nOne {{a|b}}", "tc"),
        (["--caption-wildcards", "--caption-lines", "first"], "long_hair, ^_^\nOne {a|b}", "tc"),
        (["--prefix", "{p} ", "--suffix", " s", "--caption-lines", "first"], "{{p}} long_hair, ^_^ s\n{{p}} One {{a|b}} s", "tc"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_each_option_reaches_the_captions_and_verify(tmp_path, options, caption, mark):
    """Every option of the merge does what the table of options says, is in the receipt, and is proven by verify."""
    path, out = tmp_path / "m.json", tmp_path / "o.json"
    path.write_bytes(as_indent_2(BOTH))
    run("rewrite", path, "-o", out, *options)
    record = json.loads(out.read_bytes())["k"]
    assert record["caption"] == caption
    assert record["capmerge"] == mark
    assert "tags" not in record
    assert ("capmerge_weights" in record) == ("field" in options)
    run("verify", path, out)
    if options:
        (tmp_path / "o.json.capmerge.json").unlink()
        run("verify", path, out, *options)


def test_inline_is_one_line(tmp_path):
    """--layout inline writes one wildcard, and no braces round a single alternative."""
    path, out = tmp_path / "m.json", tmp_path / "o.json"
    path.write_bytes(as_indent_2({"a": {"tags": "t", "caption": "one\ntwo"}, "b": {"tags": "t"}}))
    run("rewrite", path, "-o", out, "--layout", "inline")
    assert {key: record["caption"] for key, record in json.loads(out.read_bytes()).items()} == {"a": "{t|t|one|two}", "b": "t"}
    run("verify", path, out)


def test_field_weights_are_exact(tmp_path):
    """--weights field stores the exact smallest whole numbers, without a limit."""
    path, out = tmp_path / "m.json", tmp_path / "o.json"
    path.write_bytes(as_indent_2({"k": {"tags": "t", "caption": "c"}}))
    run("rewrite", path, "-o", out, "--weights", "field", "--line", "{tags}=2000", "--line", "{caption}=2")
    assert json.loads(out.read_bytes())["k"] == {"caption": "t\nc", "capmerge_weights": [1000, 1], "capmerge": "tc"}
    run("verify", path, out)


def test_max_record_limits_the_longest_record(tmp_path):
    """A record over --max-record is an error that names it and the option; a larger limit reads it."""
    path, out = tmp_path / "m.json", tmp_path / "o.json"
    path.write_bytes(as_indent_2({"a": {"caption": "x"}, "large": {"caption": "x" * 3_000_000}, "z": {"caption": "y"}}))
    error = run("rewrite", path, "-o", out, "--max-record", str(1 << 21), fails=1).err
    assert "--max-record" in error
    assert 'record "large"' in error or "byte 41" in error
    run("rewrite", path, "-o", out)
    assert list(json.loads(out.read_bytes())) == ["a", "large", "z"]


# --- side files ------------------------------------------------------------------------------------------------------


def test_the_receipt_tells_how_the_output_was_made(source):
    """OUT.capmerge.json holds version, options, templates, counts and the source's fingerprint."""
    out = source.with_name("out.json")
    run(
        "rewrite", source, "-o", out, "--line", "{tags}, {caption}=4", "--line", "{caption}", "--underscores", "space", "--on-error", "skip"
    )
    receipt = json.loads(source.with_name("out.json.capmerge.json").read_bytes())
    assert receipt["version"] == capmerge.__version__
    assert receipt["options"]["lines"] == ["{tags}, {caption}=4", "{caption}"]
    assert receipt["options"]["underscores"] == "space"
    assert receipt["options"]["on_error"] == "skip"
    assert receipt["templates"][0] == {"fields": ["tags", "caption"], "literals": ["", ", ", ""], "weight": 4}
    assert receipt["counts"]["records"] == receipt["counts"]["rewritten"] == 3
    assert receipt["source"]["name"] == str(source)
    assert receipt["source"]["bytes"] == source.stat().st_size
    assert len(bytes.fromhex(receipt["source"]["blake2b"])) == 16


def test_the_fingerprint_follows_the_content(source):
    """Another source has another fingerprint; the same one has the same."""
    out = source.with_name("out.json")

    def fingerprint() -> str:
        run("rewrite", source, "-o", out, "--force")
        return json.loads(source.with_name("out.json.capmerge.json").read_bytes())["source"]["blake2b"]

    first = fingerprint()
    assert fingerprint() == first
    source.write_bytes(source.read_bytes().replace(b"no_humans", b"no_human_"))
    assert fingerprint() != first


@pytest.mark.parametrize(
    "name",
    ["out.json", "with space.json", 'quote".json', "😀.json"],
)
@needs_linux
def test_the_dataset_config_is_toml_for_sd_scripts(source, name):
    """OUT.dataset.toml parses, turns wildcards on, and names OUT and its folder."""
    out = source.with_name(name)
    run("rewrite", source, "-o", out)
    config = tomllib.loads(source.with_name(name + ".dataset.toml").read_text(encoding="utf-8"))
    assert config["general"]["enable_wildcard"] is True
    ((subset,),) = ([*dataset["subsets"]] for dataset in config["datasets"])
    assert subset["metadata_file"] == str(out)
    assert subset["image_dir"] == str(out.parent)
    assert config["datasets"][0]["enable_bucket"] is True
    assert config["datasets"][0]["resolution"] >= 128
    assert "cache_text_encoder_outputs" not in json.dumps(config)


def test_a_resolution_beyond_all_bounds_does_not_stop_the_run(source):
    """A train_resolution of absurd size goes through like any other value."""
    source.write_bytes(as_indent_2({"k": {"caption": "c", "train_resolution": [10**200, 10**200]}}))
    done = subprocess.run([*COMMAND, "rewrite", source], capture_output=True, check=False)
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0


# --- verify ----------------------------------------------------------------------------------------------------------


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
    "change", ["missing line", "changed line", "extra line", "no file", "broken line", "other value", "no key", "no text"]
)
def test_verify_reads_the_rejects(unmergeable, change):
    """A record missing in OUT must be whole in OUT.rejects.jsonl, else verify exits 1."""
    out, rejects = unmergeable.with_name("out.json"), unmergeable.with_name("out.json.rejects.jsonl")
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


@pytest.mark.parametrize("command", ["rewrite", "dry run"])
def test_a_deeply_nested_value_goes_through(tmp_path, command):
    """A value as deep as json.load reads it is kept, or refused with a message."""
    path = tmp_path / "m.json"
    path.write_text('{"k": {"caption": "c", "deep": ' + "[" * 600 + "]" * 600 + "}}")
    options = ["--dry-run", "1"] if command == "dry run" else ["-o", "-"]
    done = subprocess.run([*COMMAND, "rewrite", path, *options], capture_output=True, check=False)
    assert b"Traceback" not in done.stderr
    assert done.returncode in (0, 1)


# --- help ------------------------------------------------------------------------------------------------------------

REWRITE_OPTIONS = [
    *("--out", "--format", "--layout", "--line", "--weights", "--caption-lines", "--underscores", "--caption-wildcards", "--prefix"),
    *("--suffix", "--image-size", "--no-image-size", "--on-error", "--allow-rewritten", "--jobs", "--dry-run", "--summary", "--quiet"),
    *("--force", "--max-record"),
]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--help"], ["rewrite", "verify", "--version"]),
        (["rewrite", "--help"], ["SRC", "-o,", "-j,", *REWRITE_OPTIONS]),
        (
            ["verify", "--help"],
            ["SRC", "OUT", "--layout", "--line", "--caption-lines", "--on-error", "--allow-rewritten", "--quiet", "--max-record"],
        ),
    ],
    ids=" ".join,
)
def test_help_names_everything(arguments, named):
    """--help exits 0 and names every command and option."""
    text = run(*arguments, env={**os.environ, "COLUMNS": "200"}).out.decode()
    for name in named:
        assert name in text


def test_the_version_is_printed():
    """--version prints the version alone."""
    assert run("--version").out.decode().strip() == capmerge.__version__


def test_no_command_shows_the_help():
    """`capmerge` alone shows the help and does nothing."""
    done = subprocess.run(COMMAND, capture_output=True, timeout=HANG_SECONDS, check=False)
    assert b"rewrite" in done.stdout + done.stderr


@needs_shell
def test_the_console_script_is_the_module(source):
    """The installed `capmerge` does what `python -m capmerge` does."""
    script = Path(sys.executable).with_name("capmerge")
    if not script.exists():
        pytest.skip("the package is not installed with its script")
    done = subprocess.run([script, "rewrite", source, "-o", "-"], capture_output=True, timeout=HANG_SECONDS, check=True)
    assert done.stdout == run("rewrite", source, "-o", "-").out


def test_json_lines_and_json_give_the_same_output(source):
    """The records decide OUT's bytes, not the kind of SRC."""
    from_lines = run("rewrite", "-", "-o", "-", stdin=as_jsonl(RECORDS)).out
    assert from_lines == run("rewrite", source, "-o", "-").out
