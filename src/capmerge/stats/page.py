"""Statistics as one self-contained HTML page, with its style and pictures inside and no script.

`capmerge.html_page` has its frame and its tables.
"""

import json
from typing import NamedTuple

from capmerge.html_page import page_html, section_html, text_html
from capmerge.stats.document import Document
from capmerge.stats.page_svg import svg_picture
from capmerge.stats.tables import sections

_SHOWN = 50
_MOST_OF_VALUE = 200  # characters of an option's value in the footer
_STYLE = """\
svg { width: 100%; min-width: 44rem; max-width: 90rem; height: auto; display: block; }
svg .curve { stroke: var(--ink); stroke-width: 1.5; }
svg line.limit { stroke: var(--limit); stroke-dasharray: 5 4; }
svg text.limit { fill: var(--limit); }
svg text.limit { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
"""


class Made(NamedTuple):
    """How a page was made. The document has none of it, so that equal runs give equal documents."""

    date: str
    command: str


def html_page(document: Document, made: Made | None = None) -> str:
    """Return the whole page; the same document and the same `made` give the same bytes.

    The footer names the version, the options and, from `made`, the date and the command.
    """
    tables = "\n".join(section_html(section) for section in sections(document, _SHOWN))
    body = f"""<p class="advice">{text_html(document["advice"]["text"])}</p>
<div class="wide">{svg_picture(document)}</div>
<div class="sections">
{tables}
</div>
{_footer(document, made)}"""
    return page_html("statistics", f"{document['source']}: what CLIP will see", body, style=_STYLE)


def _footer(document: Document, made: Made | None) -> str:
    """Return how the page was made, and with which options."""
    by = f"Made by capmerge {document['capmerge']}"
    lines = [f"{by} on {made.date}." if made else f"{by}."]
    lines[0] += " Every figure is exact: counted, not sampled."
    if made:
        lines.append(f"Command: {made.command}")
    options = {"family": document["family"], "tokenizer": document["tokenizer"]}
    options |= document["options"]
    values = [f"{name} = {_excerpt(json.dumps(value))}" for name, value in options.items()]
    lines.append(f"Options: {', '.join(values)}")
    return "<footer>" + "\n".join(f"<p>{text_html(line)}</p>" for line in lines) + "</footer>"


def _excerpt(text: str) -> str:
    """Return the start of a long value, such as a list of thousands of tags."""
    return text if len(text) <= _MOST_OF_VALUE else f"{text[: _MOST_OF_VALUE - 1]}…"
