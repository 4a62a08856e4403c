"""The text at the end of a collection: a table of counts, and notes with the first names."""

from collections.abc import Iterator

from capmerge.commands.collect import Collected, CollectOptions
from capmerge.commands.collect_lines import CollectedLines
from capmerge.commands.pictures import Found
from capmerge.errors import printable, quoted
from capmerge.metadata.format import REJECTS


def folder_text(done: Collected, options: CollectOptions, seconds: float) -> str:
    """The counts of the pictures and texts of a folder, for a terminal."""
    rows = [
        ("pictures", done.walked.pictures),
        ("records", done.records),
        *((f"  with {name}", done.texts[name]) for name in options.endings),
        *((f"texts in {name}", done.encodings[name]) for name in options.encodings),
        ("empty texts", done.empty),
        ("bytes written", done.written_bytes),
    ]
    return _text(rows, seconds, _folder_notes(done, options))


def lines_text(done: CollectedLines, seconds: float) -> str:
    """The counts of a file of JSON lines, for a terminal."""
    rows = [
        ("records", done.records),
        ("  with caption", done.records - done.without_text.count),
        ("bytes written", done.written_bytes),
    ]
    notes = list(done.repeated.notes())
    if done.without_text.count:
        notes.insert(0, f"{_counted(done.without_text, 'record')} no text: they got no caption.")
    return _text(rows, seconds, notes)


def _folder_notes(done: Collected, options: CollectOptions) -> Iterator[str]:
    for name, ending in options.endings.items():
        if done.walked.pictures and not done.texts[name]:
            yield f"no picture has a readable text that ends in {ending}, so no record has {name}."
        elif done.without[name].count and len(options.endings) > 1:
            yield f"{_counted(done.without[name], 'picture')} no {ending} file and no {name}."
    if done.without_any.count:
        yield f"{_counted(done.without_any, 'picture')} no text at all: left out."
    if done.walked.texts_alone.count:
        yield f"{_counted(done.walked.texts_alone, 'text')} no picture: left out."
    if done.walked.same_stem.count:
        became = (
            "each has a record of its own with the same texts"
            if options.full_path
            else "they share one record"
        )
        yield (
            f"{_counted(done.walked.same_stem, 'picture')} the stem of an earlier one in the same "
            f"folder: {became}."
        )
    if done.marks:
        yield f"{done.marks:,} of the texts began with a byte order mark, which was dropped."
    if done.unreadable.count:
        where = f" and listed in OUT{REJECTS}" if options.target else ""
        yield (
            f"{done.unreadable.count:,} of the texts could not be read: left out{where} "
            f"(the first: {_names(done.unreadable)})."
        )


def _text(rows: list[tuple[str, int]], seconds: float, notes: "Iterator[str] | list[str]") -> str:
    table = [f"{name:<20} {count:>14,}" for name, count in rows]
    table.append(f"{'seconds':<20} {seconds:>14.2f}")
    return "\n".join([*table, *(f"note: {note}" for note in notes)])


def _counted(found: Found, noun: str) -> str:
    """A number of things that have something, with the first of them."""
    names = f"(the first: {_names(found)})"
    if found.count == 1:
        return f"1 {noun} ({_names(found)}) has"
    return f"{found.count:,} {noun}s {names} have"


def _names(found: Found) -> str:
    return ", ".join(printable(quoted(name)) for name in found.first)
