"""The longest text that a line can become, in tokens: in-line wildcards count at their longest.

The line "a {cat|very big dog}" becomes "a cat" or "a very big dog"; the second is its longest.
"""

from collections.abc import Sequence
from itertools import product
from operator import itemgetter
from typing import TYPE_CHECKING

from capmerge.captions.wildcard import parse_line

if TYPE_CHECKING:
    from capmerge.tokens.counter import TokenCounter


def longest_texts(lines: Sequence[str], counter: "TokenCounter") -> list[tuple[str, int]]:
    """Return the longest text that each line can become, and its length in tokens.

    Among equally long texts it is the first. For a line with too many texts to list it is the text
    that combines each group's longest option.
    """
    texts, further = unfolded(lines, counter)
    counted = list(zip(texts, counter.count_tokens(texts), strict=True))
    for number, place in further.items():
        counted[number] = max([counted[number], *counted[place]], key=itemgetter(1))
    return counted[: len(lines)]


def unfolded(lines: Sequence[str], counter: "TokenCounter") -> tuple[list[str], dict[int, slice]]:
    """Return a text of each line, then the further texts that lines with braces can become.

    The dict holds the places of the further texts of each line that has braces.
    """
    # Nearly all lines are their only text.
    texts = [*lines]
    further: dict[int, slice] = {}
    for number, line in enumerate(lines):
        if "{" in line or "}" in line:
            texts[number], *others = _texts(line, counter)
            further[number] = slice(len(texts), len(texts) + len(others))
            texts += others
    return texts, further


def _texts(line: str, counter: "TokenCounter") -> list[str]:
    parsed = parse_line(line)
    if parsed.is_listable():
        return [
            parsed.text(drawn)
            for drawn in product(*(range(len(options)) for options in parsed.groups))
        ]
    counts = [counter.count_tokens(options) for options in parsed.groups]
    return [parsed.text([of_group.index(max(of_group)) for of_group in counts])]
