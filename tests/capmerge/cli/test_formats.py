import gzip
import json
import sys
from pathlib import Path

import pytest
from builders.metadata import (
    LAYOUTS,
    TEMPORARY_ENDING,
    as_compact,
    as_indent_2,
    as_jsonl,
    assert_rewritten,
    make_records,
    read_jsonl,
    run,
    run_shell,
)

from capmerge.files.compression import compress, without_compression
from capmerge.files.source import open_source

RECORDS = make_records(60)
needs_shell = pytest.mark.skipif(sys.platform == "win32", reason="the test is written for bash")


def unpacked(path: Path) -> bytes:
    """The bytes of a file, which is compressed as its ending says."""
    with open_source(str(path)) as source:
        assert (source.path is None) == (path.suffix in (".gz", ".zst"))
        return source.window(0, 1 << 30)


def records_of(path: Path) -> dict:
    """The records of an output, by the ending of its name."""
    data = unpacked(path)
    path = without_compression(path)
    if path.suffix != ".jsonl":
        return json.loads(data)
    lines = [json.loads(line) for line in data.decode().split("\n")[:-1]]
    assert data.endswith(b"}\n")
    assert all(next(iter(line)) == "image_path" for line in lines)
    return {line.pop("image_path"): line for line in lines}


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        *((layout, "out.json") for layout in LAYOUTS),
        ("jsonl", "out.jsonl"),
        ("indent=4", "out.jsonl"),
        ("compact", "out.json.gz"),
        ("jsonl", "out.jsonl.gz"),
        ("indent=2", "out.json.zst"),
        ("compact", "out.jsonl.zst"),
    ],
)
def test_every_kind_of_source_and_output(tmp_path, layout, name):
    """Any layout of SRC gives the same records in any kind of OUT, and verify proves it."""
    source, out = tmp_path / "m.json", tmp_path / name
    source.write_bytes(LAYOUTS[layout](RECORDS))
    run("rewrite", source, "-o", out)
    assert_rewritten(RECORDS, records_of(out))
    run("verify", source, out)


@pytest.mark.parametrize(
    ("name", "layout", "compression"),
    [
        ("m.json", "jsonl", ""),
        ("m.jsonl", "indent=2", ""),
        ("m.json.gz", "indent=2", ""),
        ("m.json", "indent=2", "gz"),
        ("m.txt", "jsonl", "gz"),
        ("m.json.gz", "jsonl", "zst"),
        ("m.zst", "indent=2", "gz"),
        ("m", "compact", ""),
    ],
)
def test_the_source_is_told_by_its_content(tmp_path, name, layout, compression):
    """A compressed file is known by its magic and JSONL by its first line, never by the name."""
    source, out = tmp_path / name, tmp_path / "out.json"
    data = LAYOUTS[layout](RECORDS)
    source.write_bytes(compress(data, compression))
    run("rewrite", source, "-o", out)
    assert_rewritten(RECORDS, json.loads(out.read_bytes()))


@pytest.mark.parametrize(
    ("name", "format_name"),
    [
        ("out", "json"),
        ("out.txt", "json"),
        ("out.jsonl", "jsonl"),
        ("out.JSONL", "jsonl"),
        ("out.json.gz", "json.gz"),
        ("out.gz", "json.gz"),
        ("out.json.zst", "json.zst"),
        ("out.ZST", "json.zst"),
    ],
)
def test_the_format_may_be_given(tmp_path, name, format_name):
    """--format that agrees with OUT's ending, or with an ending that says nothing, is taken."""
    source, out = tmp_path / "m.json", tmp_path / name
    source.write_bytes(as_indent_2(RECORDS))
    run("rewrite", source, "-o", out, "--format", format_name)
    with open_source(str(out)) as found:
        data = found.window(0, 1 << 20)
    assert data.startswith(b'{"image_path":' if format_name == "jsonl" else b'{\n  "danbooru/')


@pytest.mark.parametrize(
    "format_name", ["json", "jsonl", "json.gz", "jsonl.gz", "json.zst", "jsonl.zst"]
)
def test_standard_output_has_the_format_asked_for(tmp_path, format_name):
    """`-o - --format F` writes the bytes that a file of that format holds."""
    source, out = tmp_path / "m.json", tmp_path / f"out.{format_name}"
    source.write_bytes(as_indent_2(RECORDS))
    run("rewrite", source, "-o", out)
    assert run("rewrite", source, "-o", "-", "--format", format_name).out == out.read_bytes()


