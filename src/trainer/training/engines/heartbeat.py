"""The heartbeat of the ranks, by which they notice within a minute that one of them is gone.

Gloo and NCCL notice a process that has ended at best, and wait for minutes for one that was stopped
or whose machine is gone. So a thread of each rank counts up in the store of the process group, and
another one watches the counts of the others. The threads live as long as their process runs,
whatever its main thread does: a rank that computes, compiles, saves or reads for minutes beats on.
"""

import os
import secrets
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import NamedTuple, Self

from accelerate import Accelerator
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from trainer.data.workers import kill_workers
from trainer.training.engines.accelerator import from_rank_0, problem_of_lost_rank, this_rank

INTERVAL_SECONDS = 2.0
MOST_SILENT = 20
"""The number of intervals without a beat after which a rank counts as lost.

They are counted, not measured, so that a process that was itself stopped, or a machine that slept,
accuses no other.
"""
_TO_BE_READ = 3
"""The number of intervals that others have to read why a rank has ended, before they end too."""
_WELL, _ENDED = "ended well", "ended: "
_ANSWER = timedelta(seconds=60)


class _Round(NamedTuple):
    """What the store answered to one beat."""

    number: int
    values: tuple[str, ...]
    """The values of the other ranks."""


class Heartbeat:
    """A context in which the ranks of a run watch each other; nothing happens on a single one.

    When another rank is silent for too long, or has ended by an error while this one still waits
    for it, `lost` gets the problem in words and returns the message that this process ends with, by
    exit code 1. It ends at once, because its main thread cannot be reached while it waits for a
    rank in C code. A rank whose main thread alone hangs still beats, and counts as lost after
    `LONGEST_WAIT`.
    """

    def __init__(self, engine: Accelerator, lost: Callable[[str], str]) -> None:
        self._lost = lost
        self._over = threading.Event()
        self._others = [
            rank for rank in range(engine.num_processes) if rank != engine.process_index
        ]
        self._store = _store() if self._others else None
        self._last = _Round(0, ())
        if self._store is not None:
            # A launcher may keep its store over several starts of a run.
            run = from_rank_0(engine, secrets.token_hex(8))
            self._own, *self._keys = (
                f"heartbeat/{run}/{rank}" for rank in (engine.process_index, *self._others)
            )
            self._store.set(self._own, "0")
            engine.wait_for_everyone()

    def __enter__(self) -> Self:
        if self._store is not None:
            threading.Thread(target=self._beat, args=(self._store,), daemon=True).start()
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._store is None:
            return
        if error is not None and problem_of_lost_rank(error):
            for rank, value in zip(self._others, self._last.values, strict=False):
                if value.startswith(_ENDED):
                    error.add_note(f"rank {rank} {value}")
            return
        with suppress(RuntimeError):  # the store ends with the process that holds it
            self._store.set(self._own, _WELL if error is None else _ENDED + _text(error))
            if error is not None:
                self._wait_for_readers(self._store)

    def _wait_for_readers(self, store: TCPStore) -> None:
        """Give the others time to read why this rank ends, unless they come to an end themselves.

        The store mostly ends with the process of rank 0.
        """
        until = time.monotonic() + _TO_BE_READ * INTERVAL_SECONDS
        while time.monotonic() < until and not all(
            value.decode().startswith((_WELL, _ENDED)) for value in store.multi_get(self._keys)
        ):
            time.sleep(INTERVAL_SECONDS / 10)

    def _beat(self, store: TCPStore) -> None:
        number = 0
        while not self._over.is_set():
            number += 1
            # A store that does not answer is noticed by the rounds that are missing.
            with suppress(RuntimeError):
                store.set(self._own, str(number))
                values = (value.decode() for value in store.multi_get(self._keys))
                self._last = _Round(number, tuple(values))
            self._over.wait(INTERVAL_SECONDS)

    def _watch(self) -> None:
        silent: Counter[int | None] = Counter()
        before = self._last
        while not self._over.wait(INTERVAL_SECONDS):
            now = self._last
            # None stands for the store.
            silent[None] = silent[None] + 1 if now.number == before.number else 0
            for rank, old, value in zip(self._others, before.values, now.values, strict=False):
                is_new = value != old and not value.startswith(_ENDED)
                if is_new or value == _WELL:
                    silent[rank] = 0
                elif now.number != before.number:
                    silent[rank] += 1
                if value.startswith(_ENDED) and silent[rank] >= _TO_BE_READ:
                    self._end(f"rank {rank} {value}")
                if silent[rank] >= MOST_SILENT:
                    self._end(_silence(f"rank {rank}"))
            if silent[None] >= MOST_SILENT:
                self._end(_silence("the process that holds the store, which is mostly rank 0,"))
            before = now

    def _end(self, problem: str) -> None:
        """End this process, unless its main thread has come to an end itself."""
        if self._over.is_set():
            return
        message = self._lost(f"{this_rank()}: lost another process of the run ({problem})")
        with suppress(OSError):  # a terminal that is gone
            print(f"\n{message}", file=sys.stderr, flush=True)
        kill_workers()
        os._exit(1)


def _store() -> TCPStore | None:
    """A connection of its own to the store of the process group; None where there is no such one.

    Some launchers, such as that of MPI, start the ranks without one.
    """
    host, port = os.environ.get("MASTER_ADDR"), os.environ.get("MASTER_PORT", "")
    if not host or not port.isdigit():
        return None
    with suppress(RuntimeError):
        return TCPStore(host, int(port), is_master=False, timeout=_ANSWER)
    return None


def _silence(name: str) -> str:
    return f"{name} has not answered for {MOST_SILENT * INTERVAL_SECONDS:.0f} seconds"


def _text(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:1000]
