"""`--fit`: alternatives of at most N tokens, the longer ones left out or cut. Pure; knows the words to draw, not who merges them.

Tokens are counted on the text as it is trained: braces unescaped, an in-line wildcard at its longest.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import product
from typing import NamedTuple

from capmerge.errors import UsageError
from capmerge.families import CLIP
from capmerge.templates import Draw, MergeOptions, Template
from capmerge.tokens import TokenCounter, load_tokenizer
from capmerge.wildcard import MOST_OUTCOMES, escape, has_brace, parse_line, unbreakable_spans

# A full stop, a question or exclamation mark with the quotes or brackets it closes; the Chinese and Japanese ones need no space behind.
_SENTENCE_END = re.compile(r"""[.!?…]+["'”’»)\]]*(?=\s+[^a-z\s])|[。！？]+[」』”’）]*""")
_ABBREVIATION = re.compile(r"\b(?:[^\W\d_]|mr|mrs|ms|dr|st|vs|no|e\.g|i\.e)\.\Z", re.IGNORECASE)
_WORD_END = re.compile(r"(?<=\S)(?=\s)")


class Fitted(NamedTuple):
    """What became of a record's draws."""

    draws: list[Draw]
    """Those that are written; shares sum to 1."""
    left_out: list[Draw]
    """By `drop`."""
    cut: list[tuple[Draw, Draw]]
    """By `trim`: as it was, and as it is written."""
    too_long: int
    """How many are written although they have more than N tokens."""


class Fitter:
    """Fits draws into `options.fit_tokens`; `write` gives the line of a draw, `literals` the fixed text of a template.

    Raises `UsageError` when the fixed text of a template alone leaves no room to cut to.
    """

    def __init__(self, options: MergeOptions, write: Callable[[Draw], str], literals: Callable[[Template], Sequence[str]]) -> None:
        assert options.fit_tokens is not None  # else nobody builds a Fitter
        self.limit = options.fit_tokens
        self._cuts = options.fit_by == "trim"
        self._wildcards = options.caption_wildcards
        self._write = write
        self._counter = TokenCounter(load_tokenizer(CLIP[options.fit_family]))
        for template in options.templates() if self._cuts else ():
            fixed = "".join(literals(template))
            (count,) = self._counter.count_tokens([fixed])
            if count >= self.limit:
                raise UsageError(
                    f"--fit {self.limit} trim: the fixed text {fixed!r} has {count} tokens by itself, which leaves none for tags or caption. "
                    "Give a larger number, or a shorter --line, --prefix or --suffix."
                )

    def fit(self, draws: list[Draw]) -> Fitted:
        """The draws with none longer than the limit, as far as that leaves something.

        `drop` leaves out what is too long; when everything is, the shortest stays. Its share goes to the other lines
        of its template, and to the other templates when none is left. `trim` cuts the last field at the end of a whole
        tag or sentence; a field of which nothing fits goes, unless it is the only one: that is cut at a word, and a
        first word that is too long inside the word.
        """
        lengths = self.count_tokens([self._write(draw) for draw in draws])
        if not draws or max(lengths) <= self.limit:
            return Fitted(draws, [], [], 0)
        if self._cuts:
            fitted = [draw if length <= self.limit else self._cut(draw) for draw, length in zip(draws, lengths, strict=True)]
            cut = [(before, after) for before, after in zip(draws, fitted, strict=True) if before != after]
            return Fitted(fitted, [], cut, sum(length > self.limit for length in self.count_tokens([self._write(draw) for draw in fitted])))
        longest = max(self.limit, min(lengths))
        kept = [draw for draw, length in zip(draws, lengths, strict=True) if length <= longest]
        left_out = [draw for draw, length in zip(draws, lengths, strict=True) if length > longest]
        return Fitted(_dealt_again(draws, kept), left_out, [], len(kept) if longest > self.limit else 0)

    def count_tokens(self, lines: Sequence[str]) -> list[int]:
        """The tokens of each line as it is trained, of its longest text if it holds an in-line wildcard."""
        return self._counter.count_tokens(longest_texts(lines, self._counter))

    def _cut(self, draw: Draw) -> Draw:
        for field in reversed(draw.template.fields):
            found = self._longest_that_fits(draw, field, self._units(draw, field))
            if found:
                return found
            shorter = draw.template.without(field)
            if shorter is None:
                return self._cut_at_word(draw, field)
            draw = draw._replace(template=shorter)
            if self._fits(draw):
                return draw
        raise AssertionError("a template has a field")

    def _cut_at_word(self, draw: Draw, field: str) -> Draw:
        """The draw cut behind as many words of its only field as fit, at least one character."""
        value = draw.value(field)
        words = [match.start() for match in _WORD_END.finditer(value)]
        characters = range(1, words[0] if words else len(value))
        for ends in (words, characters):
            texts = self._cut_texts(draw, field, ends)
            found = self._longest_that_fits(draw, field, texts)
            if found:
                return found
        return draw.with_value(field, next(iter([*texts, value]))) if (texts := self._cut_texts(draw, field, characters)) else draw

    def _units(self, draw: Draw, field: str) -> list[str]:
        """The field's text up to each whole tag or sentence, the whole text not among them."""
        value = draw.value(field)
        ends = [match.start() for match in re.finditer(",", value)] if field == "tags" else list(_sentence_ends(value))
        return self._cut_texts(draw, field, ends)

    def _cut_texts(self, draw: Draw, field: str, ends: Iterable[int]) -> list[str]:
        """The field's text up to each of `ends`, where an intended wildcard may be cut; blank ones are left out."""
        value = draw.value(field)
        if field == "caption" and self._wildcards:
            spans = unbreakable_spans(value)
            ends = [end for end in ends if not any(start < end < stop for start, stop in spans)]
        texts = (value[:end].rstrip(", \t") for end in ends if end < len(value))
        return [text for text in dict.fromkeys(texts) if text.strip()]

    def _longest_that_fits(self, draw: Draw, field: str, texts: Sequence[str]) -> Draw | None:
        """The draw with the last of the growing `texts` in its field that fits, while the next one does not."""
        fitting, too_long = -1, len(texts)
        while too_long - fitting > 1:
            middle = (fitting + too_long) // 2
            if self._fits(draw.with_value(field, texts[middle])):
                fitting = middle
            else:
                too_long = middle
        return draw.with_value(field, texts[fitting]) if fitting >= 0 else None

    def _fits(self, draw: Draw) -> bool:
        (length,) = self.count_tokens([self._write(draw)])
        return length <= self.limit


