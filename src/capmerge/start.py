"""The imports of both programs, in which Ctrl-C and a missing package are messages, no tracebacks.

A program enters `importing` in its first lines, so this module imports next to nothing itself.
"""

import os
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

_OURS = ("capmerge", "trainer")


@contextmanager
def importing(prefix: str, wanted: str) -> Iterator[None]:
    """A context for imports alone, in which messages begin with `prefix`.

    Ctrl-C ends the process at once with exit code 130: an exception would be lost, or shown with
    its traceback, where Python's own import code calls ours. A package that is missing ends it
    with exit code 2 and the advice to `pip install` what is `wanted`.
    """

    def interrupted(_signal: int, _frame: FrameType | None) -> None:
        if sys.stderr is not None:
            os.write(sys.stderr.fileno(), f"{prefix}interrupted.\n".encode())
        os._exit(130)

    before = signal.getsignal(signal.SIGINT)
    takes_over = before is signal.default_int_handler
    try:
        if takes_over:
            signal.signal(signal.SIGINT, interrupted)
    except ValueError:  # only the main thread may, and only it gets a KeyboardInterrupt
        takes_over = False
    try:
        with warnings.catch_warnings():
            # Typer imports names that click is going to remove; pyproject.toml bounds click.
            warnings.filterwarnings("ignore", "'click", DeprecationWarning)
            yield
    except ImportError as error:
        message = missing_package(error, wanted)
        if message is None:
            raise
        if sys.stderr is not None:
            print(f"{prefix}{message}", file=sys.stderr)
        raise SystemExit(2) from None
    finally:
        if takes_over:
            signal.signal(signal.SIGINT, before)


def missing_package(error: ImportError, wanted: str) -> str | None:
    """The message for a package that cannot be imported; None when it is ours, which is a bug."""
    package = (error.name or "").partition(".")[0]
    if package in _OURS or (not package and _raised_by_us(error.__traceback__)):
        return None
    named = f"the package {package}" if package else "a package"
    return (
        f"{named} cannot be imported ({error}), expected it to be installed. "
        f"Install what is missing: pip install {wanted}"
    )


def _raised_by_us(trace: TracebackType | None) -> bool:
    """True when the innermost frame of a traceback is in one of our packages."""
    module = ""
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        trace = trace.tb_next
    return module.partition(".")[0] in _OURS
