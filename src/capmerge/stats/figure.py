"""The figure of token lengths, drawn from the document alone.

No other module of this package imports matplotlib. The figure has two panels over the same axis of
lengths. The upper one shows how often each length is trained, by style, on a log axis, because the
tail decides what is cut and would be invisible on a linear axis. The lower one shows the share of
the tokens that a max length drops.
"""

import io
from typing import Any

from capmerge.errors import printable
from capmerge.stats.document import Document, percent
from capmerge.stats.histogram import GRID, INK, LIMIT, Histogram, histogram
from capmerge.stats.lengths import LengthStats
from capmerge.tokens.chunks import CHUNK_IDS
from capmerge.tokens.families import ONE_CHUNK

_PALE = "#666666"


def draw_figure(document: Document, ending: str) -> bytes:
    """Return the bytes of the figure as `png` or `svg`; equal documents give equal bytes."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "font.size": 10,
        "svg.hashsalt": "capmerge",
        "svg.fonttype": "none",
        "axes.unicode_minus": False,
    }
    with mpl.rc_context({**style, "text.parse_math": False}):
        figure = Figure(figsize=(9, 6.2), dpi=130, layout="constrained")
        FigureCanvasAgg(figure)
        upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1.4))
        shown = histogram(document)
        _draw_lengths(upper, shown)
        _draw_dropped(lower, shown, document)
        figure.suptitle(
            f"{printable(document['source'])}: what CLIP will see", color=INK, fontsize=13
        )
        figure.align_ylabels()
        written = io.BytesIO()
        metadata = {"Date": None, "Creator": None} if ending == "svg" else {"Software": None}
        figure.savefig(written, format=ending, metadata=metadata)
    return written.getvalue()


def _draw_lengths(axes: Any, shown: Histogram) -> None:
    """Draw the histograms by style, and the limits across them with the share that each cuts."""
    for style in shown.styles:
        axes.stairs(
            style.heights,
            shown.edges,
            baseline=shown.floor,
            fill=True,
            color=style.colour,
            alpha=0.35,
        )
        axes.stairs(
            style.heights,
            shown.edges,
            baseline=shown.floor,
            color=style.colour,
            linewidth=1.4,
            label=style.label,
        )
    axes.set_yscale("log")
    # The room above the bars is for the labels of the limits.
    axes.set_ylim(shown.floor, shown.top * (shown.top / shown.floor) ** 0.22)
    axes.yaxis.set_major_formatter(lambda height, _: f"{height:,g}")
    axes.yaxis.set_minor_formatter(lambda *_: "")
    axes.set_ylabel(shown.height_label)
    for row, (limit, label) in enumerate(shown.limits):
        _draw_limit(axes, row, limit, label)
    if shown.styles:
        # The legend goes above the panel, where it hides nothing.
        axes.legend(
            loc="lower left", bbox_to_anchor=(0, 1), frameon=False, fontsize=10, borderaxespad=0.3
        )
    else:
        axes.text(0.5, 0.5, "no text", transform=axes.transAxes, ha="center", color=_PALE)
    _dress(axes)


def _draw_dropped(axes: Any, shown: Histogram, document: Document) -> None:
    """Draw the share of the tokens that a max length drops, over all lengths."""
    distribution = LengthStats.from_json(document["lengths"]["lines"]).distribution()
    axes.plot(
        shown.edges,
        [100 * distribution.limit_effect(length).dropped_share for length in shown.edges],
        color=INK,
        linewidth=1.4,
    )
    for row, cut in enumerate(document["limits"]):
        _draw_limit(axes, row, cut["limit"], f"drops {percent(cut['dropped_share'])}")
    axes.set_ylim(0, 100)
    axes.set_xscale("log" if shown.log_tokens else "linear")
    axes.set_xlim(int(shown.log_tokens), shown.end * 1.08)
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
    axes.set_ylabel("tokens dropped, %")
    one_chunk = (
        f" (one chunk: {CHUNK_IDS} positions with start and end)"
        if document["family"] in ONE_CHUNK
        else ""
    )
    axes.set_xlabel(f"tokens, by the tokenizer of {printable(document['tokenizer'])}{one_chunk}")
    _dress(axes)


def _draw_limit(axes: Any, row: int, limit: int, label: str) -> None:
    """Draw one limit with its label.

    Each label has a row of its own, because a long tail brings the limits close together.
    """
    axes.axvline(limit, color=LIMIT, linewidth=1.1, linestyle=(0, (4, 3)))
    place = {
        "xy": (limit, 1),
        "xycoords": ("data", "axes fraction"),
        "xytext": (3, -2 - 11 * row),
        "textcoords": "offset points",
    }
    # A background keeps the label readable where the lines of other limits are close.
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
    axes.annotate(label, **place, va="top", color=LIMIT, fontsize=8.5, bbox=behind)


def _dress(axes: Any) -> None:
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_PALE)
