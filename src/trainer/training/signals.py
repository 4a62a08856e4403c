"""Ctrl-C and SIGTERM as requests to stop after the current step."""

import signal
from types import FrameType, TracebackType
from typing import Any, Self

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def exit_code(signal_number: int | None) -> int:
    """128 + the signal, as a shell reports it, or 0 if there was none."""
    return 0 if signal_number is None else 128 + signal_number


class Interrupts:
    """A context in which the first signal is only noted, in `signal_number`.

    A second Ctrl-C interrupts at once, as it does outside of the context.
    """

    def __init__(self) -> None:
        self.signal_number: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        self._before = {number: signal.signal(number, self._note) for number in _SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        if self.signal_number is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal_number = number
