"""The validations of a run on its page: the loss by timestep quantile and by caption style."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

from capmerge.html_page import Section
from trainer.config.settings import MOST
from trainer.report.charts import COLOURS, Line
from trainer.report.curves import Curve, is_number
from trainer.training.metrics import iter_lines

_SETS = {"held_out": "held out", "train": "trained"}
_WEIGHTS = {"raw": "", "ema": ", EMA"}
"""The weights that are validated, and what the name of their lines adds."""
_STYLES = {"long": "more than 75 tokens"}
_LONGEST_PART = 32
_MOST_PARTS = 32
"""Quantiles or styles that are read."""


class Key(NamedTuple):
    """What a validation loss is the mean of."""

    records: str
    """`held_out` or `train`."""
    weights: str
    """`raw` or `ema`."""
    kind: str
    """`quantiles`, `styles`, or `loss` for all of them."""
    part: str = ""


@dataclass
class Validations:
    """Everything that the page needs of validation.jsonl."""

    curves: dict[Key, Curve] = field(default_factory=dict)
    last: dict[Key, float] = field(default_factory=dict)
    """The losses of the last validation."""
    last_step: int = 0
    lowest: tuple[float, int] | None = None
    """The lowest loss on the held-out records, and its step."""
    records: tuple[Any, Any] = (0, 0)
    """The held-out and the trained records of the last validation."""
    share_of_time: Any = None

    def width(self) -> int:
        """Steps per point of the curves."""
        return max(curve.width for curve in self.curves.values())

    def parts(self, kind: str) -> list[str]:
        """The quantiles or styles, in the order of the file."""
        return list(dict.fromkeys(key.part for key in self.curves if key.kind == kind))


def read_validations(path: Path) -> Validations:
    """The validations in a validation.jsonl; none if there is no such file.

    Raises `OSError` when it cannot be read.
    """
    found = Validations()
    if not path.exists():
        return found
    for _, line in iter_lines(path, MOST):
        step = line["step"]
        if type(step) is int and step >= 0:  # 0 is before the first step
            _add_line(found, step, line)
    return found


def _add_line(found: Validations, step: int, line: dict[str, Any]) -> None:
    losses = dict(_losses(line))
    for key, loss in losses.items():
        found.curves.setdefault(key, Curve()).add(step, loss)
    total = losses.get(Key("held_out", "raw", "loss"))
    if total is not None and (found.lowest is None or total < found.lowest[0]):
        found.lowest = total, step
    if losses and step >= found.last_step:
        found.last_step, found.last = step, losses
        found.records = _at(line, "held_out", "records"), _at(line, "train", "records")
        found.share_of_time = line.get("share_of_time")


def _losses(line: dict[str, Any]) -> Iterator[tuple[Key, float]]:
    """All losses in a line that are finite."""
    for records, weights in product(_SETS, _WEIGHTS):
        loss = _at(line, records, weights, "loss")
        if is_number(loss):
            yield Key(records, weights, "loss"), float(loss)
        for kind in ("quantiles", "styles"):
            parts = _at(line, records, weights, kind)
            for part, value in list(parts.items())[:_MOST_PARTS] if isinstance(parts, dict) else ():
                if is_number(value):
                    yield Key(records, weights, kind, part[:_LONGEST_PART]), float(value)


def _at(line: Any, *names: str) -> Any:
    for name in names:
        line = line.get(name) if isinstance(line, dict) else None
    return line


def validation_lines(found: Validations, kind: str) -> list[Line]:
    """The lines of the chart of all records (`loss`), or of the held-out ones by part."""
    lines = []
    for key, curve in found.curves.items():
        if key.kind != kind or (kind != "loss" and key.records != "held_out"):
            continue
        number = list(_SETS).index(key.records) if kind == "loss" else _number(found, key)
        name = _SETS[key.records] + _WEIGHTS[key.weights]
        if kind != "loss":
            name = _name(key) if key.weights == "raw" else ""
        points = [(one.step, one.mean) for one in curve.bins()]
        style = "line" if key.weights == "raw" else "dashed"
        lines.append(Line(name, number % COLOURS, points, kind=style))
    return lines


def _number(found: Validations, key: Key) -> int:
    return found.parts(key.kind).index(key.part)


def _name(key: Key) -> str:
    if key.kind == "quantiles":
        return f"quantile {key.part}"
    return _STYLES.get(key.part, key.part)


def validation_section(found: Validations) -> Section:
    """The table of the last validation."""
    columns = [
        (records, weights)
        for records, weights in product(_SETS, _WEIGHTS)
        if Key(records, weights, "loss") in found.last
    ]
    keys = (
        [key for key in found.last if (key.records, key.weights) == columns[0]] if columns else []
    )
    rows = []
    for key in keys:
        cells = [
            found.last.get(key._replace(records=records, weights=weights))
            for records, weights in columns
        ]
        texts = ("" if cell is None else f"{cell:.5f}" for cell in cells)
        rows.append((_name(key) if key.part else "all", *texts))
    heads = [_SETS[records] + _WEIGHTS[weights] for records, weights in columns]
    return Section(
        f"Validation after step {found.last_step:,}", ("", *heads), rows, note=_note(found)
    )


def _note(found: Validations) -> str:
    held_out, trained = found.records
    note = (
        f"The mean loss of {held_out} records that are never trained, and of {trained} that are, "
        "each at the same noise and the same timesteps every time. Where the first rises while the "
        "second falls, the model learns its pictures by heart."
    )
    if found.lowest:
        loss, step = found.lowest
        note += f" The loss on the held-out records was lowest after step {step:,}: {loss:.5f}."
    if is_number(found.share_of_time):
        note += f" Validating took {100 * found.share_of_time:.1f} % of the time."
    return note
