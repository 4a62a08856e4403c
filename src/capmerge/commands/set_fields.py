"""The story of `capmerge.set_fields`: a copy of a metadata file with some fields of records set."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from capmerge.commands.targets import check_target
from capmerge.errors import DataError, UsageError, printable
from capmerge.files.atomic import AtomicFile
from capmerge.files.source import Source
from capmerge.metadata.blocks import MAX_RECORD_BYTES, read_layout
from capmerge.metadata.codec import Stray
from capmerge.metadata.encoding import encode
from capmerge.metadata.format import Format, RecordWriter
from capmerge.metadata.pieces import iter_source, place_of

FieldsOf = Callable[[int, str], Mapping[str, Any] | None]
"""The fields to set of a record, by its number and its key; None for none."""


def set_fields(source: Source, target: Path, fields_of: FieldsOf, *, force: bool) -> int:
    """Write `source` with fields set to `target`, whole or not at all; return how many records.

    Raises the errors of `capmerge.set_fields`.
    """
    # Check before any work.
    layout, out = read_layout(source, MAX_RECORD_BYTES), Format.choose(None, target)
    if out.kind != layout.kind:
        raise UsageError(
            f"{printable(str(target))}: {printable(source.name)} is {layout.kind.upper()}, "
            f"expected an output of that kind. Name it *.{layout.kind}."
        )
    target = check_target(target, source, force=force)

    # Change and write the records, a piece of the source at a time.
    number = 0
    with AtomicFile(target) as file:
        writer = RecordWriter(file, out)
        for piece in iter_source(source, layout):
            for place, (key, record) in enumerate(piece.records.pairs):
                if isinstance(record, Stray):
                    offset = place_of(source.name, layout, piece, place)
                    raise DataError(source.name, offset, None, record.problem, "Fix the line.")
                fields = fields_of(number, key)
                if fields and isinstance(record, dict):
                    record.update(fields)
                number += 1
            if piece.records.pairs:
                (data,) = out.parts(encode(piece.records, out.kind))
                writer.write(data, new_block=True)
        writer.finish()
        file.publish()
    return number
