"""Statistics as one self-contained HTML page, with its style and pictures inside and no script.

Everything from the file is untrusted: it is escaped as text, and control characters show as
escapes. The page's content security policy forbids it to load or run anything.
"""

from html import escape

from capmerge.errors import printable
from capmerge.stats.document import Document
from capmerge.stats.histogram import GRID, INK, LIMIT
from capmerge.stats.page_svg import svg_picture
from capmerge.stats.tables import Section, sections

_SHOWN = 50
_STYLE = """
:root { color-scheme: light dark; --ink: INK; --paper: #fff; --pale: #555; }
:root { --grid: GRID; --limit: LIMIT; --advice: #eef5fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #17191c; --pale: #a8adb3; }
  :root { --grid: #3a3f45; --limit: #ff8a80; --advice: #1e2a33; }
}
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--paper); }
body { margin: 2rem auto; max-width: 60rem; padding: 0 1rem; }
h1 { font-size: 1.5rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
.advice { border-left: 4px solid #0072b2; background: var(--advice); padding: .7rem 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .2rem .9rem .2rem 0; vertical-align: top; }
th, td { border-bottom: 1px solid var(--grid); white-space: pre-wrap; overflow-wrap: anywhere; }
th { color: var(--pale); font-weight: 600; }
.n { text-align: right; white-space: nowrap; overflow-wrap: normal; }
p.note, footer { color: var(--pale); font-size: .9rem; }
svg { max-width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--ink); }
svg line.limit { stroke: var(--limit); stroke-dasharray: 5 4; }
svg text.limit { fill: var(--limit); }
svg text.limit { paint-order: stroke; stroke: var(--paper); stroke-width: 4px; }
"""


def html_page(document: Document) -> str:
    """Return the whole page."""
    title = f"{_text(document['source'])}: what CLIP will see"
    footer = (
        f"Made by capmerge {document['capmerge']}. Every figure is exact: counted, not sampled."
    )
    body = "\n".join(_section(section) for section in sections(document, _SHOWN))
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{_STYLE.replace("INK", INK).replace("GRID", GRID).replace("LIMIT", LIMIT)}</style>
</head>
<body>
<h1>{title}</h1>
<p class="advice">{_text(document["advice"]["text"])}</p>
{svg_picture(document)}
{body}
<footer><p>{_text(footer)}</p></footer>
</body>
</html>
"""


def _section(section: Section) -> str:
    parts = [f"<h2>{_text(section.title)}</h2>"]
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
    return "\n".join(parts)


def _cell(tag: str, cell: str, *, number: bool) -> str:
    flush = ' class="n"' if number else ""
    return f"<{tag}{flush}>{_text(cell)}</{tag}>"


def _text(text: str) -> str:
    """Return `text` escaped for use between tags or in quotes."""
    return escape(printable(text))
