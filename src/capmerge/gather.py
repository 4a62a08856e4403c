"""Statistics on their way from the workers to the document: which tokenizers count, what streams back, what is read again."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from capmerge.blocks import Layout
from capmerge.caption import Merger
from capmerge.caption_stats import CaptionStats
from capmerge.codec import decode
from capmerge.document import FAMILIES_WITH_T5, Document, build_document
from capmerge.duplicates import Place, RecordHashes, RecordPlaces, as_json
from capmerge.observe import Observer, whole_caption
from capmerge.output import AtomicFile
from capmerge.source import Source
from capmerge.templates import MergeOptions
from capmerge.tokens import FileTokenizer, TokenCounter, load_tokenizer, load_tokenizer_file
from capmerge.trained import trained_alternatives

Family = Literal["sd1", "sd2", "sdxl", "sd3", "flux"]
_CLIP = {"sd1": "sd1", "sd2": "sd2", "sdxl": "sd1", "sd3": "sd1", "flux": "sd1"}
"""Family -> whose tokenizer counts: SDXL's two encoders and the first of SD3 and FLUX read as many tokens as SD1's."""
_EXCERPT = 200


@dataclass(frozen=True, slots=True)
class Tokenizers:
    """Which tokenizers count: those of a family, or one from the user's files.

    For a family with a T5, a file that is no CLIP's is its T5.
    """

    family: Family = "sd1"
    path: Path | None = None

    def load(self) -> tuple[TokenCounter, TokenCounter | None]:
        """The counter of every figure, and that of the T5, if there is one. Raises `UsageError` as `load_tokenizer_file`."""
        own = load_tokenizer_file(self.path) if self.path else None
        if own and self.family in FAMILIES_WITH_T5 and isinstance(own, FileTokenizer):
            return TokenCounter(load_tokenizer(_CLIP[self.family])), TokenCounter(own)
        return TokenCounter(own or load_tokenizer(_CLIP[self.family])), None

    def observer(self, *, per_record: bool) -> Observer:
        """What a worker counts with."""
        return Observer(*self.load(), per_record=per_record)


class Gathered:
    """The parent's side of statistics: three streams, and the sum of the workers' counts.

    `per_record` is the file that takes a line of JSON a record, if any.
    """

    def __init__(self, tokenizers: Tokenizers, per_record: AtomicFile | None = None) -> None:
        self.tokenizers = tokenizers
        self.stats = CaptionStats()
        self._counters = tokenizers.load()  # says at once what is wrong with --tokenizer
        self._per_record = per_record
        self._hashes, self._places = RecordHashes(), RecordPlaces()

    def make_observer(self) -> Callable[[], Observer]:
        """To be called in each worker; it can be pickled."""
        return partial(self.tokenizers.observer, per_record=self._per_record is not None)

    def sinks(self) -> list[Any]:
        """Where the streams of `observe.Observed` go, in the order of its fields, and behind them that of the places."""
        return [self._hashes, _Lines(self._per_record), self._places]

    def document(self, source: Source, layout: Layout, merge: MergeOptions) -> Document:
        """The document of the finished run; the captions of the largest groups of duplicates are read from `source` again."""
        groups = self._hashes.groups()
        numbers = [number for _, number in groups.largest]
        firsts = [None] * len(numbers) if source.path is None else [self._read(source, layout, merge, place) for place in self._places.places(numbers)]
        return build_document(
            self.stats,
            source=Path(source.name).name,
            merge=merge,
            family=self.tokenizers.family,
            counter=self._counters[0],
            t5=self._counters[1],
            duplicates=as_json(groups, firsts),
        )

    def _read(self, source: Source, layout: Layout, merge: MergeOptions, place: Place) -> tuple[str, str]:
        """Key and the start of the whole caption of the record at `place`."""
        records = decode(source.window(place.start, place.end - place.start), layout.kind, last=place.last)
        key, record = list(records.pairs)[place.number]
        Merger(replace(merge, allow_rewritten=True)).merge(record)
        caption = whole_caption(trained_alternatives(record))
        return key, caption if len(caption) <= _EXCERPT else caption[: _EXCERPT - 1] + "…"


class _Lines:
    """The sink of the lines of `--per-record`, which are not written when there is no file for them."""

    def __init__(self, file: AtomicFile | None) -> None:
        self._file = file

    def write(self, data: bytes | memoryview, *, new_block: bool) -> None:  # noqa: ARG002  # a sink
        """Append lines."""
        if self._file:
            self._file.write(data)
