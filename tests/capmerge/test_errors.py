import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.errors import (
    CapmergeError,
    DataError,
    OutputError,
    RecordError,
    UsageError,
    WorkerError,
    printable,
    quoted,
)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (
            DataError(
                "m.json",
                1204118031,
                "danbooru/42",
                '"caption" is a list, expected a string.',
                "Fix it.",
            ),
            (
                'm.json, byte 1,204,118,031, record "danbooru/42": '
                '"caption" is a list, expected a string. Fix it.'
            ),
        ),
        (DataError("m.json", 0, None, "empty.", "Write {}."), "m.json, byte 0: empty. Write {}."),
        (DataError("m.json", None, "", "no.", ""), 'm.json, record "": no.'),
        (DataError("m.json", None, None, "changed.", "Again."), "m.json: changed. Again."),
    ],
)
def test_messages_say_where_what_and_what_next(error, expected):
    """A message reads: where, what was found, what was expected, the next step."""
    assert str(error) == expected


@pytest.mark.parametrize(
    ("kind", "base", "exit_code"),
    [
        (DataError, CapmergeError, 1),
        (RecordError, DataError, 1),
        (OutputError, CapmergeError, 1),
        (WorkerError, CapmergeError, 1),
        (UsageError, CapmergeError, 2),
    ],
)
def test_the_tree_of_errors(kind, base, exit_code):
    """Every error has its base class and its exit code."""
    assert issubclass(kind, base)
    assert kind.exit_code == exit_code


@pytest.mark.parametrize("kind", [DataError, RecordError])
def test_errors_travel_between_processes(kind):
    """A pickled error is the same error, with the same offset and key."""
    error = kind("m.json", 7, "k\ud800", "found x.", "Fix it.")
    copied = pickle.loads(pickle.dumps(error))
    assert type(copied) is kind
    assert str(copied) == str(error)
    assert (copied.offset, copied.key) == (7, "k\ud800")


@given(st.text(st.characters()))
@settings(max_examples=200, deadline=None)
def test_printable_text_is_safe_for_a_terminal(text):
    """No control character and no lone surrogate reaches a terminal."""
    shown = printable(text)
    shown.encode("utf-8")
    assert shown.isprintable()


def test_printable_keeps_what_can_be_shown():
    """Letters of every script stay, while control characters and separators become escapes."""
    assert printable("é 日本 😀") == "é 日本 😀"
    assert printable("a\x1b[31m\u2028\ud800\n") == "a\\x1b[31m\\u2028\\ud800\\n"


def test_quoted_text_is_short():
    """A long text is cut with an ellipsis; quotes and backslashes inside are escaped."""
    assert quoted('a"b\\') == '"a\\"b\\\\"'
    assert quoted("x" * 500) == '"' + "x" * 119 + '…"'
    assert quoted("x" * 120) == '"' + "x" * 120 + '"'
