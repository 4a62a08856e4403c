import io
import sys

import pytest
import tqdm
from builders.metadata import as_indent_2

from capmerge.errors import DataError, UsageError
from capmerge.files.source import open_source
from capmerge.terminal import (
    count_bar,
    errors_as_exit_codes,
    make_streams_safe,
    progress_bar,
)


class Terminal(io.StringIO):
    """A text stream that claims to be a terminal."""

    def isatty(self):
        """True, as for a terminal."""
        return True


def end_of(error, program):
    """The exit code that an error ends with."""
    with pytest.raises(SystemExit) as end, errors_as_exit_codes(program):
        raise error
    return end.value.code


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("give a file."), 2, "give a file.\n"),
        (DataError("m.json", 3, None, "it is broken.", "Mend it."), 1, "m.json, byte 3: "),
    ],
)
def test_a_users_mistake_is_a_message_and_a_code(capsys, error, code, said):
    """An error message begins with the program's name in capmerge, but not in the trainer."""
    assert end_of(error, "capmerge") == code
    assert capsys.readouterr().err.startswith(f"capmerge: {said}")
    assert end_of(error, None) == code
    assert capsys.readouterr().err.startswith(said)


def test_an_interrupt_is_130(capsys):
    """The program capmerge adds that nothing was written; a trainer's run has saved files."""
    assert end_of(KeyboardInterrupt(), "capmerge") == 130
    assert capsys.readouterr().err == "capmerge: interrupted; no file was written.\n"
    assert end_of(KeyboardInterrupt(), None) == 130
    assert capsys.readouterr().err == "interrupted.\n"


def test_an_error_of_the_system(capsys):
    """An `OSError` is one line in capmerge, and keeps its traceback in the trainer."""
    error = OSError(28, "No space left on device", "out.json")
    assert end_of(error, "capmerge") == 1
    said = "capmerge: out.json: No space left on device. Check the disk or the device.\n"
    assert capsys.readouterr().err == said
    with pytest.raises(OSError, match="No space left"), errors_as_exit_codes(None):
        raise error


@pytest.mark.parametrize("program", ["capmerge", None])
def test_a_bug_goes_on(program):
    """Any other exception is not caught."""
    with pytest.raises(KeyError), errors_as_exit_codes(program):
        raise KeyError


def test_safe_streams_write_every_character(monkeypatch):
    """A character that the encoding of the terminal lacks is written as an escape."""
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    make_streams_safe()
    print("é \ud800", flush=True)
    print("猫", file=sys.stderr, flush=True)
    assert sys.stdout.buffer.getvalue().split() == [b"\\xe9", b"\\ud800"]
    assert sys.stderr.buffer.getvalue().split() == [b"\\u732b"]


def test_safe_streams_may_be_missing(monkeypatch):
    """A program starts even if its streams are closed."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    make_streams_safe()
    sys.stderr.close()


@pytest.fixture
def source(tmp_path):
    """A source of some bytes."""
    path = tmp_path / "m.json"
    path.write_bytes(as_indent_2({"a": {"tags": "x" * 1000}}))
    with open_source(str(path)) as source:
        yield source


def test_bars_are_drawn_on_a_terminal(monkeypatch, source, tmp_path):
    """A bar shows its name and unit, and starts no thread: workers may be forked later."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    with progress_bar(source) as progress:
        assert terminal.getvalue() == ""  # nothing to show yet
        progress(source.total_bytes // 2)
    assert "m.json:" in terminal.getvalue()
    assert "kB/s]" in terminal.getvalue() or "B/s]" in terminal.getvalue()
    with count_bar(tmp_path) as progress:
        progress(3)
    assert f"{tmp_path.name}:" in terminal.getvalue()
    assert " files" in terminal.getvalue()
    assert tqdm.tqdm.monitor is None


def test_no_bar_when_quiet_or_redirected(monkeypatch, source, tmp_path):
    """No bar and no function are given with --quiet, or where stderr is not a terminal."""
    monkeypatch.setattr(sys, "stderr", terminal := Terminal())
    for bar in (progress_bar(source, quiet=True), count_bar(tmp_path, quiet=True)):
        with bar as progress:
            assert progress is None
    assert terminal.getvalue() == ""
    monkeypatch.setattr(sys, "stderr", redirected := io.StringIO())
    with progress_bar(source) as progress:
        assert progress is None
    assert redirected.getvalue() == ""
