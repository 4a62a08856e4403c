"""The work of `capmerge collect` on a folder: pictures and the texts beside them become records.

The records are those that sd-scripts' finetune/merge_captions_to_metadata.py and then
merge_dd_tags_to_metadata.py make: keys, order and values agree. Where sd-scripts stops at a picture
without a text, the picture gets the fields that it has, or is left out and counted. And a byte
order mark at the start of a text is dropped and counted, which sd-scripts takes for a letter.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from capmerge.commands.merge_blocks import OnError
from capmerge.commands.pictures import Found, Picture, PictureWalk, Walked
from capmerge.commands.records_output import RecordsOutput
from capmerge.commands.targets import check_target
from capmerge.commands.text_files import Text, check_encodings, read_text
from capmerge.errors import DataError, UsageError, printable
from capmerge.files.atomic import AtomicFile, OutputFiles
from capmerge.metadata.codec import Records
from capmerge.metadata.encoding import to_json
from capmerge.metadata.format import REJECTS, Format

_READ_AT_ONCE = 1 << 7
"""How many pictures' texts are in memory at once."""


@dataclass(frozen=True, slots=True)
class CollectOptions:
    """The options of one run of `capmerge collect` on a folder."""

    target: Path | None
    """The file to write; None for standard output."""
    format: Format | None
    """The format to write; None for Parquet."""
    endings: dict[str, str]
    """The ending of the texts of each field, in the order of the fields."""
    recursive: bool = False
    full_path: bool = False
    """True for keys that are paths; otherwise they are stems."""
    encodings: tuple[str, ...] = ("utf-8",)
    """The encodings that are tried for each text, one after the other."""
    on_error: OnError = "stop"
    readers: int = 8
    """How many texts are read at once."""
    force: bool = False


@dataclass(slots=True)
class Collected:
    """The counts of a finished run."""

    walked: Walked
    records: int = 0
    written_bytes: int = 0
    texts: Counter[str] = field(default_factory=Counter)
    """How many records have each field."""
    without: dict[str, Found] = field(default_factory=dict)
    """The pictures that lack the text of each field."""
    without_any: Found = field(default_factory=Found)
    """The pictures without any text, which are left out."""
    encodings: Counter[str] = field(default_factory=Counter)
    """How many texts have each encoding."""
    empty: int = 0
    """Texts that are empty, which are kept."""
    marks: int = 0
    """Texts whose byte order mark was dropped."""
    unreadable: Found = field(default_factory=Found)
    """Texts that could not be read, which are left out and listed."""


def collect(
    folder: Path, options: CollectOptions, *, progress: Callable[[int], None] | None = None
) -> Collected:
    """Write the metadata of the pictures in `folder`; return the counts.

    `progress` is given the number of pictures that are done. Raises `UsageError`, `DataError` for a
    text that cannot be read, or `OutputError`; then no file was written or replaced.
    """
    # Checks
    if not folder.is_dir():
        raise UsageError(f"{printable(str(folder))}: found no folder. Check the path.")
    check_encodings(options.encodings)
    target = options.target and check_target(options.target, None, force=options.force)

    # Walk and read. Threads read ahead, because a network disk answers each read late.
    walk = PictureWalk(folder, options.endings, target, recursive=options.recursive)
    with OutputFiles(target, (REJECTS,)) as files, ThreadPoolExecutor(options.readers) as readers:
        output = files.open()
        records = RecordsOutput(output, options.format)
        making = _Making(options, walk.walked, lambda: files.side(REJECTS) if target else None)
        pictures = iter(walk)
        while batch := [*islice(pictures, _READ_AT_ONCE)]:
            read = readers.map(lambda picture: _read_texts(picture, options.encodings), batch)
            made = (making.record(*both) for both in zip(batch, read, strict=True))
            records.write(Records([pair for pair in made if pair]))
            if progress:
                progress(walk.walked.pictures)
        records.finish()
        files.publish()
    making.done.written_bytes = output.written_bytes
    return making.done


_Texts = dict[str, Text | DataError]
"""What was read for each field, or why it was not."""


def _read_texts(picture: Picture, encodings: tuple[str, ...]) -> _Texts:
    texts: _Texts = {}
    for name, path in picture.texts.items():
        try:
            texts[name] = read_text(path, encodings)
        except DataError as error:  # raised, or listed, in the order of the pictures
            texts[name] = error
    return texts


class _Making:
    """Makes records of pictures and their texts, and counts."""

    def __init__(
        self,
        options: CollectOptions,
        walked: Walked,
        open_rejects: Callable[[], AtomicFile | None],
    ) -> None:
        self._options, self._open_rejects = options, open_rejects
        self._rejects: AtomicFile | None = None
        self.done = Collected(walked, without={name: Found() for name in options.endings})

    def record(self, picture: Picture, texts: _Texts) -> tuple[str, dict[str, str]] | None:
        """The key and the record of a picture; None for one that has no record of its own."""
        full_path, done = self._options.full_path, self.done
        if picture.is_repeated and not full_path:
            return None
        key = str(picture.path) if full_path else picture.stem
        record: dict[str, str] = {}
        for name in self._options.endings:
            found = texts.get(name)
            if found is None:
                done.without[name].add(str(picture.path))
            elif isinstance(found, DataError):
                self._reject(key, found)
            else:
                record[name] = found.text
                self._count(name, found)
        if not record:
            done.without_any.add(str(picture.path))
            return None
        done.records += 1
        return key, record

    def _count(self, name: str, found: Text) -> None:
        self.done.texts[name] += 1
        self.done.empty += not found.text
        self.done.marks += found.has_mark
        self.done.encodings[found.encoding] += 1

    def _reject(self, key: str, error: DataError) -> None:
        """List a text that cannot be read, or raise its error."""
        if self._options.on_error == "stop":
            raise error
        self.done.unreadable.add(error.name)
        self._rejects = self._rejects or self._open_rejects()
        if self._rejects:
            line = to_json({"key": key, "reason": error.problem, "file": error.name})
            self._rejects.write(f"{line}\n".encode())
