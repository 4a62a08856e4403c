"""The page's own picture of token lengths, as inline SVG.

It needs no matplotlib, so that the page can be made where that is not installed.
"""

from collections.abc import Sequence
from html import escape
from math import floor, log10

from capmerge.stats.document import Document
from capmerge.stats.histogram import Histogram, histogram

_WIDTH, _HEIGHT = 900, 560
_STEPS = (5, 10, 25, 50, 75, 150, 300, 750, 1500, 3000, 10**4, 10**5, 10**6, 10**9)
_LEFT, _RIGHT, _TOP = 70, 12, 90
_BOTTOM, _LOWER_TOP, _LOWER_BOTTOM = 334, 384, 514
"""Where the upper panel ends, and where the lower one begins and ends."""


class _Axes:
    """The mapping of tokens and heights to coordinates in the picture.

    Heights are on a log axis, and tokens too where their tail is long.
    """

    def __init__(self, shown: Histogram) -> None:
        self.log_tokens = shown.log_tokens
        self.end = shown.end * (1.5 if shown.log_tokens else 1.12)
        self.low = floor(log10(shown.floor))
        # The room above the bars is for the labels of the limits.
        self.high = max(log10(shown.top) + 0.2 * (log10(shown.top) - self.low), self.low + 1)

    def x(self, tokens: float) -> float:
        part = log10(max(1, tokens)) / log10(self.end) if self.log_tokens else tokens / self.end
        return round(_LEFT + part * (_WIDTH - _LEFT - _RIGHT), 1)

    def ticks(self) -> Sequence[int]:
        """Return the numbers of tokens that are labelled."""
        if self.log_tokens:
            return [10**power for power in range(floor(log10(self.end)) + 1)]
        step = next(step for step in _STEPS if self.end / step <= 14)
        return range(0, int(self.end) + 1, step)

    def y(self, height: float) -> float:
        part = (log10(height) - self.low) / (self.high - self.low) if height else 0
        return round(_BOTTOM - max(0.0, part) * (_BOTTOM - _TOP), 1)


def svg_picture(document: Document) -> str:
    """Return an `<svg>` element with the panels of the figure and a legend.

    The upper panel holds the histograms by style, and the lower one the share of the tokens that
    a max length drops. The page's style sheet gives the colours of all but the histograms.
    """
    shown = histogram(document)
    axes = _Axes(shown)
    parts = [
        *_grid(axes, shown),
        *_bars(axes, shown),
        *_limits(axes, shown, shown.limits, _TOP, _BOTTOM),
        *_legend(shown),
        *_dropped(axes, shown),
        *_limits(axes, shown, shown.drops, _LOWER_TOP, _LOWER_BOTTOM),
    ]
    label = (
        "Histogram of token lengths by style, with the max lengths and what they cut, and the "
        "share of the tokens that a max length drops"
    )
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" role="img" aria-label="{label}">\n'
        + "\n".join(parts)
        + "\n</svg>"
    )


def _grid(axes: _Axes, shown: Histogram) -> list[str]:
    parts = []
    for power in range(axes.low, floor(axes.high) + 1):
        y = axes.y(10.0**power)
        parts.append(f'<line x1="{_LEFT}" y1="{y}" x2="{_WIDTH - _RIGHT}" y2="{y}" class="grid"/>')
        name = f"{10**power:,}" if power >= 0 else f"{10.0**power:g}"
        parts.append(_label(_LEFT - 6, y + 4, name, anchor="end"))
    parts += _token_axis(axes, _BOTTOM)
    parts.append(_label(4, _TOP - 10, f"{shown.height_label} (log scale)"))
    return parts


def _token_axis(axes: _Axes, bottom: int) -> list[str]:
    """Return the axis of tokens of a panel, with its labels."""
    parts = [
        f'<line x1="{_LEFT}" y1="{bottom}" x2="{_WIDTH - _RIGHT}" y2="{bottom}" class="axis"/>'
    ]
    for tokens in axes.ticks():
        x = axes.x(tokens)
        parts.append(f'<line x1="{x}" y1="{bottom}" x2="{x}" y2="{bottom + 5}" class="axis"/>')
        parts.append(_label(x, bottom + 18, f"{tokens:,}", anchor="middle"))
    return parts


def _dropped(axes: _Axes, shown: Histogram) -> list[str]:
    """Return the lower panel: the share of the tokens that a max length drops."""

    def y(share: float) -> float:
        return round(_LOWER_BOTTOM - share * (_LOWER_BOTTOM - _LOWER_TOP), 1)

    parts = []
    for part in (50, 100):
        at = y(part / 100)
        parts.append(
            f'<line x1="{_LEFT}" y1="{at}" x2="{_WIDTH - _RIGHT}" y2="{at}" class="grid"/>'
        )
        parts.append(_label(_LEFT - 6, at + 4, f"{part}", anchor="end"))
    points = " ".join(
        f"{axes.x(tokens)},{y(share)}"
        for tokens, share in zip(shown.edges, shown.dropped, strict=True)
    )
    parts.append(f'<polyline points="{points}" fill="none" class="curve"/>')
    parts += _token_axis(axes, _LOWER_BOTTOM)
    parts.append(_label(4, _LOWER_TOP - 10, "tokens dropped by a max length, %"))
    parts.append(_label((_LEFT + _WIDTH) / 2, _HEIGHT - 8, "tokens", anchor="middle"))
    return parts


def _bars(axes: _Axes, shown: Histogram) -> list[str]:
    parts, bottom = [], axes.y(0)
    for style in shown.styles:
        path = f"M{axes.x(0)} {bottom}"
        last = max(number for number, height in enumerate(style.heights) if height)
        for height, right in list(zip(style.heights, shown.edges[1:], strict=True))[: last + 1]:
            path += f"V{axes.y(height)}H{axes.x(right)}"
        parts.append(
            f'<path d="{path}V{bottom}" fill="none" stroke="{style.colour}" stroke-width="1.6"/>'
        )
    return parts


def _limits(
    axes: _Axes, shown: Histogram, limits: list[tuple[int, str]], top: int, bottom: int
) -> list[str]:
    """Return the limits across the panel from `top` to `bottom`, with their labels."""
    parts = []
    # Each label has a row of its own, because a long tail brings the limits close together.
    for row, (limit, label) in enumerate(limits):
        x, y = axes.x(limit), top + 10 + 15 * row
        parts.append(f'<line x1="{x}" y1="{top - 2}" x2="{x}" y2="{bottom}" class="limit"/>')
        if shown.is_far_right(limit):
            parts.append(_label(x - 4, y, label, anchor="end", kind="limit"))
        else:
            parts.append(_label(x + 4, y, label, kind="limit"))
    return parts


def _legend(shown: Histogram) -> list[str]:
    parts = []
    for i, style in enumerate(shown.styles):
        y = 16 + 20 * i
        parts.append(f'<rect x="{_LEFT}" y="{y - 6}" width="16" height="3" fill="{style.colour}"/>')
        parts.append(_label(_LEFT + 21, y, style.label))
    return parts or [_label(_WIDTH / 2, _HEIGHT / 2, "no text", anchor="middle")]


def _label(x: float, y: float, text: str, *, anchor: str = "start", kind: str = "ink") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" class="{kind}">{escape(text)}</text>'
