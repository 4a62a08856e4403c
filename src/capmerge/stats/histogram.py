"""The histograms of token lengths that the figure and the page draw.

Bins, colours and labels come from the document alone.
"""

from bisect import bisect_right
from fractions import Fraction
from math import log10
from typing import NamedTuple

from capmerge.stats.document import STYLE_WORDS, Document, percent
from capmerge.stats.lengths import Distribution, LengthStats

_MOST_BINS = 120
_LONG_TAIL = 10
"""The longest line, in multiples of the length of nine in ten lines, for a linear axis.

A longer one would leave all others in a few bins, so the axis of tokens is then a log one.
"""
_ROOM_FOR_LABEL = 0.8
"""The part of the axis of tokens up to which a label to the right of its line fits."""
# From Okabe and Ito's palette, which colour-blind readers can tell apart.
_COLOURS = {"tags": "#0072b2", "caption": "#e69f00", "both": "#009e73"}


class StyleBars(NamedTuple):
    """The histogram of one style: the alternatives in each bin, weighted by their probability."""

    colour: str
    label: str
    heights: list[float]


class Histogram(NamedTuple):
    """Histograms over bins [edges[i], edges[i + 1]) of tokens.

    Heights lie between `floor` and `top`, for a log axis.
    """

    edges: list[int]
    log_tokens: bool
    """True when the axis of tokens is a log one too, from 1; the first bin holds empty lines."""
    floor: float
    top: float
    height_label: str
    styles: list[StyleBars]
    limits: list[tuple[int, str]]
    """Each max length with its label, which says what it cuts."""
    dropped: list[float]
    """The share of the tokens that a max length of each of `edges` drops."""
    drops: list[tuple[int, str]]
    """Each max length with its label, which says what it drops."""

    @property
    def end(self) -> int:
        """The number of tokens that the axis must reach at least."""
        return max(self.edges[-1], *(limit for limit, _ in self.limits))

    def is_far_right(self, limit: int) -> bool:
        """Return whether a limit is so near the end of the axis that its label goes to the left."""
        if self.log_tokens:
            return log10(limit) > _ROOM_FOR_LABEL * log10(self.end)
        return limit > _ROOM_FOR_LABEL * self.end


def histogram(document: Document) -> Histogram:
    """Return the histograms of the styles that occur."""
    lines = LengthStats.from_json(document["lengths"]["lines"]).distribution()
    edges, log_tokens = _edges(lines)
    styles = []
    for name, style in document["styles"].items():
        distribution = LengthStats.from_json(style).distribution()
        if not distribution.lengths:
            continue
        heights = [0] * (len(edges) - 1)
        for length, weight in zip(distribution.lengths, distribution.weights, strict=True):
            heights[max(0, bisect_right(edges, length) - 1)] += weight
        label = (
            f"{STYLE_WORDS[name]}: {percent(style['share'])} of what is drawn, "
            f"mean {distribution.mean():,.1f} tokens"
        )
        styles.append(
            StyleBars(_COLOURS[name], label, [height / distribution.unit for height in heights])
        )
    seen = [height for style in styles for height in style.heights if height]
    width = edges[-1] - edges[-2]
    bins = "that widen to the right" if log_tokens else f"of {width} token{'s' * (width > 1)}"
    limits = [
        (cut["limit"], f"{cut['limit']}: cuts {percent(cut['share'])}")
        for cut in document["limits"]
    ]
    floor, top = min(seen, default=1) * 0.7, max(seen, default=1)
    height_label = f"expected draws per epoch, in bins {bins}"
    dropped = [lines.limit_effect(edge).dropped_share for edge in edges]
    drops = [
        (cut["limit"], f"{cut['limit']}: drops {percent(cut['dropped_share'])}")
        for cut in document["limits"]
    ]
    return Histogram(edges, log_tokens, floor, top, height_label, styles, limits, dropped, drops)


def _edges(lines: Distribution) -> tuple[list[int], bool]:
    """Return the edges of the bins, and True when they are those of a log axis."""
    longest = lines.maximum or 0
    if longest > _LONG_TAIL * max(100, lines.quantile(Fraction(9, 10)) or 0):
        return sorted(
            {int((longest + 1) ** (i / _MOST_BINS)) for i in range(_MOST_BINS)} | {longest + 1}
        ), True
    width = max(1, -(-longest // _MOST_BINS))
    return [i * width for i in range(longest // width + 2)], False
