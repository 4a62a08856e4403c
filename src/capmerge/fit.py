"""`--fit`: alternatives of at most N tokens, the longer ones left out or cut. Pure; knows the words to draw, not who merges them.

Tokens are counted on the text as it is trained: braces unescaped, an in-line wildcard at its longest.
"""

import re
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from fractions import Fraction
from itertools import product
from typing import NamedTuple, TypeAlias

from capmerge.errors import UsageError
from capmerge.families import CLIP
from capmerge.templates import Draw, MergeOptions, Template
from capmerge.tokens import TokenCounter, load_tokenizer
from capmerge.wildcard import MOST_OUTCOMES, has_brace, parse_line, unbreakable_spans

# A full stop, a question or exclamation mark with the quotes or brackets it closes; the Chinese and Japanese ones need no space behind.
_SENTENCE_END = re.compile(r"""[.!?…]+["'”’»)\]]*(?=\s+[^a-z\s])|[。！？]+[」』”’）]*""")  # noqa: RUF001
_ABBREVIATION = re.compile(r"\b(?:[^\W\d_]|mr|mrs|ms|dr|st|vs|no|e\.g|i\.e)\.\Z", re.IGNORECASE)
_WORD_END = re.compile(r"(?<=\S)(?=\s)")


_Search: TypeAlias = Generator[Draw, bool, Draw]
"""A search yields what it wants measured, is sent whether that fits, and returns what it found."""


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
                    f"--fit {self.limit} trim: the fixed text {fixed!r} has {count} tokens by itself, which leaves none for tags or "
                    "caption. Give a larger number, or a shorter --line, --prefix or --suffix."
                )

    def fit_all(self, records: Sequence[list[Draw]]) -> list[Fitted]:
        """The draws of each record with none longer than the limit, as far as that leaves something.

        `drop` leaves out what is too long; when everything is, the shortest stays. Its share goes to the other lines
        of its template, and to the other templates when none is left. `trim` cuts the last field at the end of a whole
        tag or sentence; a field of which nothing fits goes, unless it is the only one: that is cut at a word, and a
        first word that is too long inside the word. Fastest for hundreds of records at once.
        """
        lengths = iter(self._count_tokens([draw for draws in records for draw in draws]))
        measured = [[(draw, next(lengths)) for draw in draws] for draws in records]
        return self._trim(measured) if self._cuts else [self._drop(draws) for draws in measured]

    def _drop(self, measured: list[tuple[Draw, int]]) -> Fitted:
        draws = [draw for draw, _ in measured]
        if all(length <= self.limit for _, length in measured):
            return Fitted(draws, [], [], 0)
        longest = max(self.limit, min(length for _, length in measured))
        kept = [draw for draw, length in measured if length <= longest]
        left_out = [draw for draw, length in measured if length > longest]
        return Fitted(_dealt_again(draws, kept), left_out, [], len(kept) if longest > self.limit else 0)

    def _trim(self, records: list[list[tuple[Draw, int]]]) -> list[Fitted]:
        too_long = [draw for measured in records for draw, length in measured if length > self.limit]
        cut = list(self._cut_all(too_long))
        found = iter(zip(cut, self._count_tokens(cut), strict=True))
        fitted = []
        for measured in records:
            after = [next(found) if length > self.limit else (draw, length) for draw, length in measured]
            changed = [(was, now) for (was, _), (now, _) in zip(measured, after, strict=True) if was != now]
            fitted.append(Fitted([draw for draw, _ in after], [], changed, sum(length > self.limit for _, length in after)))
        return fitted

    def _cut_all(self, draws: list[Draw]) -> Iterator[Draw]:
        """Each draw cut. All searches go on together, so that what they ask in a round is counted at once."""
        searches = [self._cut(draw) for draw in draws]
        found: dict[int, Draw] = {}
        answers: dict[int, bool | None] = dict.fromkeys(range(len(draws)))
        while answers:
            asked: dict[int, Draw] = {}
            for number, fits in answers.items():
                try:
                    asked[number] = searches[number].send(fits)  # type: ignore[arg-type]  # a generator starts with None
                except StopIteration as stop:
                    found[number] = stop.value
            lengths = self._count_tokens(list(asked.values()))
            answers = {number: length <= self.limit for number, length in zip(asked, lengths, strict=True)}
        return (found[number] for number in range(len(draws)))

    def _count_tokens(self, draws: list[Draw]) -> list[int]:
        """The tokens of each as it is trained, of its longest text if it holds an in-line wildcard."""
        return [tokens for _, tokens in longest_texts([self._write(draw) for draw in draws], self._counter)]

    def _cut(self, draw: Draw) -> _Search:
        """The draw cut to fit."""
        for field in reversed(draw.template.fields):
            found = yield from _longest_that_fits(draw, field, self._units(draw, field))
            if found:
                return found
            shorter = draw.template.without(field)
            if shorter is None:
                break
            draw = draw._replace(template=shorter)
            if (yield draw):
                return draw
        return (yield from self._cut_at_word(draw))

    def _cut_at_word(self, draw: Draw) -> _Search:
        """The draw of one field cut behind as many words as fit, else inside the first word, of which a character stays."""
        (field,) = draw.template.fields
        value = draw.value(field)
        words = self._cut_texts(draw, field, [match.start() for match in _WORD_END.finditer(value)])
        found = yield from _longest_that_fits(draw, field, words)
        if found:
            return found
        inside = self._cut_texts(draw, field, range(1, len(words[0] if words else value)))
        found = yield from _longest_that_fits(draw, field, inside)
        return found or draw.with_value(field, [*inside, *words, value][0])

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


def longest_texts(lines: Sequence[str], counter: TokenCounter) -> list[tuple[str, int]]:
    """Of each line the text with the most tokens that it can become, the first of equals, and its tokens.

    A line of more than `MOST_OUTCOMES` texts gives the one made of each group's longest option.
    """
    texts = [_texts(line, counter) if has_brace(line) else [line] for line in lines]
    counts = iter(counter.count_tokens([text for some in texts for text in some]))
    return [max(((text, next(counts)) for text in some), key=lambda counted: counted[1]) for some in texts]


def _texts(line: str, counter: TokenCounter) -> list[str]:
    parsed = parse_line(line)
    if parsed.ways <= MOST_OUTCOMES:
        return [parsed.text(drawn) for drawn in product(*(range(len(options)) for options in parsed.groups))]
    counts = [counter.count_tokens(options) for options in parsed.groups]
    return [parsed.text([of_group.index(max(of_group)) for of_group in counts])]


def _longest_that_fits(draw: Draw, field: str, texts: Sequence[str]) -> Generator[Draw, bool, Draw | None]:
    """The draw with the last of the growing `texts` in its field that fits, while the next one does not."""
    fitting, too_long = -1, len(texts)
    middle = len(texts) // 2
    while too_long - fitting > 1:
        middle = min(max(middle, fitting + 1), too_long - 1)
        if (yield draw.with_value(field, texts[middle])):
            fitting = middle
        else:
            too_long = middle
        middle = (fitting + too_long) // 2
    return draw.with_value(field, texts[fitting]) if fitting >= 0 else None


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
