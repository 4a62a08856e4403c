"""The work of `capmerge collect` on JSON lines of any program, such as `{"file_name", "text"}`.

The field with the file name becomes the key, and the field with the text becomes `caption`, in its
place. All other fields are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from capmerge.commands.pictures import Found
from capmerge.commands.records_output import RecordsOutput
from capmerge.commands.targets import check_target
from capmerge.errors import RecordError, quoted
from capmerge.files.atomic import OutputFiles
from capmerge.files.source import Source
from capmerge.metadata.blocks import MAX_RECORD_BYTES, FileLayout
from capmerge.metadata.codec import Pair, Records, Stray
from capmerge.metadata.format import Format
from capmerge.metadata.pieces import iter_source, place_of
from capmerge.metadata.scan import IMAGE_PATH
from capmerge.stats.repeated_keys import KeyCheck, KeyNotes, RepeatedKeys

_CAPTION = "caption"
_BOM = b"\xef\xbb\xbf"


@dataclass(frozen=True, slots=True)
class LinesOptions:
    """The options of one run of `capmerge collect` on a file."""

    target: Path | None
    """The file to write; None for standard output."""
    format: Format | None
    """The format to write; None for Parquet."""
    key_field: str = "file_name"
    caption_field: str = "text"
    folder: Path | None = None
    """The folder that is put in front of each key; None for keys as they are."""
    force: bool = False
    max_record_bytes: int = MAX_RECORD_BYTES


@dataclass(slots=True)
class CollectedLines:
    """The counts of a finished run."""

    records: int = 0
    written_bytes: int = 0
    without_text: Found = field(default_factory=Found)
    """Records without a text, or with null as their text."""
    repeated: RepeatedKeys = field(default_factory=RepeatedKeys)


def collect_lines(
    source: Source, options: LinesOptions, *, progress: Callable[[int], None] | None = None
) -> CollectedLines:
    """Write the lines of `source` as metadata; return the counts.

    `progress` is given the offset that is done. Raises `UsageError`, `OutputError`, and `DataError`
    for a line that is no object, has no key, or has a text that is no string; then no file was
    written or replaced.
    """
    target = options.target and check_target(options.target, source, force=options.force)
    start = len(_BOM) if source.window(0, len(_BOM)) == _BOM else 0
    layout = FileLayout("jsonl", start, b"\n", options.max_record_bytes)
    done = CollectedLines()
    with OutputFiles(target, ()) as files, KeyCheck(target) as keys:
        output = files.open()
        records, notes, sinks = RecordsOutput(output, options.format), KeyNotes(), keys.sinks()
        for piece in iter_source(source, layout):
            pairs = []
            for number, pair in enumerate(piece.records.pairs):
                try:
                    pairs.append(_record(pair, options, done.without_text))
                except _LineError as error:
                    place = place_of(source.name, layout, piece, number)
                    raise RecordError(source.name, place, None, *error.args) from None
            records.write(Records(pairs, piece.records.exact))
            done.records += len(pairs)
            notes.note([key for key, _ in pairs], [pairs[n][0] for n in piece.records.doubled])
            for stream, chunk in notes.take():
                sinks[stream].write(chunk, new_block=True)
            if progress:
                progress(piece.start + len(piece.data))
        records.finish()
        source.check_unchanged()
        done.repeated = keys.result()
        files.publish()
    done.written_bytes = output.written_bytes
    return done


class _LineError(Exception):
    """What is wrong with a line, and the next step."""


def _record(pair: Pair, options: LinesOptions, without_text: Found) -> Pair:
    """The key and the record that a line becomes; raises `_LineError` where it cannot."""
    # A line with an `image_path` was read with that as its key.
    key, line = pair
    fields: Any = line.value if isinstance(line, Stray) else {IMAGE_PATH: key, **line}
    if not isinstance(fields, dict):
        raise _LineError("the line is no object, expected one per line.", "Fix the line.")
    key_field, text_field = options.key_field, options.caption_field
    name = fields.pop(key_field, None)
    if not isinstance(name, str):
        raise _LineError(
            f"the field {quoted(key_field)} is {_kind(name)}, expected the name of a picture.",
            "Name the field that holds it with --key-field.",
        )
    if options.folder is not None:
        name = str(options.folder / name)
    text = fields.get(text_field)
    if text is None:
        without_text.add(name)
    elif not isinstance(text, str):
        raise _LineError(
            f"the field {quoted(text_field)} is {_kind(text)}, expected a text.",
            "Name the field that holds the text with --caption-field.",
        )
    for field_name, taken in ((_CAPTION, text_field), (IMAGE_PATH, key_field)):
        if field_name in fields and field_name != taken:
            raise _LineError(
                f"the line has a field {quoted(field_name)} besides {quoted(taken)}, which "
                "becomes that.",
                "Rename one of them, or name the other one with --key-field or --caption-field.",
            )
    return name, {
        _CAPTION if field_name == text_field else field_name: value
        for field_name, value in fields.items()
        if field_name != text_field or value is not None
    }


def _kind(value: Any) -> str:
    """What a value is, for a message."""
    if value is None:
        return "missing"
    names = {str: "a string", bool: "true or false", dict: "an object", list: "a list"}
    return names.get(type(value), "a number")
