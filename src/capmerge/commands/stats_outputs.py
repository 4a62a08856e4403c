"""The files that statistics are written to: the document, a figure and a page.

They are checked before a run and written after it.
"""

import json
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

from capmerge.commands.targets import check_target
from capmerge.errors import UsageError, printable
from capmerge.files.atomic import write_whole
from capmerge.files.source import Source
from capmerge.stats.document import Document

_PLOT_ENDINGS = (".png", ".svg")


def default_document(path: Path) -> Path:
    """The default path of the document of a metadata file: `<stem>.stats.json` beside it."""
    name = path.name.removesuffix(".gz").removesuffix(".json").removesuffix(".jsonl")
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

        Raises `UsageError` when one is the source, exists already without `force`, or cannot be
        made: the figure's ending is neither .png nor .svg, matplotlib is missing, or two files have
        one name.
        """
        if self.plot and self.plot.suffix.lower() not in _PLOT_ENDINGS:
            raise UsageError(
                f"--plot {printable(str(self.plot))}: expected a name that ends in .png or .svg. "
                "Give such a name."
            )
        if self.plot and find_spec("matplotlib") is None:
            raise UsageError(
                "--plot: matplotlib is not installed. Run: pip install 'capmerge[plot]'"
            )
        given = {
            name: getattr(self, name)
            for name in ("document", "plot", "report", "per_record")
            if getattr(self, name)
        }
        real = {name: check_target(path, source, force=force) for name, path in given.items()}
        for path in real.values():
            if list(real.values()).count(path) > 1:
                raise UsageError(
                    f"{printable(str(path))}: two outputs have this name. Give each its own name."
                )
        return replace(self, **real)

    def save(self, document: Document) -> list[Path]:
        """Write the document and the views drawn from it, and return the paths in that order."""
        written = []
        if self.document:
            write_whole(self.document, json.dumps(document, indent=1) + "\n")
            written.append(self.document)
        if self.plot:
            from capmerge.stats.figure import draw_figure

            write_whole(self.plot, draw_figure(document, self.plot.suffix.lower()[1:]))
            written.append(self.plot)
        if self.report:
            from capmerge.stats.page import html_page

            write_whole(self.report, html_page(document))
            written.append(self.report)
        return written
