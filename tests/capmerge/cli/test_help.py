import os
import subprocess
import sys
from pathlib import Path

import pytest
from builders.commands import RECORDS, needs_shell
from builders.metadata import COMMAND, HANG_SECONDS, as_jsonl, run

import capmerge

REWRITE_OPTIONS = [
    *(
        "--out",
        "--format",
        "--layout",
        "--line",
        "--weights",
        "--caption-lines",
        "--underscores",
        "--caption-wildcards",
        "--prefix",
    ),
    *(
        "--suffix",
        "--image-size",
        "--no-image-size",
        "--on-error",
        "--allow-rewritten",
        "--jobs",
        "--dry-run",
        "--quiet",
    ),
    *("--force", "--max-record"),
]


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--help"], ["rewrite", "verify", "--version"]),
        (["rewrite", "--help"], ["SRC", "-o,", "-j,", *REWRITE_OPTIONS]),
        (
            ["verify", "--help"],
            [
                "SRC",
                "OUT",
                "--layout",
                "--line",
                "--caption-lines",
                "--on-error",
                "--allow-rewritten",
                "--quiet",
                "--max-record",
            ],
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
    done = subprocess.run(
        [script, "rewrite", source, "-o", "-"],
        capture_output=True,
        timeout=HANG_SECONDS,
        check=True,
    )
    assert done.stdout == run("rewrite", source, "-o", "-").out


def test_json_lines_and_json_give_the_same_output(source):
    """The records decide OUT's bytes, not the kind of SRC."""
    from_lines = run("rewrite", "-", "-o", "-", stdin=as_jsonl(RECORDS)).out
    assert from_lines == run("rewrite", source, "-o", "-").out


def test_descriptions_of_commands_are_never_cut():
    """In a narrow terminal they are wrapped, and no "..." hides their end."""
    done = run("--help", env={**os.environ, "COLUMNS": "40"})
    shown = done.out.decode()
    assert "..." not in shown.partition("Commands:")[2]
    assert "caption lines." in " ".join(shown.split())


def test_completion_completes_commands():
    """A shell that asks for completions of `st` is told `stats`, and scripts are printed."""
    asked = {"_CAPMERGE_COMPLETE": "complete_bash", "COMP_WORDS": "capmerge st", "COMP_CWORD": "1"}
    assert run(env={**os.environ, **asked}).out.decode().split() == ["stats"]
    script = run(env={**os.environ, "_CAPMERGE_COMPLETE": "source_bash"}).out
    assert b"_capmerge_completion" in script
    assert b"--install-completion" in run("--help").out
