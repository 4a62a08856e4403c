"""The layout of a rewritten file: the bytes around its records, and the names of its side files."""

import zlib
from pathlib import Path
from typing import Literal, NamedTuple

from capmerge.errors import UsageError, printable
from capmerge.files.atomic import AtomicFile, Buffer, StandardOutput
from capmerge.metadata.blocks import FileLayout, Kind
from capmerge.metadata.scan import IMAGE_PATH

REJECTS, RECEIPT, DATASET, INDEX = ".rejects.jsonl", ".capmerge.json", ".dataset.toml", ".index"
"""What is added to the output's name for its side files."""
SIDE_FILES = (REJECTS, RECEIPT, DATASET, INDEX)


class Framing(NamedTuple):
    """The bytes around the records of an output file."""

    opening: bytes
    """Before the first record."""
    indent: bytes
    """Before the first byte of every record: its key's quote, or the brace of its line."""
    separator: bytes
    """Between two records, before the indent of the second."""
    closing: bytes
    """After the last record."""
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
"""How one record follows another in the output, in the terms of a file that is read."""

FormatName = Literal["json", "jsonl", "json.gz", "jsonl.gz"]


class Format(NamedTuple):
    """What the output is written as."""

    kind: Kind
    gz: bool = False

    def parts(self, *parts: Buffer) -> tuple[Buffer, ...]:
        """`parts` as they are written: as they are, or together as one gzip member.

        Members in a row are a gzip file. They have no time stamp, so equal runs give equal bytes.
        """
        return (zlib.compress(b"".join(parts), 6, wbits=31),) if self.gz else parts

    @classmethod
    def choose(cls, name: FormatName | None, target: Path | None) -> "Format":
        """The format that `--format` asks for, or the target's ending, or JSON.

        Raises `UsageError` when the two disagree: sd-scripts goes by the ending.
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
                f"{printable(str(target))}: --format {name} writes a file that ends in {expected}, and readers go by the ending. "
                f"Name the output *{expected}, or leave --format out."
            )
        return asked


def reserved_fields(out: Format) -> tuple[str, ...]:
    """The names that a record must not have in this format."""
    return (IMAGE_PATH,) if out.kind == "jsonl" else ()


class RecordWriter:
    """The sink of the stream of records: it frames what the blocks give."""

    def __init__(self, file: AtomicFile | StandardOutput, out: Format) -> None:
        self._file, self._out = file, out
        self._framing = FRAMINGS[out.kind]
        self._empty = True
        self.block_start = 0
        """Where the output of the last block begins."""

    def write(self, data: Buffer, *, new_block: bool) -> None:
        """Append the output of a block."""
        if new_block:
            self._write(self._framing.opening if self._empty else self._framing.separator)
            self._empty = False
            self.block_start = self._file.written_bytes
        self._file.write(data)

    def finish(self) -> None:
        """Write what follows the last record, or the whole of an empty file."""
        self._write(self._framing.empty if self._empty else self._framing.closing)

    def _write(self, text: bytes) -> None:
        for part in self._out.parts(text):
            self._file.write(part)
