"""Exit codes, safe standard streams and progress bars of both programs."""

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Never

from capmerge.errors import CapmergeError, printable
from capmerge.files.source import Source
from capmerge.start import missing_package

if TYPE_CHECKING:
    from tqdm import tqdm


@contextmanager
def errors_as_exit_codes(program: str | None = "capmerge") -> Iterator[None]:
    """Exit with one message and an exit code on a user's mistake; a bug keeps its traceback.

    The exit codes are those of `capmerge.errors`, 130 for Ctrl-C and 141 for a closed pipe. Each
    message begins with `program`. The trainer passes None: it prints no name, and its `OSError`s
    keep their traceback, since the libraries under it raise them for mistakes of any kind.
    """
    prefix = f"{program}: " if program else ""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()  # otherwise a closed pipe would be noticed only after this function
    except CapmergeError as error:
        print(f"{prefix}{error}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None
    except ImportError as error:
        message = missing_package(error, "capmerge" if program else "'capmerge[train]'")
        if message is None:
            raise
        print(f"{prefix}{message}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print(
            f"{prefix}interrupted; no file was written." if program else "interrupted.",
            file=sys.stderr,
        )
        raise SystemExit(130) from None
    except BrokenPipeError:
        # The reader has seen enough. Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
    except OSError as error:
        if program is None:
            raise
        # No library function foresaw it: the terminal's device is full, or a disk is gone.
        where = error.filename or "standard output"
        print(f"{prefix}{where}: {error.strerror}. Check the disk or the device.", file=sys.stderr)
        raise SystemExit(1) from None


def make_streams_safe() -> None:
    """Make the standard streams write characters that their encoding lacks as escapes.

    A descriptor that is closed leads to nowhere from here on: otherwise the next file that is
    opened would take its number, and get what libraries write to standard error.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # it takes the lowest number that is free: this one
    if sys.stderr is None:  # print() would take None for standard output
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115  # until the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def warn(message: str) -> None:
    """Print a line to standard error, behind the name of the program."""
    print(f"capmerge: {message}", file=sys.stderr)


@contextmanager
def progress_bar(source: Source, *, quiet: bool = False) -> Iterator[Callable[[int], None] | None]:
    """Show a bar over the bytes of the source; yields a function that takes the offset done so far.

    Yields None with `quiet` or without a terminal, as `count_bar` does.
    """
    name = Path(source.name).name
    with _bar(name, "B", source.total_bytes, quiet=quiet) as progress:
        yield progress and (lambda offset: progress(source.read_bytes(offset)))


@contextmanager
def count_bar(folder: Path, *, quiet: bool = False) -> Iterator[Callable[[int], None] | None]:
    """Show a count of the files in `folder`; yields a function that takes their number so far."""
    with _bar(folder.name, " files", None, quiet=quiet) as progress:
        yield progress


@contextmanager
def shard_bar(
    name: str, shards: int, *, quiet: bool = False
) -> Iterator[Callable[[int], None] | None]:
    """Show a bar over the shards of `name`; yields a function that takes the number done so far."""
    with _bar(name, " shards", shards, quiet=quiet) as progress:
        yield progress


@contextmanager
def _bar(
    name: str, unit: str, total: int | None, *, quiet: bool
) -> Iterator[Callable[[int], None] | None]:
    """Show a bar from the first progress on, on a terminal only.

    Yields a function that takes the total done so far, or None if there is no bar.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    bar: tqdm[Never] | None = None

    def progress(done: int) -> None:
        nonlocal bar
        bar = bar or _new_bar(name, unit, total)
        bar.update(done - bar.n)

    try:
        yield progress
    finally:
        if bar is not None:
            bar.close()


def _new_bar(name: str, unit: str, total: int | None) -> "tqdm[Never]":
    from tqdm import tqdm  # takes 50 ms to import

    tqdm.monitor_interval = 0  # its thread must not run when workers are forked
    return tqdm(
        total=total,
        unit=unit,
        unit_scale=True,
        desc=printable(name),
        leave=False,
        mininterval=0.2,
    )
