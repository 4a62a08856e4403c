"""Data-loading workers: their signals, their memory, and the error when one is killed."""

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
    """The items of `loader`, whose workers are started with the signals of the run blocked.

    Raises `WorkerError` when one of the workers was killed.
    """
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
    # Raised outside of the handler, without the error that holds the iterator: while the iterator
    # lives, torch raises the same error again at every SIGCHLD.
    del items
    raise WorkerError(
        f"data loading: {found}, expected it to live as long as the run. The usual cause is too "
        "little memory: lower train.workers or train.batch_size, or give the machine more memory "
        "and a larger /dev/shm."
    )


def settle(_worker: int) -> None:
    """Make this worker outlive Ctrl-C and SIGTERM, and keep sharing its memory.

    Such signals often reach all processes of a run, but the training process still needs the
    workers to finish its step. The garbage collector does not walk frozen objects; walking them
    would copy the pages that they share with the training process: 11 MB of private memory per
    worker instead of 111.
    """
    if sys.platform == "linux":
        Thread(target=_obey_parent, args=(os.getppid(),), daemon=True).start()
    else:
        # There is no way to tell who sent a signal.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    gc.freeze()


@contextmanager
def _signals_blocked() -> Iterator[None]:
    """Block Ctrl-C and SIGTERM while workers are started.

    The workers inherit the blocked signals, and so do all threads that they start.
    """
    if sys.platform == "linux":
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_THE_RUN)
        try:
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
    else:
        yield


def _obey_parent(parent: int) -> None:
    """End this process at a signal from `parent`.

    The parent sends one when it ends without having closed its loader.
    """
    if sys.platform == "linux":
        while signal.sigwaitinfo(_OF_THE_RUN).si_pid != parent:
            continue
        os._exit(0)
