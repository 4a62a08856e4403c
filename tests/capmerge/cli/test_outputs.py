import json
import subprocess

import pytest
from builders.commands import RECORDS, needs_shell
from builders.metadata import COMMAND, as_indent_2, assert_rewritten, read_jsonl, run, run_shell

import capmerge


def test_the_default_output_lies_beside_the_source(source):
    """Without -o, OUT is `<stem>_wildcard.json` in the folder of SRC, with its two side files."""
    run("rewrite", source)
    names = {path.name for path in source.parent.iterdir()} - {source.name}
    assert names == {
        "meta_lat_wildcard.json",
        "meta_lat_wildcard.json.capmerge.json",
        "meta_lat_wildcard.json.dataset.toml",
    }
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
    """Side files without OUT are of an earlier run, and are replaced."""
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
    done = subprocess.run(
        [*COMMAND, "rewrite", path, "-o", path, "--force", "--allow-rewritten"],
        capture_output=True,
        check=False,
    )
    assert path.read_bytes() == before
    assert done.returncode == 2


@needs_shell
def test_the_output_is_never_the_file_on_standard_input(source):
    """OUT = SRC is refused for `- < SRC -o SRC --force` too."""
    before = source.read_bytes()
    run_shell('CAPMERGE rewrite - -o "$1" --force < "$1"', source)
    assert source.read_bytes() == before


@pytest.mark.parametrize("ending", [".rejects.jsonl", ".capmerge.json", ".dataset.toml"])
def test_a_side_file_never_replaces_the_source(tmp_path, ending):
    """A source with the name of a side file of OUT is kept, and the run exits 2."""
    path = tmp_path / f"out.json{ending}"
    path.write_bytes(as_indent_2(RECORDS))
    done = subprocess.run(
        [*COMMAND, "rewrite", path, "-o", tmp_path / "out.json"], capture_output=True, check=False
    )
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
