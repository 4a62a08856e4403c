"""What both pictures of token lengths show, on paper and on the page: bins, colours and labels, from the document alone."""

from typing import NamedTuple

from capmerge.document import STYLE_WORDS, Document, percent
from capmerge.stats import LengthStats

INK, LIMIT, GRID = "#222222", "#b3261e", "#e4e4e4"
_MOST_BINS = 120
_COLOURS = {"tags": "#0072b2", "caption": "#e69f00", "both": "#009e73"}  # Okabe and Ito's: told apart by colour-blind eyes


class StyleBars(NamedTuple):
    """One style's histogram: how many alternatives are drawn in each bin, by their probability."""

    colour: str
    label: str
    heights: list[float]


class Histogram(NamedTuple):
    """Histograms over bins [i * width, (i + 1) * width) of tokens; heights between `floor` and `top`, for a log axis."""

    width: int
    bins: int
    floor: float
    top: float
    height_label: str
    styles: list[StyleBars]
    limits: list[tuple[int, str]]
    """Each max length, with what it cuts."""


def histogram(document: Document) -> Histogram:
    """The histograms of the styles that there are."""
    found = {name: LengthStats.from_json(style).distribution() for name, style in document["styles"].items()}
    longest = max((distribution.maximum or 0 for distribution in found.values()), default=0)
    width = max(1, -(-longest // _MOST_BINS))
    bins = longest // width + 1
    styles = []
    for name, distribution in found.items():
        if not distribution.lengths:
            continue
        heights = [0] * bins
        for length, weight in zip(distribution.lengths, distribution.weights, strict=True):
            heights[length // width] += weight
        label = f"{STYLE_WORDS[name]}: {percent(document['styles'][name]['share'])} of what is drawn, mean {distribution.mean():.0f} tokens"
        styles.append(StyleBars(_COLOURS[name], label, [height / distribution.unit for height in heights]))
    seen = [height for style in styles for height in style.heights if height]
    bin_label = "token" if width == 1 else f"{width} tokens"
    limits = [(cut["limit"], f"{cut['limit']}: cuts {percent(cut['share'])}") for cut in document["limits"]]
    return Histogram(width, bins, min(seen, default=1) * 0.7, max(seen, default=1), f"lines drawn, for each {bin_label}", styles, limits)
