"""The caption that one sample trains: a drawn line, its tags shuffled or dropped, or nothing.

`capmerge.captions` draws the line and expands its braces. The other rules follow sd-scripts-facts
B2 (order) and B4 (tags), with one difference: shuffling, warm-up and tag dropout change only the
tags that the rewrite marked, and sentences only when the settings ask for it. The functions are
pure and know neither tokens nor tensors.
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
"""The number of words in a random caption.

Source: somepago/DCR, datasets.py, `randrepl` (the code of arXiv 2305.20086).
"""

# The resolution of a float just below 1.
_FINE = 1 << 53


class TrainedCaption(NamedTuple):
    """A caption as it will be encoded."""

    text: str
    style: str
    """`t`, `c` or `b`, as the rewrite marked the drawn line; "" for a record without text."""
    events: tuple[str, ...]
    """Those of caption_dropped, random_caption and word_repeated that happened."""


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

    Only token warm-up uses `step`, the optimizer step, and `max_steps`, the steps of the whole run.
    Raises `BrokenRecordError` for a record that is not as a rewrite leaves it.
    """
    # Draw a line; it may be empty, dropped, or replaced by random words.
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
    # Change the tags of the line, then perhaps repeat a word.
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
    """A drawn line with its wildcards expanded and its doubled braces undone."""

    text: str
    style: str
    tags: tuple[int, int]
    """[start, end) of its tags: the whole line for style `t`, nothing for `c`."""


def _draw(record: dict[str, Any], settings: CaptionSettings, sample: SampleId) -> _Line:
    written = read_written(record)
    if not written.lines:
        return _Line("", "", (0, 0))
    # Draw a line, and locate its tags: all of style `t`, the marked span of style `b`.
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
    """The [start, end) of the tags in the drawn text.

    `span` is their place in the `line` as written, with braces doubled. A rewrite doubles the
    braces of tags and keeps them from fusing with their neighbours, so the three parts can be
    parsed separately, and only the caption has wildcards.
    """
    start, end = span
    before, tags, after = (parse_line(part) for part in (line[:start], line[start:end], line[end:]))
    opened = len(before.groups)
    if not tags.groups and opened + len(after.groups) == len(options):
        texts = [before.text(options[:opened]), tags.text(()), after.text(options[opened:])]
        if "".join(texts) == drawn.text:
            return len(texts[0]), len(texts[0]) + len(texts[1])
    raise BrokenRecordError(
        f'"{TAG_SPANS}" names [{start}, {end}) of a line of {len(line)} characters, '
        "which cuts it inside a wildcard."
    )


class _Shuffle(NamedTuple):
    """Splitting, shuffling and joining of tags as in sd-scripts (facts B4)."""

    settings: CaptionSettings
    warmup_steps: int
    step: int
    chance: Chance

    def line(self, line: _Line) -> str:
        """The text of a line with its flexible tags shuffled and some of them dropped.

        The line is returned unchanged when no setting asks for that.
        """
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
        """The line joined again, with only the tags between the first two separators flexible.

        Both separators are removed; a third one stays. Empty tags are removed too.
        """
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
        """A part of a line without the separators next to its neighbours."""
        return (
            text.strip()
            .removeprefix(self.settings.separator)
            .removesuffix(self.settings.separator)
            .strip()
        )

    def _placed(self, before: str, tags: list[str], after: str) -> str:
        """The tags between `before` and `after`.

        When no tag is left, the two are joined without the separators next to the tags.
        """
        if tags:
            return before + self._join(tags) + after
        return self._join([part for part in map(self._trimmed, (before, after)) if part])

    def _flexible(self, tags: list[str]) -> list[str]:
        """The flexible tags after warm-up, shuffle and dropout, applied in this order."""
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
    """The tags in a random order, all orders being equally likely; one number selects it."""
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
    """The words of two letters or more among CLIP's tokens, in the order of the vocabulary.

    Reading them takes 60 ms, so it is done only when random captions are requested.
    """
    words = [
        token.removesuffix("</w>") for token in read_clip_vocabulary().ids if token.endswith("</w>")
    ]
    return [word for word in words if len(word) > 1 and word.isascii() and word.isalpha()]


def _random_caption(chance: Chance) -> str:
    """A caption of a few random words.

    Source: arXiv 2305.20086, RC. Its code decodes random tokens; here they are whole words.
    """
    words = _words()
    return " ".join(
        words[chance.below(len(words), f"random word {number}")] for number in range(RANDOM_WORDS)
    )


def _with_a_word_twice(text: str, chance: Chance) -> str:
    """The text with one of its words repeated at a random place. Source: arXiv 2305.20086, CWR."""
    words = text.split(" ")
    word = words[chance.below(len(words), "repeated word")]
    words.insert(chance.below(len(words) + 1, "place of the repeated word"), word)
    return " ".join(words)
