"""The plot of a run's losses, drawn from its metrics.jsonl."""

import io
import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from capmerge.errors import OutputError, printable
from capmerge.files.atomic import write_whole
from trainer.training.metrics import first_rate, iter_lines

Curve = npt.NDArray[np.float64]
_LOSS, _MEDIAN, _PALE, _GRID = "#9ecae1", "#08519c", "#666666", "#e4e4e4"
_MOST_POINTS = 4000
"""Largest number of points in a drawn line, about twice the width of the picture in pixels."""
_LOG_SPREAD = 20
"""Ratio of the largest to the smallest loss above which their axis is logarithmic."""


def save_loss_plot(metrics_path: Path, png_path: Path) -> str:
    """Plot the losses of `metrics.jsonl`; returns "", or the reason why there is no plot.

    The plot shows each loss, their running median, and the learning rate below. The axis of losses
    is logarithmic when they span more than a factor of `_LOG_SPREAD`, as the losses of single
    samples do, or losses with a spike.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, MaxNLocator
    except ImportError as error:
        return f"no loss plot: {error}. Install matplotlib (pip install matplotlib) to get one."
    steps, losses, rates = _read_curves(metrics_path)
    drawn = np.isfinite(losses)
    if not drawn.any():
        return f"no loss plot: there is no loss in {printable(str(metrics_path))}."
    name = printable(metrics_path.resolve().parent.name)
    with mpl.rc_context({"font.size": 10, "axes.unicode_minus": False, "text.parse_math": False}):
        figure = Figure(figsize=(9, 5.4), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(4, 1))
        skipped = np.count_nonzero(~drawn)
        skipped_note = f", {skipped:,} of them not finite" if skipped else ""
        title = f"{name}: losses up to step {steps[-1]:,.0f}{skipped_note}"
        figure.suptitle(title, fontsize=13)

        # The losses.
        spread = _draw_losses(upper, steps[drawn], losses[drawn])
        if spread > _LOG_SPREAD:
            upper.set_yscale("log")
            upper.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if spread < 1000 else (1,)))
            upper.yaxis.set_minor_formatter(lambda *_: "")
        upper.yaxis.set_major_formatter(lambda loss, _: f"{loss:g}")

        # The learning rate below them.
        lower.plot(
            *_thinned(steps, rates),
            color=_MEDIAN,
            linewidth=1.4,
            marker="o" if len(steps) == 1 else None,
        )
        highest = rates[np.isfinite(rates)].max(initial=0)
        lower.set_ylim(0, highest * 1.15 or 1)
        lower.set_ylabel("learning rate", fontsize=9)
        lower.yaxis.set_major_formatter(lambda rate, _: f"{rate:g}")
        lower.set_xlabel("step")
        lower.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True))
        lower.xaxis.set_major_formatter(lambda step, _: f"{step:,.0f}" if step.is_integer() else "")

        # Grid, colours and frame of both.
        for axes in (upper, lower):
            axes.grid(axis="y", color=_GRID, linewidth=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(colors=_PALE)
        figure.align_ylabels()
        written = io.BytesIO()
        figure.savefig(written, format="png", metadata={"Software": None})
    try:
        write_whole(png_path, written.getvalue())
    except OutputError as error:
        return f"no loss plot: {error}"
    return ""


def _read_curves(path: Path) -> tuple[Curve, Curve, Curve]:
    """The steps, losses and learning rates of all lines, with NaN where a line has none."""
    columns = array("d"), array("d"), array("d")
    for _, line in iter_lines(path):
        for column, value in zip(
            columns, (line["step"], line.get("loss"), first_rate(line)), strict=True
        ):
            column.append(math.nan if value is None else value)
    steps, losses, rates = (np.frombuffer(column) if column else np.empty(0) for column in columns)
    return steps, losses, rates


def _draw_losses(axes: Any, steps: Curve, losses: Curve) -> float:
    """Draw all losses and their running median; returns the largest over the smallest loss."""
    window = max(5, len(steps) // 20)
    few = len(steps) <= 60
    axes.plot(
        *_thinned(steps, losses),
        color=_LOSS,
        linewidth=1.2 if few else 0.7,
        marker="o" if few else None,
        label="loss per step",
    )
    if len(steps) > 2 * window:
        middles = np.unique(np.linspace(0, len(steps) - 1, 400).astype(int))
        medians = [
            np.median(losses[max(0, middle - window // 2) : middle + window // 2 + 1])
            for middle in middles
        ]
        axes.plot(
            steps[middles],
            medians,
            color=_MEDIAN,
            linewidth=1.8,
            label=f"median of {window:,} steps",
        )
    axes.set_ylabel("loss")
    # Above the axes, where it hides nothing.
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, frameon=False, borderaxespad=0.2)
    return float(losses.max() / losses.min()) if losses.min() > 0 else 0.0


def _thinned(steps: Curve, values: Curve) -> tuple[Curve, Curve]:
    """The same line with at most `_MOST_POINTS` points, without losing a spike.

    Of each stretch of steps the lowest and the highest value remain.
    """
    if len(steps) <= _MOST_POINTS:
        return steps, values
    kept = set()
    for stretch in np.array_split(np.arange(len(steps)), _MOST_POINTS // 2):
        kept |= {stretch[values[stretch].argmin()], stretch[values[stretch].argmax()]}
    indices = sorted(kept)
    return steps[indices], values[indices]
