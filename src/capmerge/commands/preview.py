"""The work of `capmerge preview`: some records of a source before and after the merge.

Each alternative is shown as a model sees it: cut into chunks, with the tokens that it drops.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

from capmerge.captions.alternatives import WrittenAlternative, written_alternatives
from capmerge.captions.draw import Drawn, draw_line
from capmerge.captions.fit import FitResult
from capmerge.captions.longest_texts import longest_texts
from capmerge.captions.merge import Merger
from capmerge.captions.record_texts import RecordTexts, UnmergeableError, copy_of
from capmerge.captions.tally_notes import missing_text_notes
from capmerge.captions.template_choice import Choice
from capmerge.captions.wildcard import parse_line
from capmerge.captions.written import BrokenRecordError, is_rewritten, read_written
from capmerge.commands.preview_options import PreviewOptions
from capmerge.commands.preview_records import (
    first_records,
    longest_records,
    named_records,
    random_records,
)
from capmerge.errors import printable
from capmerge.files.source import Source
from capmerge.index.rows import texts_of
from capmerge.metadata.blocks import read_layout
from capmerge.metadata.codec import Stray
from capmerge.metadata.format import reserved_fields
from capmerge.rng import SampleId
from capmerge.tokens.chunk_text import ChunkedText, chunk_text, crop_text
from capmerge.tokens.chunks import CHUNK_TOKENS, Chunker, count_chunks
from capmerge.tokens.counter import TokenCounter
from capmerge.tokens.families import ONE_CHUNK, T5_IDS
from capmerge.tokens.load import load_readers
from capmerge.tokens.tokenizer import FileTokenizer

DEFAULT_MAX_TOKENS = 3 * CHUNK_TOKENS


class Readers(NamedTuple):
    """The tokenizers that read a caption: CLIP's chunks, and for some families T5."""

    clip: Chunker
    t5: FileTokenizer | None = None
    t5_ids: int = 0
    """The number of ids that T5 reads, its special tokens included; 0 for a family without T5."""

    @classmethod
    def load(cls, options: PreviewOptions) -> "Readers":
        """The readers that the options ask for. Raises `UsageError` as `load_readers` does."""
        clip, t5 = load_readers(options.family, options.tokenizer)
        if options.max_tokens is not None:
            max_chunks: int | None = count_chunks(options.max_tokens)
        elif options.family in ONE_CHUNK:
            max_chunks = 1
        else:
            max_chunks = count_chunks(DEFAULT_MAX_TOKENS) if options.chunking == "kohya" else None
        chunker = Chunker((clip,), options.chunking, max_chunks)
        return cls(chunker, t5, T5_IDS.get(options.family, 0))

    def text(self) -> str:
        """A line that names the tokenizer and says how much of a caption is read."""
        most = self.clip.max_chunks
        limit = f"{most * CHUNK_TOKENS} tokens" if most else "all tokens"
        name = printable(self.clip.tokenizers[0].name)
        line = f"Tokenizer {name}, {limit} read, " + (
            "cropped there." if self.t5_ids else f"chunks as {self.clip.chunking} cuts them."
        )
        if self.t5:
            return f"{line} T5: {self.t5_ids - self.t5.n_special} tokens are read."
        if self.t5_ids:
            return (
                f"{line} T5 reads {self.t5_ids} tokens by its own count. Give a T5 tokenizer with "
                "--tokenizer to see what it drops."
            )
        return line


@dataclass(frozen=True, slots=True)
class Shown:
    """One alternative as a model sees it."""

    written: WrittenAlternative
    texts: int
    """The number of texts that its in-line wildcards give; the longest of them is cut."""
    cut: ChunkedText
    t5_cut: ChunkedText | None
    """The part that T5 reads; None without T5."""


@dataclass(frozen=True, slots=True)
class Unfit:
    """One alternative that `--fit` left out or cut."""

    style: str
    tokens: int
    """The token length before the cut."""
    left_out: bool
    text: str
    """The text that is not trained: all of it, or what was cut off."""


@dataclass(frozen=True, slots=True)
class Preview:
    """A record before and after the merge, with its alternatives."""

    key: str
    before: Any
    after: dict[str, Any] | None
    """None when the record cannot be merged."""
    problem: str = ""
    """The reason why there is no `after`, or why its alternatives cannot be read."""
    rewritten: bool = False
    """True if the record is already rewritten in the source; then `after` is `before`."""
    alternatives: tuple[Shown, ...] = ()
    unfit: tuple[Unfit, ...] = ()
    dropped_tags: tuple[str, ...] = ()
    """The entries of `--drop-tags` that dropped a tag."""
    replaced_tags: tuple[str, ...] = ()
    """The old tags of `--replace-tags` that were replaced."""
    lacking_fields: tuple[str, ...] = ()
    """The fields for want of which templates were left out."""
    drawn: Drawn | None = None
    drawn_number: int | None = None
    """The number of the drawn alternative in `alternatives`, from 0."""


