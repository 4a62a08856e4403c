"""What is logged and shown of a run: metrics.jsonl, the line beside the progress bar, the loss plot. Knows no model, data or ranks."""

import json
import math
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

import orjson
import torch

from capmerge.errors import OutputError, printable
from capmerge.files.atomic import AtomicFile

_NO_EVENTS = {"samples", "tokens", "dropped_tokens", "wider_batches"}
"""What of `Batch.counts` is not counted in samples that something happened to."""


class MetricsFile:
    """`metrics.jsonl`, appended to: a line of JSON for each step that is logged, on its way to disk when `write` returns.

    What it holds past `after_step` is removed first: those steps are to come again. Raises
    `OutputError` when that fails.
    """

    def __init__(self, path: Path, *, after_step: int) -> None:
        if path.exists():
            cut_back(path, after_step)
        try:
            self._file = FileIO(path, "a")
        except OSError as error:
            raise OutputError(
                f"{printable(str(path))}: cannot write, {error.strerror}. Check the folder and its permissions."
            ) from error

    def write(self, step: int, loss: float, **fields: Any) -> str:
        """Append the line of `step` (how many are done then); "", or why it could not be written: then the file ends with the line before.

        A number that JSON does not have (NaN, infinite) becomes null.
        """
        line = {
            name: _finite(value) for name, value in {"step": step, "loss": loss, **fields}.items()
        }
        rest = memoryview(
            json.dumps(line, allow_nan=False).encode() + b"\n"
        )  # ASCII: captions may hold lone surrogates
        end = self._file.seek(0, 2)
        try:
            while rest:
                rest = rest[self._file.write(rest) :]
        except OSError as error:
            with suppress(
                OSError
            ):  # a half line that cannot even be cut off is passed over by whoever reads
                self._file.truncate(end)
            return f"{self._file.name}: cannot write, {error.strerror}"
        return ""

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def cut_back(path: Path, after_step: int) -> None:
    """Remove the lines of steps past `after_step`, and what is no whole line, as a killed run may leave it; all or nothing."""
    with AtomicFile(path.resolve()) as rewritten:
        for line, _ in iter_lines(path, after_step):
            rewritten.write(line)
        if rewritten.written_bytes != path.stat().st_size:
            rewritten.publish()


def iter_lines(path: Path, after_step: float = math.inf) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """The whole lines of steps up to `after_step`, as bytes and as values."""
    with path.open("rb") as lines:
        for line in lines:
            try:
                values = _values_of(line) if line.endswith(b"\n") else None
            except ValueError:
                continue
            if (
                isinstance(values, dict)
                and isinstance(values.get("step"), int)
                and values["step"] <= after_step
            ):
                yield line, values


def _values_of(line: bytes) -> Any:
    """The JSON of a line; orjson refuses the lone surrogates that captions may hold."""
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError:
        return json.loads(line)


class Recent:
    """The last steps, up to 100: their speed, and how often what happened."""

    def __init__(self) -> None:
        self._steps: deque[tuple[Mapping[str, int], float, float]] = deque(maxlen=100)

    def add(self, counts: Mapping[str, int], seconds: float, waited_seconds: float) -> None:
        """Take in a step: its `Batch.counts` on this rank, how long it took, and how long of that the loader was waited for."""
        self._steps.append((counts, seconds, waited_seconds))

    def speed(self, ranks: int = 1) -> dict[str, float]:
        """`samples_per_second` of all ranks, as if each had as many as this one, and `data_wait`, the share of the time that was waited."""
        seconds = sum(seconds for _, seconds, _ in self._steps) or math.inf
        return {
            "samples_per_second": sum(counts["samples"] for counts, _, _ in self._steps)
            * ranks
            / seconds,
            "data_wait": sum(waited for _, _, waited in self._steps) / seconds,
        }

    def event_shares(self) -> dict[str, float]:
        """For each event that happened, by name: the share of this rank's samples that it happened to."""
        total: Counter[str] = Counter()
        for counts, _, _ in self._steps:
            total.update(counts)
        return {
            event: total[event] / total["samples"]
            for event in sorted(total.keys() - _NO_EVENTS)
            if total[event]
        }


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that was taken at once since the start: tensors on a CUDA device, else the resident set of this process.

    0 where the system does not tell (Windows).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def progress_fields(line: Mapping[str, Any], event_shares: Mapping[str, float]) -> dict[str, str]:
    """What stands behind the progress bar, from the fields of a line of metrics and `Recent.event_shares`.

    >>> progress_fields({"loss": 0.12345, "lr_unet": 1e-5, "data_wait": 0.034, "memory_bytes": 2500000000}, {"flipped": 0.5})
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
    """The learning rate of the first group; the others move as it does."""
    return next((value for name, value in line.items() if name.startswith("lr_")), None)


_SHOWN = {
    "loss": ("loss", "{:.3g}"),
    "lr": ("lr", "{:.3g}"),
    "samples_per_second": ("samples/s", "{:.3g}"),
    "data_wait": ("wait", "{:.0%}"),
    "memory_gb": ("mem", "{:.1f} GB"),
}
"""Label and form of the fields behind the progress bar."""
