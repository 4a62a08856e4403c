"""Ctrl-C, SIGTERM and SIGHUP as requests to stop after the current step."""

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self, TypeVar

from trainer.data.workers import kill_workers
from trainer.errors import BatchTimeoutError

Item = TypeVar("Item")

LONGEST_WAIT_SECONDS = 30
"""The longest wait for the next batch after a signal."""

_SIGNALS = [signal.SIGINT, signal.SIGTERM]
if sys.platform != "win32":
    _SIGNALS.append(signal.SIGHUP)


def exit_code(signal_number: int | None) -> int:
    """128 + the signal, as a shell reports it, or 0 if there was none."""
    return 0 if signal_number is None else 128 + signal_number


class Interrupts:
    """A context in which the first signal is only noted, in `signal_number`.

    A second Ctrl-C interrupts at once, as it does outside of the context. SIGHUP stays ignored
    where it was ignored before, as under nohup.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._before: dict[int, Any] = {}
        self._is_waiting = False

    def __enter__(self) -> Self:
        self._before = {
            number: signal.signal(number, self._note)
            for number in _SIGNALS
            if signal.getsignal(number) != signal.SIG_IGN
        }
        if sys.platform != "win32":
            self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._give_up)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def bounded(self, items: Iterator[Item]) -> Iterator[Item]:
        """The items of a loader, whose waits do not outlast a signal for long.

        Raises `BatchTimeoutError` when no item comes within `LONGEST_WAIT_SECONDS` of a signal, or
        of the begin of a wait after it, and kills the workers, which torch would wait for one by
        one. Windows has no such alarm, and waits on.
        """
        while True:
            try:
                with self._bounded_wait():
                    item = next(items)
            except StopIteration:
                return
            except BatchTimeoutError:
                kill_workers()
                raise
            yield item

    @contextmanager
    def _bounded_wait(self) -> Iterator[None]:
        self._is_waiting = True
        self._set_alarm()
        try:
            yield
        finally:
            self._is_waiting = False
            if sys.platform != "win32":
                signal.alarm(0)

    def _set_alarm(self) -> None:
        if sys.platform != "win32" and self._is_waiting and self.signal_number is not None:
            signal.alarm(LONGEST_WAIT_SECONDS)

    def _give_up(self, _number: int, _frame: FrameType | None) -> None:
        if self._is_waiting:
            raise BatchTimeoutError(
                f"data loading: found no batch within {LONGEST_WAIT_SECONDS} seconds of a signal "
                "to stop. Check that the disk of data.latents answers."
            )

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal_number is None:
            self.signal_number = number
            self._set_alarm()
