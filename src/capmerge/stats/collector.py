"""The parent's side of statistics: it adds up the workers' counts and builds the document.

It owns the choice of tokenizers, the sinks for the streams that come back from the workers, and the
second reading of the captions that are duplicated most.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from capmerge.captions.alternatives import trained_alternatives
from capmerge.captions.merge import Merger
from capmerge.captions.templates import MergeOptions
from capmerge.files.atomic import AtomicFile
from capmerge.files.source import Source
from capmerge.metadata.blocks import FileLayout
from capmerge.metadata.codec import decode
from capmerge.metadata.work import Sink, Stream
from capmerge.stats.counts import CaptionStats
from capmerge.stats.document import Document, build_document
from capmerge.stats.duplicates import RecordHashes, RecordPlace, RecordPlaces, as_json
from capmerge.stats.observer import Observer, whole_caption
from capmerge.stats.repeated_keys import FirstKeys
from capmerge.tokens.counter import TokenCounter
from capmerge.tokens.families import TokenizerFamily
from capmerge.tokens.load import load_readers

_EXCERPT = 200


@dataclass(frozen=True, slots=True)
class Tokenizers:
    """The tokenizers that count: those of a family, or one from the user's files.

    The latter is another CLIP, or the T5 of a family that has one.
    """

    family: TokenizerFamily = "sd1"
    path: str | None = None

    def load(self) -> tuple[TokenCounter, TokenCounter | None]:
        """Return the counter for all figures, and that of the T5, if there is one.

        Raises `UsageError` as `load_readers` does.
        """
        clip, t5 = load_readers(self.family, self.path)
        return TokenCounter(clip), TokenCounter(t5) if t5 else None

    def observer(self, *, per_record: bool) -> Observer:
        """Return the observer with which a worker counts."""
        return Observer(*self.load(), per_record=per_record)


class Sums(NamedTuple):
    """The counts that statistics are made of."""

    stats: CaptionStats
    loops: int
    """The number of records with a caption that loops."""
    first_loops: tuple[str, ...]
    """The keys of the first of these."""


def document_of(
    name: str,
    sums: Sums,
    duplicates: dict[str, Any],
    merge: MergeOptions,
    tokenizers: Tokenizers,
    counters: tuple[TokenCounter, TokenCounter | None] | None = None,
) -> Document:
    """Return the document of what is called `name`; `counters` are those of `tokenizers`."""
    counter, t5 = counters or tokenizers.load()
    return build_document(
        sums.stats,
        source=name,
        merge=merge,
        family=tokenizers.family,
        counter=counter,
        t5=t5,
        duplicates=duplicates,
        loops={"records": sums.loops, "first": [{"key": key} for key in sums.first_loops]},
    )


class Gathered:
    """The parent's side of statistics: sinks for its streams, and the sum of the workers' counts.

    `per_record` is the file that takes one line of JSON per record, if any.
    """

    def __init__(self, tokenizers: Tokenizers, per_record: AtomicFile | None = None) -> None:
        self.tokenizers = tokenizers
        self.stats = CaptionStats()
        self._counters = tokenizers.load()  # a wrong --tokenizer fails here at once
        self._per_record = per_record
        self._hashes, self._places, self._loops = RecordHashes(), RecordPlaces(), FirstKeys()

    def make_observer(self) -> Callable[[], Observer]:
        """Return a function that can be pickled and makes the observer of a worker."""
        return partial(self.tokenizers.observer, per_record=self._per_record is not None)

    def sinks(self) -> dict[Stream, Sink]:
        """Return the sinks of the streams that observers fill.

        The lines per record have a sink only if there is a file for them; otherwise the observers
        make no such lines.
        """
        sinks: dict[Stream, Sink] = {
            "hashes": self._hashes,
            "places": self._places,
            "loops": self._loops,
        }
        if self._per_record:
            sinks["per_record"] = _PerRecordFile(self._per_record)
        return sinks

    @property
    def caption_hashes(self) -> bytes:
        """The hash of the whole caption of each record of the source, eight bytes per record."""
        return self._hashes.taken()

    @property
    def loops(self) -> FirstKeys:
        """The records with a caption that loops."""
        return self._loops

    def document(
        self, name: str, source: Source, layout: FileLayout, merge: MergeOptions
    ) -> Document:
        """Return the document of the file `name`.

        The captions of the largest groups of duplicates are read again from `source`.
        """
        groups = self._hashes.groups()
        numbers = [number for _, number in groups.largest]
        firsts: list[tuple[str, str] | None] = [None] * len(numbers)
        if source.path:
            firsts = [
                self._read(source, layout, merge, place) for place in self._places.places(numbers)
            ]
        sums = Sums(self.stats, self._loops.count, self._loops.keys)
        return document_of(
            Path(name).name, sums, as_json(groups, firsts), merge, self.tokenizers, self._counters
        )

    def _read(
        self, source: Source, layout: FileLayout, merge: MergeOptions, place: RecordPlace
    ) -> tuple[str, str]:
        """Return the key and the start of the whole caption of the record at `place`."""
        records = decode(
            source.window(place.start, place.end - place.start), layout.kind, last=place.last
        )
        key, record = list(records.pairs)[place.number]
        return key, caption_excerpt(record, merge)


def caption_excerpt(record: Any, merge: MergeOptions) -> str:
    """Return the start of the whole caption of a record of the source, which is merged here."""
    Merger(replace(merge, allow_rewritten=True)).merge(record)
    caption = whole_caption(trained_alternatives(record))
    return caption if len(caption) <= _EXCERPT else caption[: _EXCERPT - 1] + "…"


class _PerRecordFile:
    """The sink for the lines of `--per-record`."""

    def __init__(self, file: AtomicFile) -> None:
        self._file = file

    def write(self, data: bytes | memoryview, *, new_block: bool) -> None:  # noqa: ARG002  # a sink
        """Append lines."""
        self._file.write(data)
