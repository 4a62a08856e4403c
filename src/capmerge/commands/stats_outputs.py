"""The files that statistics are written to: the document, a figure and a page.

They are checked before a run and written after it.
"""

import json
import os
import time
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from capmerge.commands.targets import check_target
from capmerge.errors import UsageError, printable
from capmerge.files.atomic import write_whole
from capmerge.files.compression import without_compression
from capmerge.files.source import Source
from capmerge.html_page import generator_line
from capmerge.metadata.format import PARQUET

if TYPE_CHECKING:
    from capmerge.stats.document import Document

_ENDINGS = {
    "document": ("-o", (".json",)),
    "plot": ("--plot", (".png", ".svg", ".pdf")),
    "report": ("--report", (".html", ".htm")),
    "per_record": ("--per-record", (".jsonl", ".ndjson")),
}
"""The option that names each file, and the endings of the format that is written to it."""
_MARKS = {
    "document": b'"schema": "capmerge.stats"',
    "plot": b"capmerge statistics",
    "report": generator_line("statistics").encode(),
}
"""The bytes near the start or the end of a file by which earlier statistics are known."""
_NEAR_BYTES = 4096


def default_document(path: Path) -> Path:
    """The default path of the document of a metadata file: `<stem>.stats.json` beside it."""
    name = without_compression(path).name
    for ending in (".json", ".jsonl", PARQUET):
        name = name.removesuffix(ending)
    return path.with_name(f"{name}.stats.json")


@dataclass(frozen=True, slots=True)
class StatsFiles:
    """The paths of the files to write; None for a file that is not asked for."""

    document: Path | None = None
    plot: Path | None = None
    report: Path | None = None
    per_record: Path | None = None

    def checked(self, source: Source, *, force: bool) -> "StatsFiles":
        """The same files by their real paths.

        Files that earlier statistics wrote are replaced; other files only with `force`. Raises
        `UsageError` when a file is the source, is another file that exists, or cannot be made: its
        ending is that of another format, matplotlib is missing, or two files have one name.
        """
        if self.plot and find_spec("matplotlib") is None:
            raise UsageError(
                "--plot: matplotlib is not installed. Run: pip install 'capmerge[plot]'"
            )
        given = {
            name: getattr(self, name)
            for name in ("document", "plot", "report", "per_record")
            if getattr(self, name)
        }
        for name, path in given.items():
            _check_ending(name, path)
        real = {
            name: check_target(path, source, force=force or _is_ours(name, path))
            for name, path in given.items()
        }
        for path in real.values():
            if list(real.values()).count(path) > 1:
                raise UsageError(
                    f"{printable(str(path))}: two outputs have this name. Give each its own name."
                )
        return replace(self, **real)

    def save(self, document: "Document", command: str) -> list[Path]:
        """Write the document and the views drawn from it, and return the paths in that order.

        `command` is the command line, which the footer of the page shows with today's date.
        """
        written = []
        if self.document:
            write_whole(self.document, json.dumps(document, indent=1) + "\n")
            written.append(self.document)
        if self.plot:
            from capmerge.stats.figure import draw_figure

            write_whole(self.plot, draw_figure(document, self.plot.suffix.lower()[1:]))
            written.append(self.plot)
        if self.report:
            from capmerge.stats.page import Made, html_page

            write_whole(self.report, html_page(document, Made(_today(), command)))
            written.append(self.report)
        return written


def _check_ending(name: str, path: Path) -> None:
    """Raise `UsageError` unless the ending of the file `name` is that of the format written."""
    option, endings = _ENDINGS[name]
    if path.suffix.lower() not in endings:
        expected = " or ".join([", ".join(endings[:-1]), endings[-1]] if endings[1:] else endings)
        raise UsageError(
            f"{option} {printable(str(path))}: expected a name that ends in {expected}, the "
            "format that is written there. Give such a name."
        )


def _is_ours(name: str, path: Path) -> bool:
    """Return whether the file at `path` is one that earlier statistics wrote for this option."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as file:
            if name == "per_record":
                return _is_per_record(file.readline(1 << 20))
            start = file.read(_NEAR_BYTES)
            file.seek(max(0, path.stat().st_size - _NEAR_BYTES))
            return _MARKS[name] in start or _MARKS[name] in file.read()
    except (OSError, ValueError, RecursionError):
        return False  # then it is checked as a file of somebody else


def _is_per_record(line: bytes) -> bool:
    """Return whether this is a line of --per-record. No line at all holds nothing to lose."""
    if not line:
        return True
    found = json.loads(line)
    return isinstance(found, dict) and list(found) == ["key", "tokens"]


def _today() -> str:
    """Return the date in UTC, or that of SOURCE_DATE_EPOCH, which makes pages reproducible."""
    seconds = os.environ.get("SOURCE_DATE_EPOCH", "")
    now = int(seconds) if seconds.isdecimal() else time.time()
    return time.strftime("%Y-%m-%d", time.gmtime(now))
