"""Statistics as one self-contained HTML page, with its style and pictures inside and no script.

Everything from the file is untrusted: it is escaped as text, and control characters show as
escapes. The page's content security policy forbids it to load or run anything.
"""

import json
from html import escape
from typing import NamedTuple

from capmerge.errors import printable
from capmerge.stats.document import Document
from capmerge.stats.histogram import GRID, INK, LIMIT
from capmerge.stats.page_svg import svg_picture
from capmerge.stats.tables import Section, sections

_SHOWN = 50
_LONGEST_UNBROKEN = 32
_MOST_OF_VALUE = 200  # characters of an option's value in the footer
"""A longer text in a cell is wrapped, and the table does not grow with it."""
_MOST_COLUMNS_BESIDE = 5
"""A table of more columns, or of long texts in the last of three, has the page's whole width."""
_STYLE = """
:root { color-scheme: light dark; --ink: INK; --paper: #fff; --pale: #555; }
:root { --grid: GRID; --limit: LIMIT; --advice: #eef5fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #17191c; --pale: #a8adb3; }
  :root { --grid: #3a3f45; --limit: #ff8a80; --advice: #1e2a33; }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { margin: 2rem auto; max-width: 112rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
.advice { border-left: 4px solid #0072b2; background: var(--advice); padding: .7rem 1rem; }
.wide { overflow-x: auto; }
.sections { display: grid; gap: 0 3rem; align-items: start; grid-auto-flow: dense; }
.sections { grid-template-columns: repeat(auto-fit, minmax(min(100%, 34rem), 1fr)); }
section.full { grid-column: 1 / -1; }
section { min-width: 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; vertical-align: top; }
th, td { border-bottom: 1px solid var(--grid); white-space: pre; }
td.long { white-space: pre-wrap; overflow-wrap: anywhere; min-width: 20rem; }
th { color: var(--pale); font-weight: 600; }
.n { text-align: right; }
p.note, footer { color: var(--pale); font-size: .9rem; overflow-wrap: anywhere; }
svg { width: 100%; min-width: 44rem; max-width: 90rem; height: auto; display: block; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--ink); }
svg .curve { stroke: var(--ink); stroke-width: 1.5; }
svg line.limit { stroke: var(--limit); stroke-dasharray: 5 4; }
svg text.limit { fill: var(--limit); }
svg text.limit { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
"""


PAGE_MARK = '<meta name="generator" content="capmerge statistics">'
"""The line in the head of every page by which a later run knows it."""


class Made(NamedTuple):
    """How a page was made. The document has none of it, so that equal runs give equal documents."""

    date: str
    command: str


def html_page(document: Document, made: Made | None = None) -> str:
    """Return the whole page; the same document and the same `made` give the same bytes.

    The footer names the version, the options and, from `made`, the date and the command.
    """
    title = f"{_text(document['source'])}: what CLIP will see"
    body = "\n".join(_section(section) for section in sections(document, _SHOWN))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{PAGE_MARK}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{_STYLE.replace("INK", INK).replace("GRID", GRID).replace("LIMIT", LIMIT)}</style>
</head>
<body>
<h1>{title}</h1>
<p class="advice">{_text(document["advice"]["text"])}</p>
<div class="wide">{svg_picture(document)}</div>
<div class="sections">
{body}
</div>
{_footer(document, made)}
</body>
</html>
"""


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
    return "<footer>" + "\n".join(f"<p>{_text(line)}</p>" for line in lines) + "</footer>"


def _excerpt(text: str) -> str:
    """Return the start of a long value, such as a list of thousands of tags."""
    return text if len(text) <= _MOST_OF_VALUE else f"{text[: _MOST_OF_VALUE - 1]}…"


def _section(section: Section) -> str:
    full = ' class="full"' if _is_wide(section) else ""
    parts = [f"<section{full}><h2>{_text(section.title)}</h2>"]
    if section.rows:
        flush = section.flush_right()
        head = "".join(
            _cell("th", cell, number=number)
            for cell, number in zip(section.heads, flush, strict=True)
        )
        rows = [
            "".join(
                _cell("td", cell, number=number) for cell, number in zip(row, flush, strict=True)
            )
            for row in section.rows
        ]
        lines = "\n".join(f"<tr>{row}</tr>" for row in rows)
        parts.append(
            f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n'
            f"<tbody>\n{lines}\n</tbody></table></div>"
        )
    if section.note:
        parts.append(f'<p class="note">{_text(section.note)}</p>')
    parts.append("</section>")
    return "\n".join(parts)


def _is_wide(section: Section) -> bool:
    """Return whether a table needs the whole width of the page."""
    columns = len(section.heads)
    return columns > _MOST_COLUMNS_BESIDE or (
        columns > 2 and any(len(row[-1]) > _LONGEST_UNBROKEN for row in section.rows)
    )


def _cell(tag: str, cell: str, *, number: bool) -> str:
    kind = ' class="n"' if number else ' class="long"' if len(cell) > _LONGEST_UNBROKEN else ""
    return f"<{tag}{kind}>{_text(cell)}</{tag}>"


def _text(text: str) -> str:
    """Return `text` escaped for use between tags or in quotes."""
    return escape(printable(text))
