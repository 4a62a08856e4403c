import os
import subprocess

import pytest
from builders.commands import assert_safe, needs_linux, needs_shell
from builders.metadata import COMMAND, HANG_SECONDS, as_indent_2, run

ESCAPES = "\x1b]0;title\x07\x1b[2J\x9b31m\u202e\x00\x7f"


@pytest.mark.parametrize("kind", ["dry run", "error", "skip", "rewritten", "verify"])
def test_control_characters_never_reach_the_terminal(tmp_path, kind):
    """Terminal escapes in keys and text are escaped in errors, --dry-run and rejects."""
    path, out = tmp_path / "m.json", tmp_path / "o.json"
    path.write_bytes(
        as_indent_2(
            {
                f"key{ESCAPES}": {
                    "caption": ESCAPES if kind in ("dry run", "verify") else [ESCAPES],
                    "x": ESCAPES,
                }
            }
        )
    )
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
            out.write_text(
                out.read_text(encoding="utf-8").replace("title", "other"), encoding="utf-8"
            )
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
    done = subprocess.run(
        [*COMMAND, "rewrite", source, "-o", out], capture_output=True, check=False
    )
    assert b"Traceback" not in done.stderr
    assert done.returncode == 0


@needs_shell
def test_a_terminal_gets_a_bar(source):
    """On a terminal a bar shows the progress over the bytes of the source."""
    import pty  # noqa: PLC0415  # POSIX only
    import termios  # noqa: PLC0415  # POSIX only

    parent, child = pty.openpty()
    termios.tcsetwinsize(child, (24, 120))
    with subprocess.Popen(
        [*COMMAND, "rewrite", source], stdout=subprocess.DEVNULL, stderr=child
    ) as process:
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
