"""Keys that occur more than once among the outputs of all shards.

The tasks left a hash for each key, in the order of the output. Equal hashes are found on disk. Then
the keys behind them are read from the outputs and compared themselves, up to `equal_hashes.EXACT`
different ones; beyond that, the hashes decide.
"""

from bisect import bisect_right
from collections.abc import Iterator
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from capmerge.errors import DataError, quoted
from capmerge.metadata.blocks import read_layout
from capmerge.metadata.key_bytes import key_bytes
from capmerge.metadata.opened import open_metadata
from capmerge.metadata.pieces import iter_source
from capmerge.shards.job import keys_name
from capmerge.shards.places import Place
from capmerge.stats.equal_hashes import SHOWN, Once, compare, each_once

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_MOST_BITS = 9
"""At most 512 scratch files, as 1024 is the usual limit of open files."""
_ANY_LENGTH = 1 << 40
_DIGEST_BYTES = 16


class SharedKey(NamedTuple):
    """A key that two shards hold, or more."""

    key: str
    shards: tuple[str, str]
    """The first and the last shard that hold it."""


class KeysFound(NamedTuple):
    """The repeated keys among all outputs in order, as if they were one file."""

    repeated: int = 0
    """The number of records whose key occurs again further on."""
    first: tuple[str, ...] = ()
    """The keys that do, at most `SHOWN`."""
    shared: int = 0
    """The number of different keys that more than one shard holds."""
    first_shared: tuple[SharedKey, ...] = ()
    """The first of these, at most `SHOWN`."""
    exact: bool = True
    """False if so many keys are repeated that they were counted by their hashes alone."""

    def note(self) -> str | None:
        """A note on keys in more than one shard; None if there are none."""
        if not self.shared:
            return None
        first = self.first_shared[0]
        keys = "1 key is" if self.shared == 1 else f"{self.shared:,} keys are"
        return (
            f"{keys} in more than one shard (the first: {quoted(first.key, longest=60)} in "
            f"{first.shards[0]} and {first.shards[1]}). All records are kept, but a program that "
            "reads the shards as one takes only one record of each key."
        )


def find_keys(out: Place, names: list[str], beside: Path) -> KeysFound:
    """The repeated keys among the outputs of the shards `names`.

    Scratch files with 16 bytes per record are made in the folder of `beside`.
    """
    files = out.files()
    ends = list(accumulate(files[keys_name(name)] // 8 for name in names))
    if not ends or not ends[-1]:
        return KeysFound()
    shared = _SharedHashes(ends)
    found = compare(shared.noting(each_once(_hashes(out, names), ends[-1], beside, _MOST_BITS)))
    if not found.records:
        return KeysFound()
    if found.hashes is not None:
        return _compared_keys(out, names, ends, found.hashes)
    pairs = shared.first()
    texts = _keys_at(out, names, ends, sorted({*found.firsts, *(first for first, _ in pairs)}))
    return KeysFound(
        found.records,
        tuple(texts[place] for place in found.firsts),
        shared.count,
        tuple(
            SharedKey(
                texts[first], (names[bisect_right(ends, first)], names[bisect_right(ends, last)])
            )
            for first, last in pairs
        ),
        exact=False,
    )


class _SharedHashes:
    """The hashes that occur in more than one shard; `ends` are the places where shards end."""

    def __init__(self, ends: list[int]) -> None:
        self._ends = ends
        self._pairs: list[tuple[int, int]] = []
        self.count = 0

    def noting(self, parts: Iterator[Once]) -> Iterator[Once]:
        """Hand on all parts, and note what is in them."""
        import numpy as np

        for once in parts:
            again = np.flatnonzero(once.counts > 1)
            firsts, lasts = once.places[again], once.lasts[again]
            apart = np.searchsorted(self._ends, firsts, "right") != np.searchsorted(
                self._ends, lasts, "right"
            )
            self.count += int(np.count_nonzero(apart))
            found = zip(firsts[apart].tolist(), lasts[apart].tolist(), strict=True)
            self._pairs = sorted([*self._pairs, *found])[:SHOWN]
            yield once

    def first(self) -> list[tuple[int, int]]:
        """The first and the last place of those that occur first."""
        return self._pairs


def _compared_keys(out: Place, names: list[str], ends: list[int], hashes: set[int]) -> KeysFound:
    """The repeated ones among the keys that have one of these hashes."""
    import numpy as np

    wanted = np.fromiter(hashes, np.int64, len(hashes))
    seen: dict[bytes, tuple[int, int, int]] = {}  # the first and last place, and the count
    for name, found, end in zip(names, _hashes(out, [*names]), ends, strict=True):
        numbers = np.flatnonzero(np.isin(found, wanted)).tolist()
        start = end - len(found)
        for number, key in zip(numbers, _read_keys(out, name, numbers), strict=True):
            digest = blake2b(key_bytes(key), digest_size=_DIGEST_BYTES).digest()
            place = start + number
            first, _, count = seen.get(digest, (place, place, 0))
            seen[digest] = first, place, count + 1
    repeated = sorted(entry for entry in seen.values() if entry[2] > 1)
    shards = [(bisect_right(ends, first), bisect_right(ends, last)) for first, last, _ in repeated]
    shared = [number for number, (first, last) in enumerate(shards) if first != last]
    shown = {place for place, _, _ in repeated[:SHOWN]}
    shown |= {repeated[number][0] for number in shared[:SHOWN]}
    texts = _keys_at(out, names, ends, sorted(shown))
    return KeysFound(
        sum(count - 1 for _, _, count in repeated),
        tuple(texts[place] for place, _, _ in repeated[:SHOWN]),
        len(shared),
        tuple(
            SharedKey(
                texts[repeated[number][0]], (names[shards[number][0]], names[shards[number][1]])
            )
            for number in shared[:SHOWN]
        ),
    )


def _hashes(out: Place, names: list[str]) -> "Iterator[NDArray[np.int64]]":
    """The hashes of the keys of each shard."""
    import numpy as np

    for content in out.read([*map(keys_name, names)]):
        yield np.frombuffer(content or b"", "<i8")


def _keys_at(out: Place, names: list[str], ends: list[int], places: list[int]) -> dict[int, str]:
    """The keys of the records in these places, which are in ascending order."""
    found: dict[int, str] = {}
    for shard in sorted({bisect_right(ends, place) for place in places}):
        start = ends[shard - 1] if shard else 0
        here = [place for place in places if start <= place < ends[shard]]
        keys = _read_keys(out, names[shard], [place - start for place in here])
        found.update(zip(here, keys, strict=True))
    return found


def _read_keys(out: Place, name: str, numbers: list[int]) -> list[str]:
    """The keys of the records of an output with these numbers, in ascending order from 0."""
    if not numbers:
        return []
    found: list[str] = []
    start = 0
    with out.fetched(name) as path, open_metadata(str(path)) as source:
        for piece in iter_source(source, read_layout(source, _ANY_LENGTH)):
            keys = piece.records.keys()
            while len(found) < len(numbers) and numbers[len(found)] < start + len(keys):
                found.append(keys[numbers[len(found)] - start])
            if len(found) == len(numbers):
                return found
            start += len(keys)
    raise DataError(
        out.full_name(name),
        None,
        None,
        f"found {start:,} records, expected more than {numbers[-1]:,}: the output changed since "
        "it was written.",
        "Remove it and run the same command again.",
    )