def test_json_output_is_laid_out_as_the_standard_library_does(tmp_path):
    r"""OUT as JSON is indent=2 in raw UTF-8, with \uXXXX only where UTF-8 or JSON need it."""
    records = {
        "猫/1": {"caption": "猫 café 😀", "tags": "a", "list": [1, [], {}], "line": "\u2028\x00\t"},
        "half": {"caption": "\ud83d", "\udc00": 1},
    }
    out = tmp_path / "out.json"
    run("rewrite", "-", "-o", out, stdin=as_indent_2(records))
    text = (
        json.dumps(json.loads(out.read_bytes()), indent=2, ensure_ascii=False)
        .replace("\ud83d", "\\ud83d")
        .replace("\udc00", "\\udc00")
    )
    assert out.read_bytes() == text.encode()
    assert_rewritten(records, json.loads(out.read_bytes()))


def test_json_lines_hold_the_key_first_and_every_value(tmp_path):
    """OUT as JSONL has image_path first, and keeps NaN, wide integers and lone surrogates."""
    records = {
        "a": {"z": 1, "caption": "c", "wide": 2**70, "nan": float("nan"), "half": "\ud83d"},
        "": {"tags": "t"},
    }
    out = tmp_path / "out.jsonl"
    run("rewrite", "-", "-o", out, stdin=as_indent_2(records))
    first, second = read_jsonl(out)
    assert list(first) == ["image_path", "z", "caption", "wide", "nan", "half", "capmerge"]
    assert first["image_path"] == "a"
    assert first["wide"] == 2**70
    assert first["half"] == "\ud83d"
    assert second == {"image_path": "", "caption": "t", "capmerge": "t"}


def test_image_path_in_a_record_is_an_error_in_json_lines(tmp_path):
    """A record with image_path stops a JSONL run or is left out; in JSON it is written."""
    records = {"a": {"caption": "x"}, "b": {"caption": "y", "image_path": "z"}}
    source, out = tmp_path / "m.json", tmp_path / "out.jsonl"
    source.write_bytes(as_indent_2(records))
    error = run("rewrite", source, "-o", out, fails=1).err
    assert 'record "b"' in error
    assert '"image_path"' in error
    run("rewrite", source, "-o", out, "--on-error", "skip")
    assert [entry["record"] for entry in read_jsonl(tmp_path / "out.jsonl.rejects.jsonl")] == [
        records["b"]
    ]
    run("verify", source, out)
    run("rewrite", source, "-o", tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_bytes())["b"]["image_path"] == "z"


@pytest.mark.parametrize(
    "text",
    [
        (
            b'\n \r\n{"image_path": "a", "caption": "x"}\n'
            b'\n  \n{"image_path": "b", "caption": "y"}\n\n'
        ),
        b'{"image_path": "a", "caption": "x"}\r\n{"image_path": "b", "caption": "y"}\r\n',
        b'{"image_path": "a", "caption": "x"}\n{"image_path": "b", "caption": "y"}',
        b'\xef\xbb\xbf{"image_path": "a", "caption": "x"}\n{"caption": "y", "image_path": "b"}\n',
    ],
    ids=["blank lines", "CRLF", "no last line break", "BOM"],
)
def test_spellings_of_json_lines(text):
    """Blank lines, CRLF, a missing last line break and a BOM do no harm to JSONL."""
    done = run("rewrite", "-", "-o", "-", stdin=text)
    assert json.loads(done.out) == {
        "a": {"caption": "x", "capmerge": "c"},
        "b": {"caption": "y", "capmerge": "c"},
    }


def test_one_line_of_json_lines_is_json_lines():
    """One record with image_path is JSONL; an object that holds one under another key is not."""
    assert json.loads(
        run("rewrite", "-", "-o", "-", stdin=b'{"image_path": "a", "caption": "x"}').out
    ) == {"a": {"caption": "x", "capmerge": "c"}}
    assert json.loads(
        run("rewrite", "-", "-o", "-", stdin=b'{"image_path": {"caption": "x"}}').out
    ) == {"image_path": {"caption": "x", "capmerge": "c"}}


@pytest.mark.parametrize("layout", ["indent=2", "compact"])
def test_a_byte_order_mark_is_accepted(tmp_path, layout):
    """A UTF-8 BOM before the object is skipped, and not written."""
    source, out = tmp_path / "m.json", tmp_path / "out.json"
    source.write_bytes(b"\xef\xbb\xbf" + LAYOUTS[layout](RECORDS))
    run("rewrite", source, "-o", out)
    assert_rewritten(RECORDS, json.loads(out.read_bytes()))
    run("verify", source, out)


@pytest.mark.parametrize("text", [b"{}", b" {\n}\n", b"\xef\xbb\xbf{ }"])
def test_an_empty_object_gives_an_empty_object(tmp_path, text):
    """`{}` is a file of no records, and so is its output."""
    source, out = tmp_path / "m.json", tmp_path / "out.json"
    source.write_bytes(text)
    run("rewrite", source, "-o", out)
    assert out.read_bytes() == b"{}"
    run("verify", source, out)


