"""The token lengths of a record's alternatives, counted as `stats` counts them."""

from collections.abc import Sequence
from typing import Any

from capmerge.captions.alternatives import trained_alternatives
from capmerge.captions.flat import read_flat
from capmerge.captions.merge import Merger
from capmerge.captions.templates import MergeOptions
from capmerge.captions.written import BrokenRecordError
from capmerge.tokens.counter import TokenCounter
from capmerge.tokens.families import TokenizerFamily
from capmerge.tokens.load import load_readers

Lengths = list[int]
"""The tokens of each alternative without BOS and EOS; that of an in-line wildcard at its longest.

It is empty for a record without text."""


class AlternativeLengths:
    """Counts the tokens of records: rewritten ones as they are, others as `rewrite` would write."""

    def __init__(self, family: TokenizerFamily) -> None:
        self._merger = Merger(MergeOptions(allow_rewritten=True))
        self._counter = TokenCounter(load_readers(family)[0])

    def measure(self, records: Sequence[Any]) -> list[Lengths | str]:
        """The lengths of each record, or the reason why it cannot be rewritten or read.

        The records are rewritten in place.
        """
        # Merge all records, and read their alternatives.
        failures = dict(self._merger.merge_all(list(records)))
        self._merger.tally.take()
        found: list[Lengths | str] = []
        texts: list[str] = []
        counts: list[list[int]] = []
        for number, record in enumerate(records):
            counts.append([])
            if number in failures:
                found.append(str(failures[number]))
                continue
            found.append([])
            if flat := read_flat(record):
                counts[-1] = [1] * len(flat.texts)
                texts += flat.texts
                continue
            try:
                alternatives = trained_alternatives(record)
            except BrokenRecordError as error:
                found[-1] = str(error)
                continue
            for alternative in alternatives:
                counts[-1].append(len(alternative.texts))
                texts += alternative.texts

        # Count the texts of all records together.
        tokens = iter(self._counter.count_tokens(texts))
        for lengths, texts_of_each in zip(found, counts, strict=True):
            if isinstance(lengths, list):
                lengths += [max(next(tokens) for _ in range(some)) for some in texts_of_each]
        return found
