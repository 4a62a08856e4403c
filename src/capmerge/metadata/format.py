"""How a rewritten file is laid out: what stands before, between and behind its records, and the names of the files beside it."""

import zlib
from pathlib import Path
from typing import Literal, NamedTuple

from capmerge.errors import UsageError, printable
from capmerge.files.atomic import AtomicFile, Buffer, StandardOutput
from capmerge.metadata.blocks import Kind, Layout
from capmerge.metadata.codec import IMAGE_PATH

REJECTS, RECEIPT, DATASET, INDEX = ".rejects.jsonl", ".capmerge.json", ".dataset.toml", ".index"
"""What is added to the output's name for its side files."""
SIDE_FILES = (REJECTS, RECEIPT, DATASET, INDEX)
SEPARATORS: dict[Kind, bytes] = {"json": b",\n", "jsonl": b"\n"}
FormatName = Literal["json", "jsonl", "json.gz", "jsonl.gz"]


class Format(NamedTuple):
    """What the output is written as."""

    kind: Kind
    gz: bool = False

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


def compressed(data: Buffer) -> bytes:
    """`data` as a gzip member of its own, without a time stamp: members in a row are a gzip file."""
    return zlib.compress(data, 6, wbits=31)


_OPENINGS: dict[Kind, bytes] = {"json": b"{\n", "jsonl": b""}
_CLOSINGS: dict[Kind, bytes] = {"json": b"\n}", "jsonl": b"\n"}
_NOTHING: dict[Kind, bytes] = {"json": b"{}", "jsonl": b""}


class RecordWriter:
    """The stream of records: what stands before, between and behind the blocks' output."""

    def __init__(self, file: AtomicFile | StandardOutput, out: Format) -> None:
        self._file, self._out = file, out
        self._empty = True
        self.block_start = 0
        """Where the output of the last block begins."""

    def write(self, data: Buffer, *, new_block: bool) -> None:
        """Append the output of a block."""
        if new_block:
            self._write((_OPENINGS if self._empty else SEPARATORS)[self._out.kind])
            self._empty = False
            self.block_start = self._file.written_bytes
        self._file.write(data)

    def finish(self) -> None:
        """Write what stands behind the last record."""
        self._write((_NOTHING if self._empty else _CLOSINGS)[self._out.kind])

    def _write(self, text: bytes) -> None:
        self._file.write(compressed(text) if self._out.gz else text)


WRITTEN = {
    "json": Layout("json", 0, b'},\n  "'),
    "jsonl": Layout("jsonl", 0, b"\n"),
}
"""How the records follow each other in what `codec.encode` gives."""
