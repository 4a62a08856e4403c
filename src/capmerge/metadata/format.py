"""Defines the layout of a rewritten file: the bytes around its records, and its side files."""

from pathlib import Path
from typing import Literal, NamedTuple

from capmerge.errors import UsageError, printable
from capmerge.files.atomic import AtomicFile, Buffer, StandardOutput
from capmerge.files.compression import (
    Compression,
    compress,
    compression_of,
    without_compression,
)
from capmerge.files.scratch import ScratchWriter
from capmerge.metadata.blocks import FileLayout, Kind
from capmerge.metadata.scan import IMAGE_PATH

REJECTS, RECEIPT, DATASET, INDEX = ".rejects.jsonl", ".capmerge.json", ".dataset.toml", ".index"
"""The endings that are added to the name of the output for its side files."""
SIDE_FILES = (REJECTS, RECEIPT, DATASET, INDEX)
DROPPED = ".dropped.jsonl"
"""The ending for the list of what a filter leaves out."""


class Framing(NamedTuple):
    """The bytes around the records of an output file."""

    opening: bytes
    """The bytes before the first record."""
    indent: bytes
    """The bytes before the quote of every record's key, or before the brace of its line."""
    separator: bytes
    """The bytes between two records, before the indent of the second."""
    closing: bytes
    """The bytes after the last record."""
    empty: bytes
    """The whole file when there are no records."""


FRAMINGS: dict[Kind, Framing] = {
    # As json.dump(indent=2) frames the members of an object.
    "json": Framing(b"{\n", b"  ", b",\n", b"\n}", b"{}"),
    "jsonl": Framing(b"", b"", b"\n", b"\n", b""),
}
WRITTEN: dict[Kind, FileLayout] = {
    "json": FileLayout(
        "json", 0, b"}" + FRAMINGS["json"].separator + FRAMINGS["json"].indent + b'"'
    ),
    "jsonl": FileLayout("jsonl", 0, FRAMINGS["jsonl"].separator),
}
"""The layout of the output as a reader of it finds it."""

FormatName = Literal["json", "jsonl", "json.gz", "jsonl.gz", "json.zst", "jsonl.zst"]
ConvertFormat = Literal[FormatName, "parquet"]
"""A format that records can be converted to, which sd-scripts may not read."""
PARQUET = ".parquet"
"""The ending of a Parquet file."""


class Format(NamedTuple):
    """The format of the output: its kind, and how it is compressed."""

    kind: Kind
    compression: Compression = ""

    def parts(self, *parts: Buffer) -> tuple[Buffer, ...]:
        """The bytes to write for `parts`: unchanged, or compressed together.

        Several compressed parts in a row are one compressed file.
        """
        return (compress(b"".join(parts), self.compression),) if self.compression else parts

    @classmethod
    def choose(cls, name: FormatName | None, target: Path | None) -> "Format":
        """The format that `--format` names; without it that of the target's ending, or else JSON.

        Raises `UsageError` when the two disagree, because sd-scripts goes by the ending, and for
        the ending of Parquet, which is none of these formats.
        """
        if target is not None and target.suffix.lower() == PARQUET:
            raise UsageError(
                f"{printable(str(target))}: found the ending of Parquet, expected JSON or "
                "JSON lines, which sd-scripts and the trainer read. Name the output *.json or "
                "*.jsonl; `capmerge convert` makes Parquet of that."
            )
        asked = None
        if name:
            compression = compression_of(Path(name))
            asked = cls("jsonl" if name.startswith("jsonl") else "json", compression)
        if target is None:
            return asked or cls("json")
        compression, ending = compression_of(target), without_compression(target).suffix.lower()
        by_name = cls("jsonl" if ending == ".jsonl" else "json", compression)
        if asked is None or asked == by_name:
            return by_name
        if ending in (".json", ".jsonl") or asked.kind == "jsonl" or compression:
            expected = f".{name}"
            raise UsageError(
                f"{printable(str(target))}: --format {name} writes a file that ends in {expected}, "
                "and readers go by the ending. "
                f"Name the output *{expected}, or leave --format out."
            )
        return asked


def is_format_ending(path: Path) -> bool:
    """True if the ending of a name says what format the file has, or how it is compressed."""
    ending = without_compression(path).suffix.lower()
    return bool(compression_of(path)) or ending in (".json", ".jsonl", PARQUET)


def reserved_fields(out: Format) -> tuple[str, ...]:
    """The names of fields that a record must not have in this format."""
    return (IMAGE_PATH,) if out.kind == "jsonl" else ()


class RecordWriter:
    """The sink of the stream of records, which adds the bytes around the output of the blocks."""

    def __init__(self, file: AtomicFile | StandardOutput | ScratchWriter, out: Format) -> None:
        self._file, self._out = file, out
        self._framing = FRAMINGS[out.kind]
        self._empty = True
        self.block_start = 0
        """The offset where the output of the last block begins."""

    def write(self, data: Buffer, *, new_block: bool) -> None:
        """Append the output of a block."""
        if new_block:
            self._write(self._framing.opening if self._empty else self._framing.separator)
            self._empty = False
            self.block_start = self._file.written_bytes
        self._file.write(data)

    def finish(self) -> None:
        """Write what follows the last record, or the whole file if there are no records."""
        self._write(self._framing.empty if self._empty else self._framing.closing)

    def _write(self, text: bytes) -> None:
        for part in self._out.parts(text):
            self._file.write(part)
