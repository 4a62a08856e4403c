"""HTML pages without scripts, in light and dark: their frame, style and tables, for both programs.

All text is untrusted: it is escaped, and control characters show as escapes. The content security
policy of a page forbids it to load or run anything.
"""

import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from capmerge.errors import printable

INK, LIMIT, GRID = "#222222", "#b3261e", "#e4e4e4"
_LONGEST_UNBROKEN = 32
"""A longer text in a cell is wrapped, and the table does not grow with it."""
_MOST_COLUMNS_BESIDE = 5
"""A table of more columns, or of long texts in the last of three, has the page's whole width."""
_NUMBER = re.compile(r"(?:under |over )?[0-9.,-]*(?: %)?")
_STYLE = (
    """
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
svg text { font: 12px system-ui, sans-serif; fill: var(--ink); }
svg .grid { stroke: var(--grid); } svg .axis { stroke: var(--ink); }
""".replace("INK", INK)
    .replace("GRID", GRID)
    .replace("LIMIT", LIMIT)
)


class Section(NamedTuple):
    """A titled table: the heads of its columns, its rows, and a note, which is "" when absent."""

    title: str
    heads: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]
    note: str = ""

    def flush_right(self) -> list[bool]:
        """Return whether each column is set flush right.

        These are the columns, except the first, where every cell is a count, a mean, a share or
        empty.
        """
        columns = zip(*self.rows, strict=True) if self.rows else [()] * len(self.heads)
        return [
            number > 0 and all(map(_NUMBER.fullmatch, column))
            for number, column in enumerate(columns)
        ]


def generator_line(kind: str) -> str:
    """Return the line in the head of every page of a kind, by which a later run knows it."""
    return f'<meta name="generator" content="capmerge {kind}">'


def page_html(kind: str, title: str, body: str, *, style: str = "", pictures: bool = False) -> str:
    """Return a whole page.

    `title` is text and shown as the page's heading too; `body` is HTML. `style` is added to that of
    all pages. With `pictures`, the page may show those that it holds itself, as data.
    """
    shown = text_html(title)
    images = " img-src data:;" if pictures else ""
    policy = f"default-src 'none';{images} style-src 'unsafe-inline'"
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
{generator_line(kind)}
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{shown}</title>
<style>{_STYLE}{style}</style>
</head>
<body>
<h1>{shown}</h1>
{body}
</body>
</html>
"""


def section_html(section: Section) -> str:
    """Return a titled table with its note, as an element of the page's grid."""
    full = ' class="full"' if _is_wide(section) else ""
    parts = [f"<section{full}><h2>{text_html(section.title)}</h2>"]
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
        parts.append(f'<p class="note">{text_html(section.note)}</p>')
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
    return f"<{tag}{kind}>{text_html(cell)}</{tag}>"


def text_html(text: str) -> str:
    """Return `text` escaped for use between tags or in quotes."""
    return escape(printable(text))
