"""Files of columns whose heads are damaged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Head = dict[str, Any]
HEAD_START = 16
"""The head is preceded by 8 bytes of magic and 8 bytes of its length."""


def edit_head(path: Path, edit: Callable[[Head], object]) -> None:
    """Change the head of a file of columns in place; the columns stay where they are."""
    data = path.read_bytes()
    end = HEAD_START + int.from_bytes(data[8:HEAD_START], "little")
    head = json.loads(data[HEAD_START:end])
    columns_start = min(place for _, place in head["columns"].values())
    edit(head)
    text = json.dumps(head).encode()
    start = data[:8] + len(text).to_bytes(8, "little") + text
    assert len(start) <= columns_start
    path.write_bytes(start.ljust(columns_start, b"\0") + data[columns_start:])
