"""Defines the exceptions that mean a user's mistake or a damaged file, never a bug.

    CapmergeError          exit 1
    ├── UsageError         exit 2: the command line asks for something impossible
    ├── DataError          the source's bytes are not what they should be
    │   └── RecordError    one record cannot be merged; `--on-error skip` can leave it out
    ├── OutputError        the output could not be written whole
    │   └── BusyError      another run is writing it
    ├── StaleError         an index or a listing is missing, broken or of other data: make it anew
    └── WorkerError        a worker process ended before its work did

Every message reads: where, what was found, what was expected, the next step. Only `cli` prints and
exits; any other exception is a bug and shows its traceback.
"""

import json


class CapmergeError(Exception):
    """Base of all errors that are shown to the user as one message without a traceback."""

    exit_code = 1


class UsageError(CapmergeError):
    """The options cannot be carried out as given."""

    exit_code = 2


class DataError(CapmergeError):
    """The source is damaged or of another kind than expected.

    >>> str(DataError("m.json", 7, "b/42", "found a list, expected a string.", "Fix it."))
    'm.json, byte 7, record "b/42": found a list, expected a string. Fix it.'
    """

    def __init__(
        self, name: str, offset: int | None, key: str | None, problem: str, next_step: str
    ) -> None:
        super().__init__(name, offset, key, problem, next_step)
        self.name, self.offset, self.key, self.problem, self.next_step = (
            name,
            offset,
            key,
            problem,
            next_step,
        )

    def __str__(self) -> str:
        where = printable(self.name)
        if self.offset is not None:
            where += f", byte {self.offset:,}"
        if self.key is not None:
            where += f", record {quoted(self.key)}"
        return f"{where}: {self.problem} {self.next_step}".rstrip()


class RecordError(DataError):
    """One record that cannot be merged, while the file around it is sound."""


class OutputError(CapmergeError):
    """The output could not be written; nothing half-written is left under its name."""


class BusyError(OutputError):
    """Another run is writing the output at this moment."""


class StaleError(CapmergeError):
    """An index or a listing is missing or broken, or belongs to another version or other metadata.

    It has to be made anew.
    """


class WorkerError(CapmergeError):
    """A worker process ended before its work did."""


def in_words(error: BaseException) -> str:
    """What an error says, without the number and the path that an `OSError` puts around it.

    >>> in_words(FileNotFoundError(2, "No such file or directory", "x"))
    'No such file or directory'
    """
    return (isinstance(error, OSError) and error.strerror) or str(error)


def printable(text: str) -> str:
    r"""`text` with every control character and lone surrogate as an escape, safe for any terminal.

    >>> printable("a\x1b[31m\u2028")
    'a\\x1b[31m\\u2028'
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(
        c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode("ascii")
        for c in text
    )


def quoted(text: str, longest: int = 120) -> str:
    """`text` in double quotes for a message, safe for any terminal.

    At most `longest` characters of it are shown.
    """
    shown = text if len(text) <= longest else text[: longest - 1] + "…"
    return printable(json.dumps(shown, ensure_ascii=False))