@pytest.mark.parametrize("name", ["out.json.gz", "out.jsonl", "out.jsonl.gz", "out.json.zst"])
def test_an_empty_object_in_other_formats(tmp_path, name):
    """No records are `{}` in JSON and no bytes in JSONL, and verify accepts that."""
    source, out = tmp_path / "m.json", tmp_path / name
    source.write_bytes(b"{}")
    run("rewrite", source, "-o", out)
    assert unpacked(out) == (b"" if "jsonl" in name else b"{}")
    run("verify", source, out)


@pytest.mark.parametrize("layout", ["indent=2", "compact"])
def test_a_repeated_key_reads_back_as_the_source_does(tmp_path, layout):
    """json.load gives the same record for a repeated key before and after; verify agrees."""
    records = {"a": {"caption": "one"}, "b": {"tags": "two"}, "c": {"caption": "three"}}
    source, out = tmp_path / "m.json", tmp_path / "out.json"
    source.write_bytes(LAYOUTS[layout](records).replace(b'"c"', b'"a"'))
    run("rewrite", source, "-o", out)
    assert_rewritten(json.loads(source.read_bytes()), json.loads(out.read_bytes()))
    run("verify", source, out)


def test_values_are_kept_as_json_load_reads_them(tmp_path):
    """All values come back the same: numbers, signs of zero, NaN, surrogates, nested objects."""
    text = (
        '{"": {"caption": "c", "": "", "wide": 18446744073709551616, '
        '"minus": -9223372036854775809, '
        '"zero": -0.0, "large": 1e300,'
        '"over": 1e400, "nan": NaN, '
        '"inf": -Infinity, "half \\ud83d": "\\udc00", '
        '"pair": "\\ud83d\\ude00", "deep": {"a": [{"b": 1.0}, 1]},'
        '"exp": 1E2, "long": 0.1000000000000000055511151231257827, '
        '"yes": true, "no": null, "nul": "\\u0000"}}'
    )
    source, out = tmp_path / "m.json", tmp_path / "out.json"
    source.write_text(text)
    run("rewrite", source, "-o", out)
    assert_rewritten(json.loads(text), json.loads(out.read_bytes()))
    run("verify", source, out)


@pytest.mark.parametrize("layout", ["compact", "indent=2", "jsonl"])
def test_a_gzip_of_several_members_is_read_whole(tmp_path, layout):
    """Gzip members in a row, as our own output has them, are read as one file."""
    data = LAYOUTS[layout](RECORDS)
    source = tmp_path / "m.gz"
    source.write_bytes(gzip.compress(data[:1000]) + gzip.compress(data[1000:]))
    assert_rewritten(RECORDS, json.loads(run("rewrite", source, "-o", "-").out))


@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_our_compressed_output_can_be_read_again(tmp_path, ending):
    """With --allow-rewritten a compressed OUT is passed through with the same bytes."""
    first, second = tmp_path / f"a.json.{ending}", tmp_path / f"b.json.{ending}"
    run("rewrite", "-", "-o", first, stdin=as_indent_2(RECORDS))
    run("rewrite", first, "-o", second, "--allow-rewritten")
    assert unpacked(first) == unpacked(second)


@needs_shell
@pytest.mark.parametrize(
    "script",
    [
        'CAPMERGE rewrite <(cat "$1") -o -',
        'CAPMERGE rewrite <(gzip -c "$1") -o -',
        'CAPMERGE rewrite - -o - < "$1"',
    ],
)
def test_pipes_and_redirections(tmp_path, script):
    """A named pipe, compressed or not, and a redirected file are read like SRC itself."""
    source = tmp_path / "m.json"
    source.write_bytes(as_compact(RECORDS))
    done = run_shell(script, source)
    assert done.code == 0, done.err
    assert_rewritten(RECORDS, json.loads(done.out))


def test_nothing_hidden_stays(tmp_path):
    """A finished run leaves no temporary file in the folder, whatever it wrote."""
    run(
        "rewrite",
        "-",
        "-o",
        tmp_path / "out.jsonl.gz",
        "--on-error",
        "skip",
        stdin=as_jsonl({"a": {"caption": "x"}, "b": {"caption": 1}}),
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [
        "out.jsonl.gz",
        *(
            f"out.jsonl.gz{suffix}"
            for suffix in (".capmerge.json", ".dataset.toml", ".rejects.jsonl")
        ),
    ]
    assert not any(name.endswith(TEMPORARY_ENDING) for name in names)