class Previewer:
    """Makes previews of records under one set of options."""

    def __init__(self, options: PreviewOptions) -> None:
        self._options = options
        self._merger = Merger(options.merge, reserved_fields(options.out) if options.out else ())
        self._measured = Merger(options.merge, reserved_fields(options.out) if options.out else ())
        self.readers = Readers.load(options)
        self._counter = TokenCounter(self.readers.clip.tokenizers[0])

    def notes(self) -> list[str]:
        """Notes on the texts that the records so far lack."""
        return list(missing_text_notes(self._merger.tally))

    def lengths(self, records: list[Any]) -> list[int]:
        """The tokens of the longest text that each record trains, without those that `--fit` cuts.

        It is 0 for a record that cannot be merged or read. The records are not changed.
        """
        merged = [copy_of(record) for record in records]
        self._measured.merge_all(merged)
        texts = [self._texts(record) for record in merged]
        counts = iter(self._counter.count_tokens([text for found in texts for text in found]))
        return [max(islice(counts, len(found)), default=0) for found in texts]

    def _texts(self, record: Any) -> list[str]:
        try:
            return list(texts_of(record)) if is_rewritten(record) else []
        except BrokenRecordError:
            return []

    def preview(self, key: str, record: Any) -> Preview:
        """The preview of one record, which is not changed."""
        if isinstance(record, Stray):
            return Preview(key, record.value, None, record.problem)
        rewritten = is_rewritten(record)
        after: Any = record
        unfit: tuple[Unfit, ...] = ()
        texts, choice = RecordTexts("", []), Choice([], ())
        try:
            if not rewritten:
                after = copy_of(record)
                self._merger.merge(after)
                texts, choice = self._merger.read(record)
                unfit = tuple(self._unfit(self._merger.fit(record)))
            found = written_alternatives(after)
        except (UnmergeableError, BrokenRecordError) as error:
            problem = " ".join(filter(None, (str(error), getattr(error, "hint", ""))))
            return Preview(key, record, record if rewritten else None, problem, rewritten)
        longest = longest_texts([alternative.line for alternative in found], self._counter)
        shown = tuple(
            self._show(alternative, text)
            for alternative, (text, _) in zip(found, longest, strict=True)
        )
        drawn, number = self._draw(key, after, found)
        return Preview(
            key,
            record,
            after,
            rewritten=rewritten,
            alternatives=shown,
            unfit=unfit,
            dropped_tags=texts.dropped,
            replaced_tags=texts.replaced,
            lacking_fields=choice.lacking,
            drawn=drawn,
            drawn_number=number,
        )

    def _show(self, alternative: WrittenAlternative, text: str) -> Shown:
        t5 = self.readers.t5
        t5_cut = crop_text(text, t5, self.readers.t5_ids - t5.n_special) if t5 else None
        cut = chunk_text(text, self.readers.clip)
        return Shown(alternative, parse_line(alternative.line).ways, cut, t5_cut)

    def _unfit(self, fit: FitResult) -> Iterator[Unfit]:
        changes = [(draw, None) for draw in fit.left_out] + list(fit.cut)
        for before, after in changes:
            ((text, tokens),) = longest_texts([self._merger.lines.line(before)], self._counter)
            if after is None:
                yield Unfit(before.template.style, tokens, left_out=True, text=text)
                continue
            gone = [
                before.value(field).removeprefix(
                    after.value(field) if field in after.template.fields else ""
                )
                for field in before.template.fields
            ]
            yield Unfit(
                before.template.style,
                tokens,
                left_out=False,
                text=" … ".join(text.strip(", ") for text in gone if text),
            )

    def _draw(
        self, key: str, after: dict[str, Any], found: list[WrittenAlternative]
    ) -> tuple[Drawn | None, int | None]:
        asked = self._options.sampling
        if asked is None:
            return None, None
        written = read_written(after)
        drawn = draw_line(
            written.caption,
            SampleId(asked.seed, asked.epoch, key, asked.dataset, asked.repeat),
            weights=written.weights,
            pick=asked.pick,
        )
        if not found:
            return drawn, None
        place = written.place_of(drawn)
        return drawn, next(
            number for number, alternative in enumerate(found) if place in alternative.places
        )


def iter_previews(
    source: Source,
    options: PreviewOptions,
    previewer: Previewer,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Preview]:
    """The previews that `options` ask for, one in memory at a time.

    `progress` is told the offset that is done. Raises `UsageError` at the end when the source has
    no record of a key.
    """
    layout = read_layout(source, options.max_record_bytes)
    if options.keys:
        pairs = named_records(source, layout, options.keys, progress)
    elif options.selection == "random":
        pairs = random_records(source, layout, options.count, options.seed, progress)
    elif options.selection == "longest":
        pairs = longest_records(source, layout, options.count, previewer.lengths, progress)
    else:
        pairs = first_records(source, layout, options.count)
    for key, record in pairs:
        yield previewer.preview(key, record)
