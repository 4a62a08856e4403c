"""What records of one shape are meant to train, prepared once for all of them.

A shape is whether a record has tags, and how many caption lines it has.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from math import gcd
from operator import itemgetter

from capmerge.captions.line_counts import lines_of_templates, weights_fit, whole_weights
from capmerge.captions.line_template import Template
from capmerge.captions.templates import Draw
from capmerge.captions.wildcard import has_stand_in


class DrawPlan:
    """What all records of one shape are meant to train: the text of each draw, and its weight.

    A draw is given by its fields, each of them "tags" or "caption", by the fixed texts before,
    between and after these, and by the number of the caption line.
    """

    def __init__(self, draws: Sequence[Draw], literals: Callable[[Template], list[str]]) -> None:
        self._draws = [
            (draw.template.fields, literals(draw.template), int(draw.caption or 0))
            for draw in draws
        ]
        self.weights = whole_weights([draw.share for draw in draws]) if draws else []
        self._groups: dict[Template, list[int]] = {}  # the numbers of the draws of each template
        for number, draw in enumerate(draws):
            self._groups.setdefault(draw.template, []).append(number)
        # Places in a list of the tags and all caption lines, where every text is one of these.
        bare = all(len(fields) == 1 and not any(texts) for fields, texts, _ in self._draws)
        places = [0 if fields[0] == "tags" else 1 + number for fields, _, number in self._draws]
        numbers = [n for n, weight in enumerate(self.weights) for _ in range(weight)]
        self._bare = _picker(places) if bare else None
        self._repeats = _picker(numbers)
        self._is_repeated = set(self.weights) > {1}
        self.letters = "".join([draws[number].template.style for number in numbers])
        """The letter of each line of a record that has the exact weights and no two equal lines."""
        self.lines_of = None
        """Picks these lines from the tags and all caption lines, if each is one of them."""
        if bare and weights_fit(self.weights, len(draws)):
            self.lines_of = _picker([places[number] for number in numbers])

    def texts(self, tags: str, captions: Sequence[str]) -> Sequence[str]:
        """Return the text of each draw."""
        if self._bare:
            return self._bare((tags, *captions))
        texts: list[str] = []
        for fields, (first, *literals), number in self._draws:
            text = first
            for field, literal in zip(fields, literals, strict=True):
                text += (tags if field == "tags" else captions[number]) + literal
            texts.append(text)
        return texts

    def repeated(self, texts: Sequence[str]) -> Sequence[str]:
        """Return the texts of the draws, each as often as its weight says."""
        return self._repeats(texts) if self._is_repeated else texts

    def is_rounded_to(self, read: Sequence[str], texts: Sequence[str]) -> bool:
        """Return whether `read` are the texts of the draws, with rounded weights that are right.

        It is False where the exact weights fit, and for texts with stand-ins. A text that two
        templates give may count for either of them.
        """
        weights: dict[str, int] = {}
        for text, weight in zip(texts, self.weights, strict=True):
            weights[text] = weights.get(text, 0) + weight
        divisor = gcd(*weights.values())
        if weights_fit([weight // divisor for weight in weights.values()], len(texts)):
            return False
        counts = Counter(read)
        if counts.keys() - weights.keys() or any(map(has_stand_in, weights)):
            return False
        shares = [sum(self.weights[n] for n in group) for group in self._groups.values()]
        lines = lines_of_templates([Fraction(share, sum(shares)) for share in shares])
        of_templates = [{texts[n] for n in group} for group in self._groups.values()]
        for own, count in zip(of_templates, lines, strict=True):
            others = set().union(*(some for some in of_templates if some is not own))
            least, most = (
                sum(lines) * sum(counts[text] for text in some) for some in (own - others, own)
            )
            if not least <= count * len(read) <= most:
                return False
        return True


def _picker(places: list[int]) -> Callable[[Sequence[str]], Sequence[str]]:
    """Return a function that picks the items at these places."""
    if len(places) < 2:  # itemgetter would give the bare item
        return lambda items: [items[place] for place in places]
    return itemgetter(*places)
