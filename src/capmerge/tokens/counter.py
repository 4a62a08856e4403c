"""Counts the tokens of many texts exactly, and locates their commas, at about 100 MB per second.

This module owns the sums over remembered pieces. It knows neither limits nor chunks.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

from capmerge.tokens.clean import is_local, is_plain
from capmerge.tokens.tokenizer import ClipTokenizer, FileTokenizer

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from capmerge.tokens.count_table import Integers, Pieces

_SLOTS = 1 << 18
# The texts of a batch. More would not stay in the processor's cache, and fewer would pay the 0.2 ms
# of a batch more often.
_BATCH = 512
_FEW = 4  # fewer texts than this are not worth a batch
_MOST_PIECES_WITH_COMMAS = 1 << 16
_MOST_ODD_PIECES, _LONGEST_ODD_PIECE = 1 << 13, 256


class TokensAndCommas(NamedTuple):
    """The token counts of texts, and the positions of the comma tokens of some of them."""

    counts: "Integers"
    """The number of tokens of each text, (n_texts,)."""
    commas: "Integers"
    """The positions of the tokens "," among all tokens of all texts, from 0, in order."""


class TokenCounter:
    """Counts tokens with one tokenizer; the counts are those of `len(tokenizer.encode(text))`.

    CLIP's pattern never joins across white space, and its byte-pair merges never join across words,
    so the counts of a text's pieces between spaces add up. Pieces are looked up as they are in the
    caption; each is cleaned only once, when it is new. A text with a piece that ftfy would read
    together with its neighbours (see `is_local`) is encoded whole, as is every text of a tokenizer
    whose counts do not add up.

    A counter takes 56 bytes x `n_slots` (a power of 2, from 16) for the pieces that it remembers,
    whatever it counts: 15 MB by default, for up to 786,432 pieces. The same texts give the same
    counts in any order and grouping. It uses no threads.
    """

    def __init__(self, tokenizer: ClipTokenizer | FileTokenizer, n_slots: int = _SLOTS) -> None:
        from capmerge.tokens.count_table import CountTable

        self.tokenizer = tokenizer
        self._table = CountTable(n_slots)
        self._odd: dict[str, int] = {}
        """The counts of pieces that are too long for the table, and -1 for those that have none."""
        self._commas_of_piece: dict[str, list[int]] = {}

    def count_tokens(self, texts: Sequence[str]) -> list[int]:
        """The number of tokens of each text, in order, without BOS and EOS and without any limit.

        ["a cat", "1girl, solo"] gives [2, 4]. It is fastest for hundreds of texts at once.
        """
        return [count for _, counts, _ in self.batches(texts) for count in counts]

    def batches(
        self, texts: Sequence[str]
    ) -> "Iterator[tuple[Sequence[str], list[int], CountedBatch | None]]":
        """Count as `count_tokens` does, some hundred texts after the other.

        Yields texts, the number of tokens of each, and the counts of their pieces, or None where
        the texts were counted one by one.
        """
        tokenizer = self.tokenizer
        for start in range(0, len(texts), _BATCH):
            batch = texts[start : start + _BATCH]
            if isinstance(tokenizer, FileTokenizer) or not tokenizer.adds_up:
                yield batch, [len(tokenizer.encode(text)) for text in batch], None
                continue
            counted = None if len(batch) < _FEW else self._count_batch(tokenizer, batch)
            counts = counted.totals.tolist() if counted else tokenizer.count_each(batch)
            yield batch, counts, counted

    def count_tokens_and_commas(
        self, texts: Sequence[str], asked: "Callable[[Integers], Integers]"
    ) -> TokensAndCommas:
        """The number of tokens of each text, and the positions of the comma tokens in some texts.

        `asked` picks those texts by their numbers of tokens: it is given an array of counts, and
        returns the indices of some of them. Only a CLIP tokenizer can be used.
        """
        import numpy as np

        tokenizer = self.tokenizer
        assert isinstance(tokenizer, ClipTokenizer)  # no other has a token for the comma alone
        adds_up = tokenizer.adds_up and not any("," in literal for literal in tokenizer.added)
        counts, commas, done = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], 0
        for start in range(0, len(texts), _BATCH):
            batch = texts[start : start + _BATCH]
            counted = self._count_batch(tokenizer, batch) if adds_up else None
            totals = counted.totals if counted else np.array(tokenizer.count_each(batch), np.int64)
            starts = np.cumsum(totals) - totals + done
            chosen = np.zeros(len(batch), bool)
            chosen[asked(totals)] = True
            # The commas of texts that were encoded whole come from their ids, all others from their
            # pieces.
            for number in np.flatnonzero(chosen).tolist():
                if counted is None or number in counted.whole:
                    commas.append(
                        np.array(_commas(tokenizer, batch[number]), np.int64) + starts[number]
                    )
                    chosen[number] = False
            if counted and chosen.any():
                commas.append(self._find_commas(tokenizer, counted, starts, chosen))
            counts.append(totals)
            done += int(totals.sum())
        return TokensAndCommas(np.concatenate(counts), np.sort(np.concatenate(commas)))

    def count_without_comma(
        self,
        batch: "CountedBatch",
        places: "Integers",
        numbers: "Integers",
        of_text: "Integers",
    ) -> "Integers":
        """The counts of pieces of a batch without the commas that are their last characters.

        `places` are the offsets of the commas, `numbers` those of the pieces, and `of_text` those
        of their texts. The count is -1 where it depends on the neighbours of the piece.
        """
        import numpy as np

        tokenizer, pieces = self.tokenizer, batch.pieces
        assert isinstance(tokenizer, ClipTokenizer)  # no other has batches
        # Behind a letter or digit, CLIP's pattern makes the comma a word of its own. A part of a
        # piece of ASCII that is cleaned by itself is, too; of other pieces that is not certain.
        counts = batch.counts.take(numbers) - 1
        are_ascii = np.fromiter(map(str.isascii, batch.texts), bool, len(batch.texts))
        plain = pieces.ends_a_word(places, numbers) & are_ascii[of_text]
        if any("," in literal for literal in tokenizer.added):
            plain[:] = False
        others = np.flatnonzero(~plain)
        counts[others] = self._counts_of(tokenizer, pieces.without_last_byte(numbers.take(others)))
        return counts

    def _count_batch(self, tokenizer: ClipTokenizer, texts: Sequence[str]) -> "CountedBatch | None":
        """The counts of `texts` and of their pieces; None if a text contains a NUL of its own."""
        import numpy as np

        from capmerge.tokens.count_table import Pieces

        pieces = Pieces(texts)
        if pieces.hold_nul:
            return None
        counts = self._counts_of(tokenizer, pieces)
        foreign = np.flatnonzero(counts < 0)
        counts[foreign] = 0
        whole = set(pieces.places(foreign))
        totals: Integers = np.add.reduceat(counts, pieces.first)
        for place in whole:
            totals[place] = len(tokenizer.encode(texts[place]))
        return CountedBatch(texts, pieces, counts, totals, whole)

    def _counts_of(self, tokenizer: ClipTokenizer, pieces: "Pieces") -> "Integers":
        """The count of each piece, -1 where its clean-up depends on its neighbours.

        Most pieces were counted before. A new one is encoded once and remembered.
        """
        import numpy as np

        from capmerge.tokens.count_table import LONGEST_BYTES

        counts, unknown = self._table.look_up(pieces)
        if not len(unknown):
            return counts
        unknown_texts = pieces.texts(unknown)
        numbers = dict(zip(unknown_texts, unknown.tolist(), strict=True))
        odd = {text: self._odd[text] for text in numbers.keys() & self._odd.keys()}
        new_texts = [text for text in numbers if text not in odd] if odd else list(numbers)
        plain = [text for text in new_texts if is_plain(text)]
        others = [text for text in new_texts if not is_plain(text) and is_local(text)]
        new = dict(zip(plain, tokenizer.count_ascii(plain), strict=True))
        new |= zip(others, tokenizer.count_each(others), strict=True)
        self._table.store(
            pieces,
            np.array([numbers[text] for text in new], np.int64),
            np.array([*new.values()], np.int64),
        )
        # Those that the table has no room for are remembered here.
        new |= dict.fromkeys(set(new_texts) - new.keys(), -1)
        for text, count in new.items():
            if count < 0 or LONGEST_BYTES < len(text) <= _LONGEST_ODD_PIECE:
                if len(self._odd) >= _MOST_ODD_PIECES:
                    self._odd.clear()
                self._odd[text] = count
        counts[unknown] = [odd[text] if text in odd else new[text] for text in unknown_texts]
        return counts

    def _find_commas(
        self,
        tokenizer: ClipTokenizer,
        counted: "CountedBatch",
        starts: "Integers",
        chosen: "NDArray[np.bool_]",
    ) -> "Integers":
        """The positions of the comma tokens in the `chosen` texts, none of which was encoded whole.

        `starts` holds the position of the first token of each text.
        """
        import numpy as np

        # How it works: a token's position is the number of tokens before it, and a running sum over
        # the counts of all pieces gives that for the first token of each piece. So a comma that is
        # the last token of its piece is located without its ids; only other pieces are encoded.
        pieces, counts = counted.pieces, counted.counts
        commas, of_piece, of_text = pieces.find(ord(","), chosen)
        before = np.cumsum(counts) - counts
        # That sum is wrong after texts that were encoded whole, so shift each text to its `starts`.
        starts = starts - before.take(pieces.first)

        # Plain pieces: "tag," with a letter or digit before the comma, and "," alone. CLIP's
        # pattern makes that comma a word of its own, so it is the piece's last token.
        plain = pieces.ends_a_word(commas, of_piece)
        # Odd pieces hold a comma anywhere else, as in "a,b" or "),": their commas are looked up.
        odd, first = np.unique(of_piece[~plain], return_index=True)
        text_of_odd = of_text[~plain][first]
        is_odd = np.zeros(len(pieces), bool)
        is_odd[odd] = True
        plain &= ~is_odd[of_piece]
        inside = [self._commas_inside(tokenizer, text) for text in pieces.texts(odd)]
        odd_starts = np.repeat(
            before[odd] + starts[text_of_odd], [len(places) for places in inside]
        )
        odd_places = odd_starts + np.array([place for some in inside for place in some], np.int64)
        last = of_piece[plain]
        plain_places = before[last] + counts[last] - 1 + starts[of_text[plain]]
        return np.concatenate((plain_places, odd_places))

    def _commas_inside(self, tokenizer: ClipTokenizer, piece: str) -> list[int]:
        """The positions of the comma tokens among the tokens of `piece`, which are remembered."""
        commas = self._commas_of_piece.get(piece)
        if commas is None:
            if len(self._commas_of_piece) == _MOST_PIECES_WITH_COMMAS:
                self._commas_of_piece.clear()
            commas = self._commas_of_piece[piece] = _commas(tokenizer, piece)
        return commas


class CountedBatch(NamedTuple):
    """A batch of texts with their counts."""

    texts: Sequence[str]
    pieces: "Pieces"
    counts: "Integers"
    """The count of each piece, which is of no use in texts that were encoded whole."""
    totals: "Integers"
    """The count of each text."""
    whole: set[int]
    """The numbers of the texts that were encoded whole."""


def _commas(tokenizer: ClipTokenizer, text: str) -> list[int]:
    """The positions of the comma tokens among the tokens of `text`."""
    return [place for place, index in enumerate(tokenizer.encode(text)) if index == tokenizer.comma]
