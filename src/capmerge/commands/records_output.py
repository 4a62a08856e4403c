"""An output file of records in any format, for commands that write them one batch after another."""

from pathlib import Path

from capmerge.errors import UsageError
from capmerge.files.atomic import AtomicFile, StandardOutput
from capmerge.metadata.codec import Records
from capmerge.metadata.encoding import encode
from capmerge.metadata.format import Format, RecordWriter
from capmerge.metadata.parquet_writer import ParquetWriter


def check_is_file(target: Path) -> None:
    """Raise `UsageError` for standard output, where a command needs files beside its output."""
    if str(target) == "-":
        raise UsageError(
            "-: standard output has no place for temporary and side files. Name a file, or ./- if "
            "that is its name; `capmerge convert FILE -o - --format jsonl` then prints it."
        )


class RecordsOutput:
    """Writes records to `file`, as JSON, JSON lines or, with the format None, Parquet."""

    def __init__(self, file: AtomicFile | StandardOutput, out: Format | None) -> None:
        self._out = out
        self._parquet = ParquetWriter(file) if out is None else None
        self._records = RecordWriter(file, out) if out else None

    def write(self, records: Records) -> None:
        """Append records."""
        if self._parquet:
            self._parquet.write(records.pairs)
        elif self._out and self._records and (body := encode(records, self._out.kind)):
            for number, part in enumerate(self._out.parts(body)):
                self._records.write(part, new_block=number == 0)

    def finish(self) -> None:
        """Write what follows the last record."""
        for writer in (self._parquet, self._records):
            if writer:
                writer.finish()