def longest_texts(lines: Sequence[str], counter: TokenCounter) -> list[str]:
    """Of each line the text with the most tokens that it can become, the first of equals."""
    return [_longest_text(line, counter) if has_brace(line) else line for line in lines]


def _longest_text(line: str, counter: TokenCounter) -> str:
    parsed = parse_line(line)
    if parsed.count <= MOST_OUTCOMES:
        texts = [parsed.text(drawn) for drawn in product(*(range(len(options)) for options in parsed.groups))]
        return texts[_longest(texts, counter)]
    # Too many to list: the one made of the longest options.
    return parsed.text([_longest(options, counter) for options in parsed.groups])


def _longest(texts: Sequence[str], counter: TokenCounter) -> int:
    counts = counter.count_tokens(texts)
    return counts.index(max(counts))


def _sentence_ends(text: str) -> Iterator[int]:
    for match in _SENTENCE_END.finditer(text):
        if not _ABBREVIATION.search(text, max(0, match.end() - 8), match.end()):
            yield match.end()


def _dealt_again(draws: list[Draw], kept: list[Draw]) -> list[Draw]:
    """The kept draws with the shares of the others: first inside a template, then over the templates."""
    asked, left = _shares(draws), _shares(kept)
    total = sum((asked[template] for template in left), Fraction(0))
    return [draw._replace(share=draw.share / left[draw.template] * asked[draw.template] / total) for draw in kept]


def _shares(draws: list[Draw]) -> dict[Template, Fraction]:
    shares: dict[Template, Fraction] = {}
    for draw in draws:
        shares[draw.template] = shares.get(draw.template, Fraction(0)) + draw.share
    return shares
