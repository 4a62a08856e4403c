"""Data-loading workers: their signals, their memory, and the error when one is killed."""

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread
from types import FrameType
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from capmerge.errors import WorkerError

Item = TypeVar("Item")

_OF_THE_RUN = [signal.SIGINT, signal.SIGTERM]
if sys.platform != "win32":
    _OF_THE_RUN.append(signal.SIGHUP)


def iter_items(loader: DataLoader[Item]) -> Iterator[Item]:
    """The items of `loader`, whose workers are started with the signals of the run blocked.

    Raises `WorkerError` when one of the workers was killed, which is noticed only while an item is
    waited for, never in the middle of a step.
    """
    items: Iterator[Item] | None = None
    try:
        with _signals_blocked():
            items = iter(loader)
        _watch.install()
        while True:
            with _watch.raising():
                item = next(items, None)
            if item is None:
                break
            yield item
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


def kill_workers() -> None:
    """Kill the workers of this process, so that one that hangs cannot keep the process from ending.

    To be called at every end of the loading: a worker that reads from a dead network disk, or was
    stopped, takes no other signal, and Python would wait for it for ever.
    """
    for worker in multiprocessing.active_children():
        worker.kill()


class _Watch:
    """Torch's handler of SIGCHLD, held back until an item is waited for.

    When a worker was killed, torch's handler raises an error wherever the main thread is: also
    while the optimizer steps or a state is saved.
    """

    def __init__(self) -> None:
        self._torchs: Callable[[int, FrameType | None], Any] | None = None
        self._is_raising = False

    def install(self) -> None:
        """Take the place of torch's handler, which torch sets once per process."""
        if sys.platform == "win32" or threading.current_thread() is not threading.main_thread():
            return
        handler = signal.getsignal(signal.SIGCHLD)
        if callable(handler) and handler != self._handle:
            self._torchs = handler
            signal.signal(signal.SIGCHLD, self._handle)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Raise torch's error for a worker that was killed before or is killed in this context."""
        self._is_raising = True
        try:
            self._handle(0, None)
            yield
        finally:
            self._is_raising = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._is_raising and self._torchs is not None:
            self._torchs(number, frame)


_watch = _Watch()


def settle(_worker: int) -> None:
    """Make this worker outlive Ctrl-C, SIGTERM and SIGHUP, and keep sharing its memory.

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
    """Block Ctrl-C, SIGTERM and SIGHUP while workers are started.

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
