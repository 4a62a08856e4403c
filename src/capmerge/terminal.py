"""What every command of the command line shares: options, errors as exit codes, the progress bar."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import typer

from capmerge.errors import CapmergeError, printable
from capmerge.files.source import Source


@contextmanager
def errors_as_exit_codes() -> Iterator[None]:
    """A user's mistake ends with one message and its exit code; a bug goes on with its traceback."""
    try:
        yield
        if sys.stdout is not None:
            sys.stdout.flush()  # else a closed pipe would be noticed behind this function only
    except CapmergeError as error:
        print(f"capmerge: {error}", file=sys.stderr)
        raise typer.Exit(error.exit_code) from None
    except KeyboardInterrupt:
        print("capmerge: interrupted; no file was written.", file=sys.stderr)
        raise typer.Exit(130) from None
    except BrokenPipeError:
        # The reader has seen enough. Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise typer.Exit(141) from None
    except (
        OSError
    ) as error:  # what no library function foresaw: the terminal's device is full, a disk is gone
        print(
            f"capmerge: {error.filename or 'standard output'}: {error.strerror}. Check the disk or the device.",
            file=sys.stderr,
        )
        raise typer.Exit(1) from None


def cores() -> int:
    """The processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def warn(message: str) -> None:
    """Print a line to standard error."""
    print(f"capmerge: {message}", file=sys.stderr)


@contextmanager
def count_bar(folder: Path, *, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """A count of the files seen in `folder`; yields what to call with their number.

    Yields None when `quiet` or without a terminal: then there is no count.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm

    with tqdm(
        unit=" files", unit_scale=True, desc=printable(folder.name), leave=False, mininterval=0.2
    ) as bar:

        def progress(files: int) -> None:
            bar.update(files - bar.n)

        yield progress


@contextmanager
def progress_bar(source: Source, *, quiet: bool) -> Iterator[Callable[[int], None] | None]:
    """A bar over the bytes of the source; yields what to call with the offset that is done.

    Yields None when `quiet` or without a terminal: then there is no bar.
    """
    if quiet or not sys.stderr.isatty():
        yield None
        return
    from tqdm import tqdm  # 50 ms that only a bar needs

    tqdm.monitor_interval = 0  # its thread must not run when workers are forked
    with tqdm(
        total=source.total_bytes,
        unit="B",
        unit_scale=True,
        desc=printable(Path(source.name).name),
        leave=False,
        mininterval=0.2,
    ) as bar:

        def progress(offset: int) -> None:
            bar.update(source.read_bytes(offset) - bar.n)

        yield progress
