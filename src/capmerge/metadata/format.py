"""Defines the layout of a rewritten file: the bytes around its records, and its side files."""

import zlib
from pathlib import Path
from typing import Literal, NamedTuple

from capmerge.errors import UsageError, printable
from capmerge.files.atomic import AtomicFile, Buffer, StandardOutput
from capmerge.metadata.blocks import FileLayout, Kind
from capmerge.metadata.scan import IMAGE_PATH

REJECTS, RECEIPT, DATASET, INDEX = ".rejects.jsonl", ".capmerge.json", ".dataset.toml", ".index"
"""The endings that are added to the name of the output for its side files."""
SIDE_FILES = (REJECTS, RECEIPT, DATASET, INDEX)


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

FormatName = Literal["json", "jsonl", "json.gz", "jsonl.gz"]


class Format(NamedTuple):
    """The format of the output: its kind, and whether it is compressed."""

    kind: Kind
    gz: bool = False

    def parts(self, *parts: Buffer) -> tuple[Buffer, ...]:
        """The bytes to write for `parts`: unchanged, or compressed together to one gzip member.

        Several members in a row are a gzip file. They have no time stamp, so equal runs give equal
        bytes.
        """
        return (zlib.compress(b"".join(parts), 6, wbits=31),) if self.gz else parts

    @classmethod
    def choose(cls, name: FormatName | None, target: Path | None) -> "Format":
        """The format that `--format` names; without it that of the target's ending, or else JSON.

        Raises `UsageError` when the two disagree, because sd-scripts goes by the ending.
        """
        asked = (
            cls("jsonl" if name.startswith("jsonl") else "json", name.endswith(".gz"))
            if name
            else None
        )
        if target is None:
            return asked or cls("json")
        endings = [suffix.lower() for suffix in target.suffixes[-2:]]
        gz = endings[-1:] == [".gz"]
        ending = (endings[:-1] if gz else endings)[-1:]
        by_name = cls("jsonl" if ending == [".jsonl"] else "json", gz)
        if asked is None or asked == by_name:
            return by_name
        if ending in ([".json"], [".jsonl"]) or asked.kind == "jsonl" or gz:
            expected = f".{name}"
            raise UsageError(
                f"{printable(str(target))}: --format {name} writes a file that ends in {expected}, "
                "and readers go by the ending. "
                f"Name the output *{expected}, or leave --format out."
            )
        return asked


def reserved_fields(out: Format) -> tuple[str, ...]:
    """The names of fields that a record must not have in this format."""
    return (IMAGE_PATH,) if out.kind == "jsonl" else ()


class RecordWriter:
    """The sink of the stream of records, which adds the bytes around the output of the blocks."""

    def __init__(self, file: AtomicFile | StandardOutput, out: Format) -> None:
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
