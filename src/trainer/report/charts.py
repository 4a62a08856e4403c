"""Line charts as inline SVG, whose colours the style of the page gives in light and dark."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, NamedTuple

from capmerge.html_page import text_html

CHART_STYLE = """\
:root { --c0: #0072b2; --c1: #b35c00; --c2: #00795a; --c3: #b0417f; --c4: #6a51a3; --c5: #8c6d00; }
@media (prefers-color-scheme: dark) {
  :root { --c0: #6cb8ee; --c1: #f0a35c; --c2: #4fd1a5; }
  :root { --c3: #f08cc0; --c4: #b8a4f0; --c5: #e0c860; }
}
svg { width: 100%; max-width: 46rem; height: auto; display: block; }
svg text { font-size: 14px; }
svg .line { fill: none; stroke-width: 2; stroke-linejoin: round; }
svg .raw { stroke-width: 1.2; opacity: .5; }
svg .band { stroke: none; opacity: .3; }
svg .dashed { stroke-dasharray: 6 4; }
""" + "".join(
    f"svg .s{number} {{ stroke: var(--c{number}); }} svg .f{number} {{ fill: var(--c{number}); }}\n"
    for number in range(6)
)
COLOURS = 6
_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 66, 14, 14, 258
_LEGEND_ROW = 22
_LOG_SPREAD = 10
"""Ratio of the largest to the median or smallest value above which an axis is logarithmic."""
_CHARACTER = 7.4
"""About the width of a character."""
_TICKS = 5
_MOST_DOTS = 60
"""A line of at most so many points has a dot at each."""

Form = Callable[[float], str]
Axis = Literal["zero", "spikes", "range"]
"""The axis of values: it begins at 0; is logarithmic where spikes would flatten the rest; or shows
the range of the values alone, logarithmic where that is wide."""


class Line(NamedTuple):
    """A line of a chart, or with `low_high` the band that its values fill."""

    label: str
    """Empty for a line that the legend leaves out."""
    colour: int
    """0 to `COLOURS` - 1."""
    points: Sequence[tuple[float, float]]
    """(step, value), in the order of the steps."""
    low_high: Sequence[tuple[float, float]] = ()
    """The lowest and the highest value at each point."""
    kind: str = "line"
    """`line`, `raw` for a pale one, `dashed`."""


def chart(label: str, lines: Sequence[Line], steps: tuple[int, int], form: Form, axis: Axis) -> str:
    """An `<svg>` element with the lines over the steps from `steps[0]` to `steps[1]`.

    `form` makes the text of a value on the axis.
    """
    values = [value for line in lines for value in _values(line)]
    axes = _Axes(steps, sorted(values), axis)
    legend, height = _legend(lines)
    parts = [*_grid(axes, form)]
    for line in lines:
        parts += _drawn(axes, line)
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT + height}" width="{_WIDTH}" role="img" '
        f'aria-label="{text_html(label)}">\n' + "\n".join([*parts, *legend]) + "\n</svg>"
    )


def _values(line: Line) -> Iterator[float]:
    for low, high in line.low_high:
        yield low
        yield high
    if not line.low_high:
        yield from (value for _, value in line.points)


class _Axes:
    """The mapping of steps and values to coordinates in the picture."""

    def __init__(self, steps: tuple[int, int], values: list[float], axis: Axis) -> None:
        self.first, self.last = steps[0], max(steps[1], steps[0] + 1)
        low, high = values[0], values[-1]
        middle = values[len(values) // 2]
        self.is_log = axis == "spikes" and low > 0 and high / middle > _LOG_SPREAD
        self.is_log |= axis == "range" and low > 0 and high / low > _LOG_SPREAD
        if axis == "range" and low > 0 and low > high / 2:
            base = low - (high - low or low) * 0.1
        else:
            base = min(low, 0)
        if self.is_log:
            self.low, self.high = math.log10(low), math.log10(high)
            self.values = _log_ticks(self.low, self.high)
        else:
            step = _nice_step(max(high, 0) - base or 1)
            begin = math.floor(base / step)
            end = max(begin + 1, math.ceil(max(high, 0) / step))
            self.low, self.high = begin * step, end * step
            self.values = [number * step for number in range(begin, end + 1)]

    def x(self, step: float) -> float:
        part = (step - self.first) / (self.last - self.first)
        return round(_LEFT + part * (_WIDTH - _LEFT - _RIGHT), 1)

    def y(self, value: float) -> float:
        at = math.log10(value) if self.is_log else value
        return round(_BOTTOM - (at - self.low) / (self.high - self.low) * (_BOTTOM - _TOP), 1)


def _nice_step(span: float) -> float:
    """The step of 1, 2 or 5 times a power of ten that cuts a span into about `_TICKS` parts."""
    power = 10.0 ** math.floor(math.log10(span / _TICKS))
    return next(step * power for step in (1, 2, 5, 10) if step * power * _TICKS >= span * 0.999)


def _log_ticks(low: float, high: float) -> list[float]:
    """The values to label on a log axis from 10**low to 10**high."""
    powers = range(math.floor(low), math.ceil(high) + 1)
    kinds: tuple[int, ...] = (1, 2, 5) if high - low < 3 else (1,)
    every = max(1, len(powers) // 8)
    ticks = [kind * 10.0**power for power in powers[::every] for kind in kinds]
    return [tick for tick in ticks if low <= math.log10(tick) <= high]


def _grid(axes: _Axes, form: Form) -> Iterator[str]:
    for value in axes.values:
        y = axes.y(value)
        yield f'<line x1="{_LEFT}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}" class="grid"/>'
        yield _text(_LEFT - 7, y + 5, form(value), anchor="end")
    yield (
        f'<line x1="{_LEFT}" y1="{_BOTTOM}" x2="{_WIDTH - _RIGHT}" y2="{_BOTTOM}" class="axis"/>'
    )
    step = max(1, round(_nice_step(axes.last - axes.first)))
    for number in range(math.ceil(axes.first / step), axes.last // step + 1):
        x = axes.x(number * step)
        yield f'<line x1="{x}" y1="{_BOTTOM}" x2="{x}" y2="{_BOTTOM + 5}" class="axis"/>'
        name = f"{number * step:,}"
        is_last = x + _CHARACTER * len(name) / 2 > _WIDTH
        at, anchor = (_WIDTH, "end") if is_last else (x, "middle")
        yield _text(at, _BOTTOM + 21, name, anchor=anchor)
    yield _text((_LEFT + _WIDTH - _RIGHT) / 2, _BOTTOM + 39, "step", anchor="middle")


def _drawn(axes: _Axes, line: Line) -> Iterator[str]:
    """The elements of a line; points beyond the steps of the chart are those of no line."""
    xs = [axes.x(step) for step, _ in line.points]
    if line.low_high:
        upper = [(x, axes.y(high)) for x, (_, high) in zip(xs, line.low_high, strict=True)]
        lower = [(x, axes.y(low)) for x, (low, _) in zip(xs, line.low_high, strict=True)]
        corners = " ".join(f"{x},{y}" for x, y in [*upper, *reversed(lower)])
        yield f'<polygon points="{corners}" class="band f{line.colour}"/>'
        return
    ys = [axes.y(value) for _, value in line.points]
    places = " ".join(f"{x},{y}" for x, y in zip(xs, ys, strict=True))
    kind = "line" if line.kind == "line" else f"line {line.kind}"
    yield f'<polyline points="{places}" class="{kind} s{line.colour}"/>'
    if len(xs) <= _MOST_DOTS and line.kind != "raw":
        for x, y in zip(xs, ys, strict=True):
            yield f'<circle cx="{x}" cy="{y}" r="3" class="f{line.colour}"/>'


def _legend(lines: Sequence[Line]) -> tuple[list[str], int]:
    """The legend below the chart, and its height."""
    named = [line for line in lines if line.label]
    parts, x, row = [], float(_LEFT), 0
    for line in named:
        width = 40 + _CHARACTER * len(line.label)
        if x > _LEFT and x + width > _WIDTH:
            x, row = float(_LEFT), row + 1
        y = _HEIGHT + 16 + row * _LEGEND_ROW
        if line.low_high:
            parts.append(
                f'<rect x="{x}" y="{y - 11}" width="22" height="12" class="band f{line.colour}"/>'
            )
        else:
            kind = "line" if line.kind == "line" else f"line {line.kind}"
            parts.append(
                f'<line x1="{x}" y1="{y - 5}" x2="{x + 22}" y2="{y - 5}" '
                f'class="{kind} s{line.colour}"/>'
            )
        parts.append(_text(x + 28, y, line.label))
        x += width
    return parts, (row + 1) * _LEGEND_ROW + 4 if named else 0


def _text(x: float, y: float, text: str, *, anchor: str = "start") -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}">{text_html(text)}</text>'
