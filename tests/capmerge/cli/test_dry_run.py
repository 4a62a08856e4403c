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
    done = subprocess.run(
        [*COMMAND, "rewrite", source, "--dry-run", "1"],
        capture_output=True,
        env=environment,
        check=False,
    )
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0
