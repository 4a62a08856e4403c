"""How the processes that load live and die: signals, memory, and what their death looks like. Knows nothing of what they load."""

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import TypeVar

from torch.utils.data import DataLoader

from capmerge.errors import WorkerError

Item = TypeVar("Item")

_OF_THE_RUN = (signal.SIGINT, signal.SIGTERM)


def iter_items(loader: DataLoader[Item]) -> Iterator[Item]:
    """What `loader` gives, its workers started deaf to signals of the run; raises `WorkerError` when one of them was killed."""
    items: Iterator[Item] | None = None
    try:
        with _signals_blocked():
            items = iter(loader)
        yield from items
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker (pid"):
            raise
        found = str(error).rstrip(". ")
    else:
        return
    # Raised out here, without the error that holds the iterator: while that lives, torch tells of
    # the death again at every SIGCHLD.
    del items
    raise WorkerError(
        f"loading: {found}, expected it to live as long as the run. Mostly memory is short: "
        "lower train.workers or train.batch_size, or give the machine more, also in /dev/shm."
    )


def settle(_worker: int) -> None:
    """Make a worker outlive Ctrl-C and SIGTERM, which often reach all processes of a run: the training process ends its step with it.

    Frozen objects are not walked by the garbage collector, which would copy the pages they share
    with the training process: 11 MB of private memory a worker instead of 111.
    """
    if sys.platform == "linux":
        Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()
    else:  # nobody can tell who sent a signal
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block Ctrl-C and SIGTERM while workers are started: they inherit it, and with it all threads that they start."""
    if sys.platform == "linux":
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RUN)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    else:
        yield


def _obey_parent(parent: int) -> None:
    """End this process at a signal from `parent`, which sends one when it ends without having closed its loader."""
    if sys.platform == "linux":
        while signal.sigwaitinfo(_OF_THE_RUN).si_pid != parent:
            continue
        os._exit(0)
