"""The files of a folder of shards: which of them are shards, and JSON lines among them as a source.

`capmerge.shards` rewrites such a folder, and an index can be made of one.
"""

import os
import re
from pathlib import Path

from capmerge.errors import CapmergeError, UsageError, in_words, printable
from capmerge.files.chained import ChainedSource, Link, read_link
from capmerge.files.compression import is_compressed, without_compression
from capmerge.files.source import FileSource
from capmerge.metadata.blocks import read_layout
from capmerge.metadata.format import SIDE_FILES
from capmerge.metadata.parquet_columns import MAGIC as PARQUET_MAGIC

MANIFEST, STATISTICS = "manifest.json", "stats.json"
"""What a rewrite of shards writes into the folder of its outputs besides them."""
_SHARD = re.compile(r".+\.(jsonl?(\.gz|\.zst)?|parquet)", re.IGNORECASE)
_LINES = ".jsonl"


def files_below(folder: Path) -> dict[str, int]:
    """Return the bytes of all files in a folder and below it, by their names, sorted.

    The names have slashes between the folders. A link to nowhere is a file of no bytes, so that it
    is missed by whoever reads it; folders that are links are not entered.
    Raises `CapmergeError` where a folder cannot be listed.
    """
    found: dict[str, int] = {}
    if not folder.exists():
        return found
    for where, _, names in os.walk(folder, onerror=_cannot_list):
        for name in names:
            path = Path(where, name)
            name_below = path.relative_to(folder).as_posix()
            if path.is_file():  # no pipe
                found[name_below] = path.stat().st_size
            elif path.is_symlink() and not path.exists():
                found[name_below] = 0
    return dict(sorted(found.items()))


def is_shard(name: str) -> bool:
    """Return whether a file of this name is a shard, by the rule that `files_below` names follow.

    Hidden files are none, nor are the files that a rewrite writes beside its outputs.
    """
    folders = name.split("/")
    return (
        _SHARD.fullmatch(folders[-1]) is not None
        and not any(part.startswith(".") for part in folders)
        and not name.endswith(SIDE_FILES)
        and name not in (MANIFEST, STATISTICS)
    )


def open_lines(folder: Path) -> ChainedSource:
    """Open the shards of a folder as one source of JSON lines, in the order of their names.

    Raises `UsageError` where there are none, or one is compressed or has another format by its name
    or its first bytes, and `DataError` where one cannot be read.
    """
    names = [name for name in files_below(folder) if is_shard(name)]
    if not names:
        raise UsageError(
            f"{printable(str(folder))}: found no shards in the folder, expected files that end in "
            f"{_LINES}. Check the path."
        )
    _refuse([(folder / name, _by_name(name)) for name in names])
    links = [read_link(folder / name) for name in names]
    _refuse([(link.path, _by_head(link)) for link in links])
    return ChainedSource(folder, links)


def check_lines(chain: ChainedSource) -> None:
    """Raise `UsageError` where a shard is a JSON object, whatever its name says.

    Raises `DataError` where one begins with neither. This reads the first line of each shard.
    """
    kinds = []
    for link in chain.links:
        with FileSource(link.path) as source:
            layout = read_layout(source, may_be_empty=True)
        kinds.append((link.path, "" if layout.kind == "jsonl" else "a JSON object"))
    _refuse(kinds)


def _by_name(name: str) -> str:
    """What a shard is by its name; nothing for JSON lines."""
    name = name.lower()
    if name.endswith((".gz", ".zst")):
        return "a compressed file"
    if name.endswith(".parquet"):
        return "a Parquet file"
    return "" if name.endswith(_LINES) else "a file of JSON"


def _by_head(link: Link) -> str:
    """What a shard is by its first bytes; nothing for JSON lines."""
    if is_compressed(link.head):
        return "a compressed file"
    return "a Parquet file" if link.head == PARQUET_MAGIC else ""


def _refuse(found: list[tuple[Path, str]]) -> None:
    """Raise `UsageError` where something was found in place of JSON lines."""
    others = [(path, what) for path, what in found if what]
    if not others:
        return
    path, what = others[0]
    more = f" ({len(others) - 1:,} more are not JSON lines)" if len(others) > 1 else ""
    lines = f"NEW/{without_compression(path).with_suffix(_LINES).name}"
    raise UsageError(
        f"{printable(str(path))}: found {what} among the shards{more}, expected plain JSON lines, "
        "whose records can be read one by one. Make a folder of those, and name that one: "
        f"capmerge convert {printable(str(path))} -o {printable(lines)}"
    )


def _cannot_list(error: OSError) -> None:
    raise CapmergeError(
        f"{printable(str(error.filename))}: the folder cannot be listed ({in_words(error)}). "
        "Check the disk and the permissions."
    )
