"""What one epoch makes of a record's caption: the drawn line, its tags shuffled and dropped, or nothing. Pure; knows no tokens or tensors.

Drawing and brace expansion are `capmerge.wildcard`'s. Rules of the rest: sd-scripts-facts B2
(order) and B4 (tags). Different from sd-scripts: shuffling, warm-up and tag dropout touch the tags
that the rewrite marked, never sentences, unless asked.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

from capmerge.captions.draw import Drawn, draw_line
from capmerge.captions.fields import TAG_SPANS
from capmerge.captions.wildcard import parse_line
from capmerge.captions.written import BrokenRecordError, read_written
from capmerge.rng import Chance, SampleId
from capmerge.tokens.vocabulary import read_clip_vocabulary
from trainer.config.settings import CaptionSettings, TextSettings

RANDOM_WORDS = 4
"""Words of a random caption. Source: somepago/DCR, datasets.py, `randrepl` (the code of arXiv 2305.20086)."""

_FINE = 1 << 53  # as fine as a float below 1


class TrainedCaption(NamedTuple):
    """A caption as it is encoded."""

    text: str
    style: str
    """`t`, `c` or `b`, as the rewrite marked the drawn line; "" for a record without text."""
    events: tuple[str, ...]
    """Of caption_dropped, random_caption and word_repeated, those that happened."""


def train_caption(
    record: dict[str, Any],
    settings: CaptionSettings,
    text: TextSettings,
    sample: SampleId,
    *,
    step: int = 0,
    max_steps: int = 0,
) -> TrainedCaption:
    """The text that `sample` of a rewritten `record` trains, a pure function of the arguments.

    Only token warm-up looks at `step`, the optimizer step, and at `max_steps`, the steps of the
    whole run. Raises `BrokenRecordError` for a record that is not as a rewrite leaves it.
    """
    line = _draw(record, settings, sample)
    chance = Chance(sample)
    if not line.text:
        return TrainedCaption("", line.style, ())
    every = settings.dropout_every_epochs
    if (every and (sample.epoch + 1) % every == 0) or _happens(
        chance, settings.dropout_rate, "caption dropout"
    ):
        return TrainedCaption("", line.style, ("caption_dropped",))
    if _happens(chance, text.random_caption_rate, "random caption"):
        return TrainedCaption(_random_caption(chance), line.style, ("random_caption",))
    warmup_steps = (
        settings.token_warmup_steps
        if settings.token_warmup_steps >= 1
        else settings.token_warmup_steps * max_steps
    )
    trained = _Shuffle(settings, math.floor(warmup_steps), step, chance).line(line)
    if settings.secondary_separator:
        trained = trained.replace(settings.secondary_separator, settings.separator)
    if _happens(chance, text.word_repeat_rate, "word repeat"):
        return TrainedCaption(_with_a_word_twice(trained, chance), line.style, ("word_repeated",))
    return TrainedCaption(trained, line.style, ())


class _Line(NamedTuple):
    """A drawn line, its wildcards expanded and nothing doubled."""

    text: str
    style: str
    tags: tuple[int, int]
    """[start, end) of its tags; all of it for style `t`, nothing for `c`."""


def _draw(record: dict[str, Any], settings: CaptionSettings, sample: SampleId) -> _Line:
    written = read_written(record)
    if not written.lines:
        return _Line("", "", (0, 0))
    drawn = draw_line(written.caption, sample, weights=written.weights, pick=settings.pick)
    place = written.place_of(drawn)
    style, span = written.letters[place], written.span_at(place)
    tags = (0, len(drawn.text)) if style == "t" else (0, 0)
    if span:
        options = () if written.is_inline else drawn.options
        tags = _tags_of_both(written.lines[place], drawn, options, span)
    return _Line(drawn.text, style, tags)


def _tags_of_both(
    line: str, drawn: Drawn, options: Sequence[int], span: tuple[int, int]
) -> tuple[int, int]:
    """Where the tags stand in what was drawn: `span` is where they stand in the `line` as written, braces doubled.

    A rewrite doubles the braces of tags and keeps them from fusing with their neighbours, so the
    parts read by themselves as they do together, and wildcards are in the caption alone.
    """
    start, end = span
    before, tags, after = (parse_line(part) for part in (line[:start], line[start:end], line[end:]))
    opened = len(before.groups)
    if not tags.groups and opened + len(after.groups) == len(options):
        texts = [before.text(options[:opened]), tags.text(()), after.text(options[opened:])]
        if "".join(texts) == drawn.text:
            return len(texts[0]), len(texts[0]) + len(texts[1])
    raise BrokenRecordError(
        f'"{TAG_SPANS}" names [{start}, {end}) of a line of {len(line)} characters, which cuts it inside a wildcard.'
    )


class _Shuffle(NamedTuple):
    """The split, shuffle and join of sd-scripts (facts B4)."""

    settings: CaptionSettings
    warmup_steps: int
    step: int
    chance: Chance

    def line(self, line: _Line) -> str:
        """The text of a line with its flexible tags in another order, or fewer of them; as it is where no setting asks for that."""
        settings = self.settings
        start, end = (0, len(line.text)) if settings.sentences else line.tags
        if start == end or not (settings.shuffle or self.warmup_steps or settings.tag_dropout_rate):
            return line.text
        whole = start == 0 and end == len(line.text)
        if settings.keep_tokens_separator and settings.keep_tokens_separator in line.text:
            return self._between_separators(line.text, start, end, whole=whole)
        tags = [tag.strip() for tag in line.text[start:end].strip().split(settings.separator)]
        kept = settings.keep_tokens
        return self._placed(
            line.text[:start], tags[:kept] + self._flexible(tags[kept:]), line.text[end:]
        )

    def _between_separators(self, text: str, start: int, end: int, *, whole: bool) -> str:
        """Tags before the first separator and behind the second stay; the separators go, a third one stays. Empty tags go too."""
        separator = self.settings.keep_tokens_separator
        head, middle, *tail = text.split(separator, 2)
        if whole:
            return self._join(
                [
                    *self._tags(head),
                    *self._flexible(self._tags(middle)),
                    *(tag for part in tail for tag in self._tags(part)),
                ]
            )
        before = len(head) + len(separator)
        start, end = max(0, start - before), min(len(middle), end - before)
        if start < end:
            middle = self._placed(
                middle[:start], self._flexible(self._tags(middle[start:end])), middle[end:]
            )
        return self._join([part for part in map(self._trimmed, (head, middle, *tail)) if part])

    def _tags(self, text: str) -> list[str]:
        return [tag for tag in map(str.strip, text.split(self.settings.separator)) if tag]

    def _join(self, texts: Sequence[str]) -> str:
        return f"{self.settings.separator} ".join(texts)

    def _trimmed(self, text: str) -> str:
        """A part of a line without the separator towards its neighbours."""
        return (
            text.strip()
            .removeprefix(self.settings.separator)
            .removesuffix(self.settings.separator)
            .strip()
        )

    def _placed(self, before: str, tags: list[str], after: str) -> str:
        """The tags in their place; where none is left, what stands around them without the separators towards them."""
        if tags:
            return before + self._join(tags) + after
        return self._join([part for part in map(self._trimmed, (before, after)) if part])

    def _flexible(self, tags: list[str]) -> list[str]:
        """Warm-up, then shuffle, then dropout."""
        settings = self.settings
        if self.step < self.warmup_steps:
            least = settings.token_warmup_min
            tags = tags[: self.step * (len(tags) - least) // self.warmup_steps + least]
        if settings.shuffle:
            tags = _shuffled(tags, self.chance)
        if settings.tag_dropout_rate and tags:
            drawn = self.chance.below(_FINE ** len(tags), "tag dropout")
            kept = []
            for tag in tags:
                drawn, number = divmod(drawn, _FINE)
                if number >= settings.tag_dropout_rate * _FINE:
                    kept.append(tag)
            tags = kept
        return tags


def _shuffled(tags: list[str], chance: Chance) -> list[str]:
    """The tags in one of their orders, each as likely: one number says which."""
    left, order = list(tags), chance.below(math.factorial(len(tags)), "shuffle")
    shuffled = []
    while left:
        order, place = divmod(order, len(left))
        shuffled.append(left.pop(place))
    return shuffled


def _happens(chance: Chance, rate: float, purpose: str) -> bool:
    return rate > 0 and chance.below(_FINE, purpose) < rate * _FINE


@cache
def _words() -> list[str]:
    """Words of two letters or more among CLIP's tokens, in their order: 60 ms, for those who ask for random captions."""
    words = [
        token.removesuffix("</w>") for token in read_clip_vocabulary().ids if token.endswith("</w>")
    ]
    return [word for word in words if len(word) > 1 and word.isascii() and word.isalpha()]


def _random_caption(chance: Chance) -> str:
    """A few random words. Source: arXiv 2305.20086, RC; its code decodes random tokens, here they are whole words."""
    words = _words()
    return " ".join(
        words[chance.below(len(words), f"random word {number}")] for number in range(RANDOM_WORDS)
    )


def _with_a_word_twice(text: str, chance: Chance) -> str:
    """The text with one of its words at a second, random place. Source: arXiv 2305.20086, CWR."""
    words = text.split(" ")
    word = words[chance.below(len(words), "repeated word")]
    words.insert(chance.below(len(words) + 1, "place of the repeated word"), word)
    return " ".join(words)
