"""Finds how much of each of many texts is within a number of tokens, without cutting and counting.

"1girl, solo, long hair" has 7 tokens. At a limit of 5, "1girl, solo" is what is within it up to a
comma, and "1girl, solo," up to a space. Both come from the running sum of the tokens of the pieces
between spaces, which are known once the text is counted.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from capmerge.tokens.count_table import Integers
    from capmerge.tokens.counter import CountedBatch, TokenCounter

_COMMA = ord(",")
# The comma of an ordinary tag has none of the first bytes before it, and one of the others behind
# it. NUL is between texts.
_LOOSE, _BEHIND = b", \t\0", b" \0"
_NOWHERE = 1 << 62


def count_within(
    counter: "TokenCounter", texts: Sequence[str], limit: int, commas_from: Sequence[int]
) -> tuple[list[int], dict[int, int]]:
    """Return the tokens of each text, and the number of characters within `limit` of longer ones.

    With a negative number in `commas_from`, a text may end behind each piece between spaces, and
    with N from 0 on, before each comma that has at least N bytes before it. The place that is
    returned is the last of these ends up to which the text has at most `limit` tokens. It has no
    more at each earlier end, and more at each later one.

    A text that is too long is left out where it has no such end, and where the counts of pieces do
    not show it: because a piece is read together with its neighbours, a comma is not between a tag
    and a space, or a shorter part of the text has more tokens.
    """
    import numpy as np

    counts: list[int] = []
    places: dict[int, int] = {}
    for some, totals, batch in counter.batches(texts):
        first = len(counts)
        counts += totals
        if batch is not None:
            asked = np.array(commas_from[first : first + len(some)], np.int64)
            for number, end in _places(counter, batch, limit, asked):
                places[first + number] = _characters(batch, some[number], number, end)
    return counts, places


def _places(
    counter: "TokenCounter", batch: "CountedBatch", limit: int, commas_from: "Integers"
) -> list[tuple[int, int]]:
    """The numbers of texts of a batch, and the end of each in bytes of the batch."""
    import numpy as np

    long = batch.totals > limit
    long[[*batch.whole]] = False
    if not long.any():
        return []
    # `over` is the first piece of each text with which it has more tokens than the limit.
    upto = np.cumsum(batch.counts)
    base = upto.take(batch.pieces.first) - batch.counts.take(batch.pieces.first)
    over = np.searchsorted(upto, base + limit, side="right")
    by_space = np.flatnonzero(long & (commas_from < 0) & (over > batch.pieces.first))
    ends = batch.pieces.starts.take(over.take(by_space)) - 1
    found = list(zip(by_space.tolist(), ends.tolist(), strict=True))
    long &= commas_from >= 0
    return found + _commas(
        counter, batch, limit, long, commas_from, over, upto - batch.counts, base
    )


def _commas(
    counter: "TokenCounter",
    batch: "CountedBatch",
    limit: int,
    long: "NDArray[np.bool_]",
    commas_from: "Integers",
    over: "Integers",
    before: "Integers",
    base: "Integers",
) -> list[tuple[int, int]]:
    """The last commas within the limit, as `_places` returns them.

    `over` and `base` are the piece of each text that exceeds the limit, and the tokens before the
    text; `before` are the tokens before each piece.
    """
    import numpy as np

    pieces = batch.pieces
    places, of_piece, of_text = pieces.find(_COMMA, long)
    certain = long.copy()
    certain[of_text[~pieces.is_between(places, _LOOSE, _BEHIND)]] = False
    # A comma behind the piece that exceeds the limit is too far. Each of the others is the last
    # byte of its piece, so up to it the text has the tokens before that piece, and those of the
    # piece without the comma.
    starts = pieces.starts.take(pieces.first)
    near = np.flatnonzero(
        certain[of_text]
        & (of_piece <= over[of_text])
        & (places - starts[of_text] >= commas_from[of_text])
    )
    places, of_piece, of_text = places[near], of_piece[near], of_text[near]
    shorter = counter.count_without_comma(batch, places, of_piece, of_text)
    certain[of_text[shorter < 0]] = False
    fits = before[of_piece] + shorter - base[of_text] <= limit
    # The commas are in the order of the text, so the last one that fits overwrites the others.
    last = np.full(len(long), -1)
    last[of_text[fits]] = places[fits]
    beyond = np.full(len(long), _NOWHERE)
    beyond[of_text[~fits][::-1]] = places[~fits][::-1]
    chosen = np.flatnonzero(certain & (last >= 0) & (last < beyond))
    return list(zip(chosen.tolist(), last[chosen].tolist(), strict=True))


def _characters(batch: "CountedBatch", text: str, number: int, end: int) -> int:
    """The number of characters before `end` in a text, where `end` counts bytes of its batch."""
    start = int(batch.pieces.starts[batch.pieces.first[number]])
    if text.isascii():
        return end - start
    return len(batch.pieces.bytes[start:end].decode("utf-8", "surrogatepass"))
