"""The files of a split: one for each part, in any of three formats."""

from collections.abc import Iterable
from typing import Literal

from capmerge.files.atomic import Buffer
from capmerge.files.scratch import ScratchFolder, ScratchWriter
from capmerge.metadata.codec import decode
from capmerge.metadata.format import Format, RecordWriter
from capmerge.metadata.parquet_writer import ParquetWriter
from capmerge.metadata.work import Sink, Stream, part_stream

PartFormat = Literal["json", "jsonl", "parquet"]


class Parts:
    """The files of the parts, in a folder that is not finished yet.

    Where parts come `in_order`, one of them is open at a time.
    """

    def __init__(
        self, folder: ScratchFolder, name: PartFormat, out: Format, count: int, *, in_order: bool
    ) -> None:
        self._folder, self._name, self._out, self._in_order = folder, name, out, in_order
        self._names = [f"part-{number:05}.{name}" for number in range(count)]
        self._open: dict[int, tuple[ScratchWriter, RecordWriter | _ParquetPart]] = {}
        self._sizes = dict[int, int]()
        self.sinks: dict[Stream, Sink] = {
            part_stream(number): _PartSink(self, number) for number in range(count)
        }

    def write(self, number: int, data: Buffer, *, new_block: bool) -> None:
        """Append records to a part."""
        if number not in self._open and self._in_order:
            self._finish(range(len(self._sizes), number))
        self._writer(number).write(data, new_block=new_block)

    def finish(self) -> list[tuple[str, int]]:
        """Finish all parts; the name and the size in bytes of each."""
        self._finish(range(len(self._sizes), len(self._names)))
        return [(name, self._sizes[number]) for number, name in enumerate(self._names)]

    def _writer(self, number: int) -> "RecordWriter | _ParquetPart":
        if number not in self._open:
            file = self._folder.file(self._names[number])
            is_parquet = self._name == "parquet"
            writer = _ParquetPart(file, self._out) if is_parquet else RecordWriter(file, self._out)
            self._open[number] = file, writer
        return self._open[number][1]

    def _finish(self, numbers: Iterable[int]) -> None:
        for number in numbers:
            self._writer(number).finish()
            file, _ = self._open.pop(number)
            file.close()
            self._sizes[number] = file.written_bytes


class _ParquetPart:
    """Writes the records of a part as rows of Parquet; they come in the format `out`."""

    def __init__(self, file: ScratchWriter, out: Format) -> None:
        self._writer, self._kind = ParquetWriter(file), out.kind
        self._block: list[bytes] = []

    def write(self, data: Buffer, *, new_block: bool) -> None:
        """Append records; those of a block may come in several pieces of any length."""
        if new_block:
            self._write_block()
        self._block.append(bytes(data))

    def finish(self) -> None:
        """Write what is waiting, and the end of the file."""
        self._write_block()
        self._writer.finish()

    def _write_block(self) -> None:
        text = b"".join(self._block)
        self._block.clear()
        if text:
            self._writer.write(decode(text, self._kind, last=False).pairs)


class _PartSink:
    """The sink of one part."""

    def __init__(self, parts: Parts, number: int) -> None:
        self._parts, self._number = parts, number

    def write(self, data: Buffer, *, new_block: bool) -> None:
        """Append records."""
        self._parts.write(self._number, data, new_block=new_block)
