"""The figures of the statistics as a table for a terminal."""

from capmerge.errors import printable
from capmerge.html_page import Section
from capmerge.stats.document import Document
from capmerge.stats.tables import sections

_WIDEST_LABEL = 44


def text_table(document: Document, encoding: str = "utf-8") -> str:
    """Return the table for a terminal, safe whatever the captions hold; the advice comes last.

    Columns are aligned by the width that text has on a terminal: Chinese, Japanese and Korean
    characters take two cells, and combining characters none. A character that `encoding` lacks
    stands as an escape and is measured as one.
    """
    parts = [_section_text(section, encoding) for section in sections(document)]
    return "\n\n".join([*parts, _shown(document["advice"]["text"], encoding)])


def _section_text(section: Section, encoding: str) -> str:
    from rich.cells import cell_len

    rows = [
        tuple(_short(_shown(cell, encoding), encoding) for cell in row)
        for row in (section.heads, *section.rows)
        if row
    ]
    widths = [max(map(cell_len, column)) for column in zip(*rows, strict=True)] if rows else []
    flush = section.flush_right()
    lines = []
    for row in rows:
        cells = []
        for cell, width, right in zip(row, widths, flush, strict=True):
            spaces = " " * (width - cell_len(cell))
            cells.append(spaces + cell if right else cell + spaces)
        lines.append("  ".join(cells).rstrip())
    note = [_shown(section.note, encoding)] if section.note else []
    return "\n".join([_shown(section.title, encoding), *(f"  {line}" for line in [*lines, *note])])


def _shown(text: str, encoding: str) -> str:
    """Return `text` as a terminal of this encoding shows it, escapes included."""
    return printable(text).encode(encoding, "backslashreplace").decode(encoding)


def _short(cell: str, encoding: str) -> str:
    """Return `cell`, cut to `_WIDEST_LABEL` cells of a terminal with a mark where it was cut."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(cell) <= _WIDEST_LABEL:
        return cell
    mark = "…" if "…".encode(encoding, "ignore") else "..."
    return set_cell_size(cell, _WIDEST_LABEL - len(mark)).rstrip() + mark
