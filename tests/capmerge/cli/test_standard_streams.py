import json
import os
import re

import pytest
from builders.commands import RECORDS, needs_linux, needs_shell
from builders.metadata import as_indent_2, assert_rewritten, make_records, run, run_shell


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
    """When the reader of `-o -` has seen enough, nothing is printed."""
    path = tmp_path / "m.json"
    path.write_bytes(as_indent_2(make_records(5000)))
    done = run_shell(
        f'CAPMERGE rewrite "$1" -o - -j {jobs} | {reader}; exit ${{PIPESTATUS[0]}}', path
    )
    assert done.err == ""
    assert done.code == 141


@needs_shell
@pytest.mark.parametrize("arguments", ['-o "$2"', "--dry-run 2"])
def test_a_closed_pipe_behind_the_table_ends_quietly(source, arguments):
    """A reader that is gone before the table or the --dry-run causes no complaint either."""
    out = source.with_name("out.json")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    done = run_shell(
        f'CAPMERGE rewrite "$1" {arguments} | (exec <&-; sleep 1)', source, out, env=environment
    )
    assert done.err == ""


@needs_linux
def test_a_full_device_behind_standard_output_is_an_error(source):
    """`-o - > /dev/full` exits 1 with a message."""
    done = run_shell('CAPMERGE rewrite "$1" -o - > /dev/full', source)
    assert done.code == 1
    assert done.err.startswith("capmerge: standard output: cannot write")


def test_quiet_prints_nothing(source):
    """--quiet leaves both streams empty when all is well."""
    assert run("rewrite", source, "--quiet") == (0, b"", "")
    assert run("verify", source, source.with_name("meta_lat_wildcard.json"), "--quiet") == (
        0,
        b"",
        "",
    )


def test_quiet_still_prints_errors(source):
    """--quiet does not hide an error."""
    source.write_text("[]")
    assert "array" in run("rewrite", source, "--quiet", fails=1).err


def test_no_bar_without_a_terminal(source):
    """Without a terminal there is no progress bar, only the table."""
    done = run("rewrite", source)
    assert done.err == ""
    assert b"%" not in done.out


def test_the_table_and_the_receipt_tell_the_same(source):
    """OUT.capmerge.json holds every count of the table, and none of its timings."""
    table = run("rewrite", source).out.decode()
    out = source.with_name("meta_lat_wildcard.json")
    receipt = json.loads(source.with_name("meta_lat_wildcard.json.capmerge.json").read_bytes())
    numbers = receipt["counts"]
    expected = {
        "records": 3,
        "rewritten": 3,
        "both": 1,
        "tags_only": 1,
        "caption_only": 1,
        "empty": 0,
        "rejected": 0,
        "lines": 4,
        "read_bytes": source.stat().st_size,
        "written_bytes": out.stat().st_size,
    }
    assert {name: numbers[name] for name in expected} == expected
    for by_name in ("lacking_fields", "dropped_tags", "replaced_tags"):
        assert numbers.pop(by_name) == {}
    assert all(isinstance(number, int) for number in numbers.values())
    rows = dict(line.rsplit(maxsplit=1) for line in table.splitlines()[:12])
    assert {name.strip(): value for name, value in rows.items()} | {
        "records": "3",
        "rewritten": "3",
        "tags only": "1",
        "caption only": "1",
        "empty": "0",
        "rejected": "0",
        "lines per record": "1.33",
        "bytes read": f"{numbers['read_bytes']:,}",
        "bytes written": f"{numbers['written_bytes']:,}",
    } == {name.strip(): value for name, value in rows.items()}


def test_the_table_of_standard_output(source):
    """With `-o -` the table goes to standard error and counts the bytes of standard output."""
    done = run("rewrite", source, "-o", "-")
    assert re.search(rf"^bytes written +{len(done.out):,}$", done.err, flags=re.MULTILINE)


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
    """image_size is added to records that have only train_resolution, and the table counts them."""
    assert re.search(r"image_size = train_resolution was added to 1 record\b", note_of(RECORDS))
    assert "image_size" not in note_of(RECORDS, "--no-image-size")


@pytest.mark.parametrize(("paragraphs", "advised"), [(2, True), (1, False)])
def test_paragraphs_in_over_one_percent_advise_join(paragraphs, advised):
    """The advice of --caption-lines join comes above 1 % of the captions, not at 1 %."""
    records = {
        str(i): {"caption": "one\n\ntwo" if i < paragraphs else "one\ntwo"} for i in range(100)
    }
    assert ("--caption-lines join" in note_of(records)) == advised


def test_special_tokens_are_counted_in_any_case():
    """Literal special tokens in tags or caption are reported with the number of records."""
    records = {
        "a": {"caption": "x <|endoftext|>"},
        "b": {"tags": "<|StartOfText|>", "caption": "<|ENDOFTEXT|>"},
        "c": {"caption": "<endoftext>"},
    }
    assert re.search(r"the text of 2 records holds a literal <\|endoftext\|>", note_of(records))
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
    """An output of over twice the input is warned of, but not with --weights field."""
    records = as_indent_2(make_records(200))
    heavy = ["--line", "{tags}=7", "--line", "{caption}=8"]
    warning = run("rewrite", "-", "-o", "-", *heavy, stdin=records).err
    assert "times as large as" in warning
    assert "weights repeat lines. Use --weights field" in warning
    assert (
        "times as large as"
        not in run("rewrite", "-", "-o", "-", *heavy, "--weights", "field", stdin=records).err
    )
    assert "times as large as" not in run("rewrite", "-", "-o", "-", stdin=records).err


@pytest.mark.parametrize(
    ("records", "options", "reason"),
    [
        ({"k": {"tags": "t", "caption": "c"}}, ["--prefix", "p" * 500], "lines and the fields"),
        ({"k": {"tags": "t" * 400, "caption": "a\nb\nc\nd"}}, ["--layout", "concat"], "lines and"),
        ({"k": {}}, [], "lines and the fields"),
        ({"k": {"tags": "t" * 400, "caption": "a\nb\nc\nd"}}, [], "Use --weights field"),
        (
            {"k": {"tags": "t" * 400, "caption": "a\nb\nc\nd"}},
            ["--layout", "inline"],
            "Use --layout lines with --weights field",
        ),
    ],
)
def test_the_warning_names_what_makes_the_output_large(records, options, reason):
    """Repeated lines are blamed, and --weights field advised, only where lines are repeated."""
    source = json.dumps(records, separators=(",", ":")).encode()
    warning = run("rewrite", "-", "-o", "-", *options, stdin=source).err
    assert "times as large as" in warning
    assert reason in warning
    assert ("weights repeat lines" in warning) == ("--weights field" in reason)


def test_quiet_prints_no_warning():
    """--quiet prints errors only, not the warning of a large output."""
    heavy = ["--line", "{tags}=7", "--line", "{caption}=8"]
    assert (
        run("rewrite", "-", "-o", "-", "--quiet", *heavy, stdin=as_indent_2(make_records(200))).err
        == ""
    )
