"""How many tokens many texts have, and where their commas stand, exactly, at about a hundred megabytes a second.

Owns the sums over remembered pieces. Knows nothing of limits, chunks or statistics.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from capmerge.tokens_clean import is_local
from capmerge.tokens_ids import ClipTokenizer, FileTokenizer

if TYPE_CHECKING:
    from capmerge.tokens_table import Integers, Pieces

__all__ = ["TokenCounter", "TokensAndCommas"]

_SLOTS = 1 << 18
_BATCH = 512  # texts; more would leave the processor's cache, fewer pay the 0.2 ms of a batch more often
_FEW = 4  # texts, for which a batch is not worth it
_MOST_PIECES_WITH_COMMAS = 1 << 16


class TokensAndCommas(NamedTuple):
    """Token counts of texts and, for those it was asked of, which of their tokens are the token ","."""

    counts: "Integers"
    """(n_texts,)."""
    commas: dict[int, Sequence[int]]
    """By number of the text: the places among its tokens, from 0, in order."""


class TokenCounter:
    """Counts tokens with one tokenizer; the counts are those of `len(tokenizer.encode(text))`.

    CLIP's pattern never joins across white space and its byte-pair merges never join across words, so the counts of a text's pieces
    between spaces add up. Pieces are looked up as they stand in the caption: what the clean-up makes of one is found out once, when it is
    new. A text with a piece that ftfy would read together with its neighbours (see `is_local`) is encoded whole, as is every text of
    a tokenizer whose counts do not add up.

    Takes 56 bytes x `n_slots` (a power of 2, from 16) for the pieces it remembers, whatever it counts: 15 MB by default, for up to
    786,432 pieces. The same texts give the same counts in any order and grouping. Uses no threads.
    """

    def __init__(self, tokenizer: ClipTokenizer | FileTokenizer, n_slots: int = _SLOTS) -> None:
        from capmerge.tokens_table import CountTable

        self.tokenizer = tokenizer
        self._table = CountTable(n_slots)
        self._commas_of_piece: dict[str, list[int]] = {}

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, in order, without BOS and EOS and without any limit: ["a cat", "1girl, solo"] gives [2, 4].

        Fastest for hundreds of texts at once.
        """
        tokenizer = self.tokenizer
        if isinstance(tokenizer, FileTokenizer) or not tokenizer.adds_up:
            return [len(tokenizer.encode(text)) for text in texts]
        counts: list[int] = []
        for start in range(0, len(texts), _BATCH):
            batch = texts[start : start + _BATCH]
            counted = None if len(batch) < _FEW else self._count_batch(tokenizer, batch)
            counts += counted.totals.tolist() if counted else tokenizer.count_each(batch)
        return counts

    def count_tokens_and_commas(self, texts: Sequence[str], asked: "Callable[[Integers], Integers]") -> TokensAndCommas:
        """The number of tokens of each text, and the places of the commas in the texts that `asked` picks by their numbers of tokens.

        `asked` is given the counts of some texts and returns which of them, by their places in what it was given. Only for CLIP.
        """
        import numpy as np

        tokenizer = self.tokenizer
        assert isinstance(tokenizer, ClipTokenizer)  # no other has a token for the comma alone
        counts = np.zeros(len(texts), np.int64)
        commas: dict[int, Sequence[int]] = {}
        adds_up = tokenizer.adds_up and not any("," in literal for literal in tokenizer.added)
        for start in range(0, len(texts), _BATCH):
            batch = texts[start : start + _BATCH]
            counted = self._count_batch(tokenizer, batch) if adds_up else None
            totals = counted.totals if counted else np.array(tokenizer.count_each(batch), np.int64)
            counts[start : start + len(batch)] = totals
            numbers = asked(totals).tolist()
            in_pieces = [number for number in numbers if counted and number not in counted.whole]
            if counted and in_pieces:
                found = self._find_commas(tokenizer, counted, np.array(in_pieces, np.int64))
                commas |= {start + number: places for number, places in zip(in_pieces, found, strict=True)}
            for number in numbers:
                if start + number not in commas:
                    commas[start + number] = _commas(tokenizer, batch[number])
        return TokensAndCommas(counts, commas)

    @property
    def pieces_held(self) -> int:
        """How many pieces are remembered now."""
        return self._table.n_held

    def _count_batch(self, tokenizer: ClipTokenizer, texts: Sequence[str]) -> "_Counted | None":
        """The counts of `texts` and of their pieces; None where they hold what pieces cannot."""
        import numpy as np

        from capmerge.tokens_table import Pieces

        pieces = Pieces(texts)
        if pieces.hold_nul:
            return None
        counts, unknown = self._table.look_up(pieces)
        whole: set[int] = set()
        if len(unknown):
            unknown_texts = pieces.texts(unknown)
            numbers = dict(zip(unknown_texts, unknown.tolist(), strict=True))
            local = list(filter(is_local, numbers))
            new = dict(zip(local, tokenizer.count_each(local), strict=True))
            counts[unknown] = [new.get(text, -1) for text in unknown_texts]
            foreign = unknown[counts[unknown] < 0]
            counts[foreign] = 0
            whole.update(pieces.places(foreign))
            self._table.store(pieces, np.array([numbers[text] for text in new], np.int64), np.array([*new.values()], np.int64))
        totals: Integers = np.add.reduceat(counts, pieces.first)
        for place in whole:
            totals[place] = len(tokenizer.encode(texts[place]))
        return _Counted(pieces, counts, totals, whole)

    def _find_commas(self, tokenizer: ClipTokenizer, counted: "_Counted", numbers: "Integers") -> list[list[int]]:
        """The commas of each of the texts with these `numbers`, none of which was encoded whole."""
        import numpy as np

        pieces, counts = counted.pieces, counted.counts
        text_of = np.repeat(np.arange(len(pieces.first)), np.diff(pieces.first, append=len(pieces)))  # of each piece
        wanted = np.zeros(len(pieces.first), bool)
        wanted[numbers] = True
        commas, of_piece = pieces.find(ord(","))
        mine = wanted[text_of[of_piece]]
        commas, of_piece = commas[mine], of_piece[mine]
        # "tag," with a letter or digit before it, and "," alone: CLIP's pattern makes the comma a word, so it is the piece's last token.
        plain = pieces.ends_a_word(commas, of_piece)
        odd = np.unique(of_piece[~plain])
        is_odd = np.zeros(len(pieces), bool)
        is_odd[odd] = True
        last = of_piece[~is_odd[of_piece]]
        ends = np.cumsum(counts)
        inside = [self._commas_inside(tokenizer, text) for text in pieces.texts(odd)]
        odd_ends = np.repeat(ends[odd] - counts[odd], [len(places) for places in inside])
        places = np.concatenate((ends[last] - 1, odd_ends + np.array([place for some in inside for place in some], np.int64)))
        places.sort()
        starts = (ends[pieces.first] - counts[pieces.first])[numbers]
        edges = np.searchsorted(places, np.stack((starts, starts + counted.totals[numbers])))
        places -= np.repeat(starts, edges[1] - edges[0])  # they are of these texts and of no other
        listed = places.tolist()
        return [listed[i:j] for i, j in edges.T.tolist()]

    def _commas_inside(self, tokenizer: ClipTokenizer, piece: str) -> list[int]:
        found = self._commas_of_piece.get(piece)
        if found is None:
            if len(self._commas_of_piece) == _MOST_PIECES_WITH_COMMAS:
                self._commas_of_piece.clear()
            found = self._commas_of_piece[piece] = _commas(tokenizer, piece)
        return found


class _Counted(NamedTuple):
    """A batch of texts with their counts."""

    pieces: "Pieces"
    counts: "Integers"
    """Of each piece; of no use in texts that were counted whole."""
    totals: "Integers"
    """Of each text."""
    whole: set[int]
    """The numbers of the texts that were encoded whole."""


def _commas(tokenizer: ClipTokenizer, text: str) -> list[int]:
    return [place for place, index in enumerate(tokenizer.encode(text)) if index == tokenizer.comma]
