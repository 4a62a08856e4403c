import os
import subprocess

from builders.metadata import COMMAND, as_indent_2, run


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


def test_a_dry_run_counts_tokens_with_the_tokenizer_that_is_named(source):
    """--dry-run shows tokens, so --family and --tokenizer need neither --fit nor --stats."""
    text = run("rewrite", source, "--dry-run", "1", "--family", "flux").out.decode()
    assert "T5" in text
    assert (
        "none: no such file"
        in run(
            "rewrite", source, "--dry-run", "1", "--tokenizer", "none", cwd=source.parent, fails=2
        ).err
    )


def test_a_dry_run_of_more_than_there_is(source):
    """--dry-run N with fewer than N records prints them all, even when OUT exists."""
    run("rewrite", source)
    assert run("rewrite", source, "--dry-run", "99").out.decode().count("before:") == 3


def test_a_dry_run_shows_what_cannot_be_merged(unmergeable):
    """--dry-run goes on after a record that cannot be merged, and says why it cannot."""
    text = run("rewrite", unmergeable, "--dry-run", "9").out.decode()
    assert '"caption" is a list, expected a string.' in text
    assert "the record is a number, expected an object." in text
    assert text.count("after:") == 2
    assert text.count("cannot be merged:") == 2


def test_a_dry_run_says_what_would_stop_the_run(source, unmergeable):
    """Records that stop a rewrite are counted at the end, unless an option lets them through."""
    out = source.with_name("out.json")
    run("rewrite", source, "-o", out)
    done = run("rewrite", out, "--dry-run", "9")
    assert done.out.decode().count("already rewritten, shown as it is:") == 3
    assert "a rewrite stops at a record that is already rewritten (3 above)" in done.err
    assert run("rewrite", out, "--dry-run", "9", "--allow-rewritten").err == ""
    stopped = run("rewrite", unmergeable, "--dry-run", "9").err
    assert "a rewrite stops at a record that cannot be merged (2 above)" in stopped
    assert run("rewrite", unmergeable, "--dry-run", "9", "--on-error", "skip").err == ""


def test_a_dry_run_knows_the_format_that_is_written(source):
    """A record with a field that JSONL reserves can be merged into JSON, not into JSONL."""
    source.write_bytes(as_indent_2({"k": {"caption": "c", "image_path": "elsewhere.png"}}))
    lines = run("rewrite", source, "--dry-run", "1", "--format", "jsonl").out.decode()
    assert 'cannot be merged: found a field "image_path"' in lines
    assert "after:" in run("rewrite", source, "--dry-run", "1").out.decode()


def test_a_dry_run_shows_what_clip_sees(source):
    """Each alternative is shown with its style, probability and tokens, as in `preview`."""
    shown = run("rewrite", source, "--dry-run", "1", "--fit", "5", "drop").out.decode()
    assert shown == run("preview", source, "-n", "1", "--fit", "5", "drop").out.decode()
    assert "1. tags, 100.00%: 4 tokens in 1 chunk" in shown
    assert "left out by --fit: caption" in shown


def test_a_dry_run_under_a_narrow_encoding(source):
    """Characters that standard output's encoding lacks are shown as escapes."""
    source.write_bytes(as_indent_2({"k": {"caption": "日本"}}))
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252"}
    done = subprocess.run(
        [*COMMAND, "rewrite", source, "--dry-run", "1"],
        capture_output=True,
        env=environment,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0
