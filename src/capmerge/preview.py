"""The story of `capmerge preview`: some records of a source, before and after, and what a model sees of every alternative."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from capmerge.blocks import MAX_RECORD_BYTES, read_layout
from capmerge.caption import Merger, UnmergeableError
from capmerge.codec import Stray, iter_source
from capmerge.cut import Chunking, Cut, Cutter, check_max_tokens
from capmerge.errors import UsageError, printable, quoted
from capmerge.families import CLIP, CROPPED_TOKENS, Family
from capmerge.fit import Fitted, longest_texts
from capmerge.marks import MARK, WEIGHTS
from capmerge.rewritten import BrokenRecordError, Written, place_drawn, written_alternatives
from capmerge.source import Source
from capmerge.templates import MergeOptions
from capmerge.tokens import ClipTokenizer, TokenCounter, load_tokenizer
from capmerge.wildcard import Drawn, Pick, draw_line

DEFAULT_MAX_TOKENS = 225


@dataclass(frozen=True, slots=True)
class Sampling:
    """Which draw is shown: the arguments of `wildcard.draw`."""

    seed: int
    epoch: int
    dataset: int = 0
    repeat: int = 0
    pick: Pick = "random"


@dataclass(frozen=True, slots=True)
class PreviewOptions:
    """What is shown, and how it is cut. Raises `UsageError` for combinations that cannot be carried out."""

    merge: MergeOptions = field(default_factory=MergeOptions)
    keys: tuple[str, ...] = ()
    """Of the records that are shown; when empty, the first `count`."""
    count: int = 5
    family: Family = "sd1"
    chunking: Chunking = "kohya"
    max_tokens: int | None = None
    """None: 225 for kohya, no limit for a1111, one chunk for a family that crops."""
    sampling: Sampling | None = None
    max_record_bytes: int = MAX_RECORD_BYTES

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            check_max_tokens(self.max_tokens)
        cropped = CROPPED_TOKENS.get(self.family)
        if cropped and self.max_tokens not in (None, cropped):
            raise UsageError(
                f"--max-tokens {self.max_tokens}: CLIP reads {cropped} tokens of a caption with --family {self.family}. Leave it out."
            )
        if cropped and self.chunking == "a1111":
            raise UsageError(f"--chunking a1111: captions are not cut into chunks with --family {self.family}. Leave one of them out.")

    def cutter(self) -> Cutter:
        """How texts are cut."""
        tokenizer = load_tokenizer(CLIP[self.family])
        assert isinstance(tokenizer, ClipTokenizer)  # families are CLIP's
        default = CROPPED_TOKENS.get(self.family) or (DEFAULT_MAX_TOKENS if self.chunking == "kohya" else None)
        return Cutter(tokenizer, self.chunking, self.max_tokens or default)


@dataclass(frozen=True, slots=True)
class Shown:
    """One alternative as a model sees it."""

    written: Written
    cut: Cut
    """Of its longest text."""


@dataclass(frozen=True, slots=True)
class Preview:
    """One record."""

    key: str
    before: Any
    after: dict[str, Any] | None
    """None when it cannot be merged."""
    problem: str = ""
    """Why there is no `after`, or nothing to read in it."""
    rewritten: bool = False
    """Whether the source holds it rewritten already; then `after` is `before`."""
    alternatives: tuple[Shown, ...] = ()
    fitted: Fitted | None = None
    drawn: Drawn | None = None
    drawn_number: int | None = None
    """Of the drawn alternative, from 0."""


class Previewer:
    """Looks at records under one set of options."""

    def __init__(self, options: PreviewOptions) -> None:
        self._options = options
        self._merger = Merger(options.merge)
        self._cutter = options.cutter()
        self._counter = TokenCounter(self._cutter.tokenizer)

    def preview(self, key: str, record: Any) -> Preview:
        """What one record is, becomes and gives to a model; `record` is not changed."""
        if isinstance(record, Stray):
            return Preview(key, record.value, None, record.problem)
        after, fitted = record, None
        rewritten = isinstance(record, dict) and MARK in record
        try:
            if not rewritten:
                after = copy.deepcopy(record)
                self._merger.merge(after)
                fitted = self._merger.fitted(record)
            found = written_alternatives(after)
        except (UnmergeableError, BrokenRecordError) as error:
            return Preview(key, record, record if rewritten else None, str(error), rewritten)
        texts = longest_texts([alternative.line for alternative in found], self._counter)
        shown = tuple(Shown(alternative, self._cutter.cut(text)) for alternative, (text, _) in zip(found, texts, strict=True))
        drawn, number = self._draw(key, after, found)
        return Preview(key, record, after, "", rewritten, shown, fitted, drawn, number)

    def _draw(self, key: str, after: dict[str, Any], found: list[Written]) -> tuple[Drawn | None, int | None]:
        asked = self._options.sampling
        if asked is None:
            return None, None
        drawn = draw_line(
            after["caption"],
            asked.seed,
            asked.epoch,
            key,
            dataset=asked.dataset,
            repeat=asked.repeat,
            weights=after.get(WEIGHTS),
            pick=asked.pick,
        )
        if not found:
            return drawn, None
        place = place_drawn(after[MARK], drawn)
        return drawn, next(number for number, alternative in enumerate(found) if place in alternative.places)


def iter_previews(source: Source, options: PreviewOptions, progress: Callable[[int], None]) -> Iterator[Preview]:
    """The records that are asked for, in the order of the source, one in memory at a time.

    `progress` is told the offset that is done. Raises `UsageError` at the end when a key is not there.
    """
    previewer = Previewer(options)
    for key, record in _iter_asked(source, options, progress):
        yield previewer.preview(key, record)


def _iter_asked(source: Source, options: PreviewOptions, progress: Callable[[int], None]) -> Iterator[tuple[str, Any]]:
    layout = read_layout(source, options.max_record_bytes)
    if not options.keys:
        yield from islice((pair for piece in iter_source(source, layout) for pair in piece.records.pairs), options.count)
        return
    missing = dict.fromkeys(options.keys)
    records = 0
    for piece in iter_source(source, layout):
        found = dict(piece.records.pairs)
        for key in [key for key in missing if key in found]:
            del missing[key]
            yield key, found[key]
        if not missing:
            return
        records += len(piece.records.pairs)
        progress(piece.start + len(piece.data))
    names = ", ".join(map(quoted, missing))
    raise UsageError(
        f"{printable(source.name)}: found no record {names} among {records:,}. Keys are compared whole, folder and ending included."
    )
