"""The numbers of a run as metrics.jsonl holds them and as the progress bar shows them."""

import json
import math
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from capmerge.errors import OutputError, printable
from capmerge.files.atomic import AtomicFile

if TYPE_CHECKING:
    import torch

    from trainer.training.step_clock import RankTimes

NO_EVENTS = {"samples", "tokens", "dropped_tokens", "wider_batches"}
"""Keys of `Batch.counts` that are not per-sample events."""


class MetricsFile:
    """The file `metrics.jsonl` or `validation.jsonl`, open for appending one line of JSON per step.

    A line is passed to the operating system when `write` returns. Lines past `after_step` are
    removed first, because those steps will come again. Raises `OutputError` when that fails.
    """

    def __init__(self, path: Path, *, after_step: int) -> None:
        if path.exists():
            cut_back(path, after_step)
        try:
            self._file = FileIO(path, "a")
        except OSError as error:
            raise OutputError(
                f"{printable(str(path))}: cannot write, {error.strerror}. "
                "Check the folder and its permissions."
            ) from error

    def write(self, step: int, **fields: Any) -> str:
        """Append the line of `step`, counted from 1; "", or the reason why it was not written.

        In that case the file ends with the line before. Numbers that JSON does not have (NaN,
        infinite) become null.
        """
        line = {name: _finite(value) for name, value in {"step": step, **fields}.items()}
        # In ASCII, because captions may hold lone surrogates.
        rest = memoryview(json.dumps(line, allow_nan=False).encode() + b"\n")
        end = self._file.seek(0, 2)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            # Readers skip a partial line, should even cutting it off fail.
            with suppress(OSError):
                self._file.truncate(end)
            return f"{self._file.name}: cannot write, {error.strerror}"
        return ""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_back(path: Path, after_step: int) -> None:
    """Remove the lines of steps past `after_step`, and anything that is not a whole line.

    A killed run may leave a partial line. The file is replaced whole or not at all.
    """
    with AtomicFile(path.resolve()) as rewritten:
        for line, _ in iter_lines(path, after_step):
            rewritten.write(line)
        if rewritten.written_bytes != path.stat().st_size:
            rewritten.publish()


def iter_lines(path: Path, after_step: float = math.inf) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of steps up to `after_step`, as bytes and as values, in file order."""
    with path.open("rb") as lines:
        for line in lines:
            try:
                values = _values_of(line) if line.endswith(b"\n") else None
            except (ValueError, RecursionError):
                continue
            if (
                isinstance(values, dict)
                and isinstance(values.get("step"), int)
                and values["step"] <= after_step
            ):
                yield line, values


def _values_of(line: bytes) -> Any:
    """The JSON value of a line."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        # orjson refuses the lone surrogates that captions may hold.
        return json.loads(line)


class Recent:
    """The last 100 steps: their speed, and how often each event happened."""

    def __init__(self) -> None:
        self._steps: deque[tuple[Mapping[str, int], float, float]] = deque(maxlen=100)
        self._ranks: deque[Sequence[RankTimes]] = deque(maxlen=100)

    def add(self, counts: Mapping[str, int], seconds: float, waited_seconds: float) -> None:
        """Add a step: this rank's `Batch.counts`, its duration, and how much of it was waiting."""
        self._steps.append((counts, seconds, waited_seconds))

    def speed(self, ranks: int = 1) -> dict[str, float]:
        """The fields `samples_per_second`, over all ranks, and `data_wait`, the share of waiting.

        Each rank is taken to have as many samples as this one.
        """
        seconds = sum(seconds for _, seconds, _ in self._steps) or math.inf
        samples = sum(counts["samples"] for counts, _, _ in self._steps)
        waited = sum(waited for _, _, waited in self._steps)
        return {"samples_per_second": samples * ranks / seconds, "data_wait": waited / seconds}

    def add_ranks(self, times: Sequence["RankTimes"]) -> None:
        """Add the times of a step on each rank, in the order of the ranks."""
        self._ranks.append(times)

    def ranks(self) -> dict[str, list[float]]:
        """For each rank, its seconds per step, and the shares of waiting for data and for ranks.

        A rank waits for the one that is the last to be ready for the exchange of the gradients.
        Empty on a single rank, and at the first step.
        """
        steps = [times for times in self._ranks if times]
        if not steps:
            return {}
        of_ranks = [*zip(*steps, strict=True)]
        last = [max(each.arrival for each in times) for times in steps]
        whole = [sum(each.whole for each in rank) for rank in of_ranks]
        data = [sum(each.data for each in rank) for rank in of_ranks]
        waits = [
            sum(latest - each.arrival for latest, each in zip(last, rank, strict=True))
            for rank in of_ranks
        ]
        return {
            "seconds": [seconds / len(steps) for seconds in whole],
            "data_wait": [part / seconds for part, seconds in zip(data, whole, strict=True)],
            "rank_wait": [part / seconds for part, seconds in zip(waits, whole, strict=True)],
        }

    def event_shares(self) -> dict[str, float]:
        """The share of this rank's samples to which each event happened, by the event's name."""
        total: Counter[str] = Counter()
        for counts, _, _ in self._steps:
            total.update(counts)
        return {
            event: total[event] / total["samples"]
            for event in sorted(total.keys() - NO_EVENTS)
            if total[event]
        }


def peak_memory_bytes(device: "torch.device") -> int:
    """The most memory in use at once so far: tensors on a CUDA device, else the resident set.

    0 where the system does not report it (Windows).
    """
    if device.type == "cuda":
        import torch  # only here: the report reads metrics without it

        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def progress_fields(line: Mapping[str, Any], event_shares: Mapping[str, float]) -> dict[str, str]:
    """The texts after the progress bar, from a metrics line and `Recent.event_shares`.

    >>> line = {"loss": 0.12345, "lr_unet": 1e-5, "data_wait": 0.034, "memory_bytes": 2500000000}
    >>> progress_fields(line, {"flipped": 0.5})
    {'loss': '0.123', 'lr': '1e-05', 'wait': '3%', 'mem': '2.5 GB', 'flipped': '50%'}
    """
    line = {**line, "lr": first_rate(line), "memory_gb": line.get("memory_bytes", 0) / 1e9 or None}
    fields = {
        label: form.format(line[name])
        for name, (label, form) in _SHOWN.items()
        if line.get(name) is not None
    }
    return fields | {
        event: f"{share:.1%}" if share < 0.1 else f"{share:.0%}"
        for event, share in event_shares.items()
    }


def first_rate(line: Mapping[str, Any]) -> float | None:
    """The learning rate of the first group; the others change in proportion."""
    return next((value for name, value in line.items() if name.startswith("lr_")), None)


_SHOWN = {
    "loss": ("loss", "{:.3g}"),
    "lr": ("lr", "{:.3g}"),
    "samples_per_second": ("samples/s", "{:.3g}"),
    "data_wait": ("wait", "{:.0%}"),
    "memory_gb": ("mem", "{:.1f} GB"),
}
"""Label and format of each field after the progress bar."""
