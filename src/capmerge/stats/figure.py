"""The figure of token lengths, drawn from the document alone.

No other module of this package imports matplotlib. The figure has two panels over the same axis of
lengths. The upper one shows how often each length is trained, by style, on a log axis, because the
tail decides what is cut and would be invisible on a linear axis. The lower one shows the share of
the tokens that a max length drops.
"""

import io
import warnings
from typing import Any

from capmerge.errors import printable
from capmerge.html_page import GRID, INK, LIMIT
from capmerge.stats.document import Document
from capmerge.stats.histogram import Histogram, histogram
from capmerge.tokens.chunks import CHUNK_IDS
from capmerge.tokens.families import ONE_CHUNK

_PALE = "#666666"
FIGURE_MARK = "capmerge statistics"
"""The text in the metadata of every figure by which a later run knows it."""
_CJK_FONTS = (
    "Noto Sans CJK JP",
    "Noto Sans CJK SC",
    "Yu Gothic",
    "Microsoft YaHei",
    "Malgun Gothic",
    "Hiragino Sans",
    "PingFang SC",
    "WenQuanYi Zen Hei",
    "IPAGothic",
)
"""Fonts of the usual systems with Chinese, Japanese or Korean characters, used where installed."""
_METADATA: dict[str, dict[str, str | None]] = {
    "png": {"Software": FIGURE_MARK},
    "svg": {"Date": None, "Creator": FIGURE_MARK},
    "pdf": {"CreationDate": None, "Creator": FIGURE_MARK, "Producer": None},
}
"""What each format says about the figure; dates are left out."""


def draw_figure(document: Document, ending: str) -> bytes:
    """Return the bytes of the figure as `png`, `svg` or `pdf`; equal documents give equal bytes."""
    import matplotlib as mpl
    from matplotlib import font_manager
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    installed = set(font_manager.get_font_names())
    style: dict[Any, Any] = {
        "font.size": 10,
        "font.family": ["DejaVu Sans", *(name for name in _CJK_FONTS if name in installed)],
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
        with warnings.catch_warnings():
            # A character that no installed font has shows as a box; there is nothing to mend.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(written, format=ending, metadata=_METADATA[ending])
    return written.getvalue()


def _draw_lengths(axes: Any, shown: Histogram) -> None:
    """Draw the histograms by style, and the limits across them with the share that each cuts."""
    for style in shown.styles:
        # Outlines alone: filled areas of two styles would mix to a third colour.
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
    axes.set_ylabel(shown.height_label.replace(", ", ",\n"))
    for row, (limit, label) in enumerate(shown.limits):
        _draw_limit(axes, row, limit, label, left=shown.is_far_right(limit))
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
    axes.plot(shown.edges, [100 * share for share in shown.dropped], color=INK, linewidth=1.4)
    for row, (limit, label) in enumerate(shown.drops):
        _draw_limit(axes, row, limit, label, left=shown.is_far_right(limit))
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


def _draw_limit(axes: Any, row: int, limit: int, label: str, *, left: bool) -> None:
    """Draw one limit with its label, which is to the left of the line if `left` is True.

    Each label has a row of its own, because a long tail brings the limits close together.
    """
    axes.axvline(limit, color=LIMIT, linewidth=1.1, linestyle=(0, (4, 3)))
    place = {
        "xy": (limit, 1),
        "xycoords": ("data", "axes fraction"),
        "xytext": (-3 if left else 3, -2 - 11 * row),
        "textcoords": "offset points",
    }
    # A background keeps the label readable where the lines of other limits are close.
    behind = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 0.8}
    side = "right" if left else "left"
    axes.annotate(label, **place, va="top", ha=side, color=LIMIT, fontsize=8.5, bbox=behind)


def _dress(axes: Any) -> None:
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_PALE)
