"""Statistics as a table for the terminal, from the document alone."""

from typing import Any

from capmerge.document import Document

def table(document: Document) -> str:
    """The figures."""
    return str(document["advice"]["text"])
