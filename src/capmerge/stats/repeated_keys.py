"""Keys that a file holds more than once, told at the end of a run in bounded memory.

Workers note the keys of their blocks, which are kept on disk until the end. If all are in ascending
order, none is repeated. Otherwise their 64-bit hashes are compared, a part of them at a time. Where
some are equal, the keys themselves are compared, so two keys that only share a hash are not taken
for one. Only a file with more than `equal_hashes.EXACT` different repeated keys is counted by
hashes alone; among 12 million different keys two have the same hash with a chance of 1 in 250,000.
"""

from collections.abc import Iterator
from hashlib import blake2b
from operator import lt
from pathlib import Path
from typing import NamedTuple, Self

from capmerge.errors import OutputError, quoted
from capmerge.files.atomic import Buffer, ScratchFile
from capmerge.metadata.key_bytes import END, joined_keys, key_text, split_keys
from capmerge.metadata.work import Sink, Stream
from capmerge.stats.equal_hashes import SHOWN, Compared, compare, each_once

SHOWN_KEYS = SHOWN
_READ_BYTES = 1 << 20
_WITHOUT_NUMPY = 1 << 18
_EXACT_BYTES = 16


class RepeatedKeys(NamedTuple):
    """The keys that a reader of the file does not see in every place where they are written."""

    records: int = 0
    """The number of records whose key occurs again further on."""
    first: tuple[str, ...] = ()
    """The repeated keys that occur first in the file, at most `SHOWN_KEYS`."""
    doubled: int = 0
    """The number of records that have a field more than once."""
    first_doubled: tuple[str, ...] = ()
    """The keys of the first of these, at most `SHOWN_KEYS`."""

    def notes(self) -> list[str]:
        """A note on each kind that occurs, of two or three sentences."""
        notes = []
        if self.records:
            notes.append(
                f"{_have(self.records)} a key that occurs again further on ({_shown(self.first)}). "
                "All of them are kept, in their order, but json.load, sd-scripts and an index take "
                "only the last record of each key."
            )
        if self.doubled:
            notes.append(
                f"{_have(self.doubled)} the same field more than once "
                f"({_shown(self.first_doubled)}). Only the last of these fields is read, as "
                "json.load and sd-scripts do; the others are left out."
            )
        return notes


def _have(records: int) -> str:
    return "1 record has" if records == 1 else f"{records:,} records have"


def _shown(keys: tuple[str, ...]) -> str:
    return "the first: " + ", ".join(quoted(key, longest=60) for key in keys)


class KeyNotes:
    """A worker's notes on the keys of a block."""

    def __init__(self) -> None:
        # Bytes and not the keys themselves, which would keep a hold on the memory of each piece.
        self._keys: list[bytes] = []
        self._doubled: list[bytes] = []

    def note(self, keys: list[str], doubled: list[str]) -> None:
        """Note the keys of some records, and of those that have a field more than once."""
        self._keys.append(joined_keys(keys))
        if doubled:
            self._doubled.append(joined_keys(doubled))

    def take(self) -> Iterator[tuple[Stream, bytes]]:
        """What was noted since the last call, as streams."""
        yield "keys", b"".join(self._keys)
        if self._doubled:
            yield "doubled", b"".join(self._doubled)
        self._keys, self._doubled = [], []


class _Spilled:
    """A sink of keys that counts them and keeps them in a scratch file."""

    def __init__(self, scratch: ScratchFile) -> None:
        self._scratch = scratch
        self.count = 0
        self.ascending = True
        """True if each key is larger than the one before it, so that no two are equal."""
        self._begun = self._last = b""

    def write(self, data: Buffer, *, new_block: bool) -> None:  # noqa: ARG002  # a sink
        """Append keys."""
        self._scratch.write(data)
        if not self.ascending:
            self.count += bytes(data).count(END)
            return
        *keys, self._begun = (self._begun + bytes(data)).split(END)
        if keys:
            in_order = all(map(lt, keys, keys[1:]))
            self.ascending = in_order and (self._last < keys[0] or not self.count)
            self._last = keys[-1]
            self.count += len(keys)

    def parts(self) -> Iterator[list[bytes]]:
        """All keys in the order of the file, some at a time."""
        return split_keys(self._scratch.parts(_READ_BYTES))


class FirstKeys:
    """A sink of keys that counts them and keeps the first `SHOWN_KEYS`."""

    def __init__(self) -> None:
        self.count = 0
        self._start = b""

    def write(self, data: Buffer, *, new_block: bool) -> None:  # noqa: ARG002  # a sink
        """Append keys."""
        if self.count < SHOWN_KEYS:
            self._start += data
        self.count += bytes(data).count(END)

    @property
    def keys(self) -> tuple[str, ...]:
        """The first keys."""
        return tuple(map(key_text, self._start.split(END)[: min(self.count, SHOWN_KEYS)]))


class KeyCheck:
    """The parent's side: the sinks for what `KeyNotes` notes, and the comparison at the end.

    It is a context manager. Its scratch files are in the folder of `target`, or among the temporary
    files of the system where there is no output file.
    """

    def __init__(self, target: Path | None) -> None:
        self._beside = target or _temporary_folder() / "repeated keys"
        self._scratch = ScratchFile(self._beside)
        self._keys, self._doubled = _Spilled(self._scratch), FirstKeys()

    def sinks(self) -> dict[Stream, Sink]:
        """Return the sinks of the streams that `KeyNotes` fills."""
        return {"keys": self._keys, "doubled": self._doubled}

    def result(self) -> RepeatedKeys:
        """The repeated keys among all that were noted."""
        repeated = self._repeated()
        return repeated._replace(doubled=self._doubled.count, first_doubled=self._doubled.keys)

    def _repeated(self) -> RepeatedKeys:
        count = self._keys.count
        if self._keys.ascending:  # as in every file of sd-scripts, which sorts the paths
            return RepeatedKeys()
        if count <= _WITHOUT_NUMPY:  # numpy would take longer to load than this takes
            hashes: set[int] = set()
            for keys in self._keys.parts():
                hashes.update(map(hash, keys))
            if len(hashes) == count:
                return RepeatedKeys()
        found = self._compare_hashes()
        if found.hashes is None:
            return RepeatedKeys(found.records, self._texts(found.firsts))
        return self._compare_texts(found.hashes) if found.hashes else RepeatedKeys()

    def _compare_hashes(self) -> "Compared":
        """Compare the hashes of all keys."""
        import numpy as np

        parts = (np.fromiter(map(hash, keys), np.int64, len(keys)) for keys in self._keys.parts())
        return compare(each_once(parts, self._keys.count, self._beside))

    def _compare_texts(self, hashes: set[int]) -> RepeatedKeys:
        """Count the repeated keys among those that have one of these hashes."""
        seen: dict[bytes, list[int]] = {}  # the first place and the count of each key, by digest
        start = 0
        for keys in self._keys.parts():
            for place, key in enumerate(keys, start):
                if hash(key) in hashes:
                    digest = blake2b(key, digest_size=_EXACT_BYTES).digest()
                    seen.setdefault(digest, [place, 0])[1] += 1
            start += len(keys)
        repeated = [(place, count) for place, count in seen.values() if count > 1]
        firsts = [place for place, _ in repeated[:SHOWN_KEYS]]
        return RepeatedKeys(sum(count - 1 for _, count in repeated), self._texts(firsts))

    def _texts(self, places: list[int]) -> tuple[str, ...]:
        """The keys in these places, which are in ascending order."""
        found, start = [], 0
        for keys in self._keys.parts():
            found += [key_text(keys[p - start]) for p in places if 0 <= p - start < len(keys)]
            if len(found) == len(places):
                break
            start += len(keys)
        return tuple(found)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.close()


def _temporary_folder() -> Path:
    from tempfile import gettempdir

    try:
        return Path(gettempdir())
    except FileNotFoundError as error:
        raise OutputError(
            "found no folder for temporary files that can be written, expected one for the hashes "
            "of the keys. Name a folder in the environment variable TMPDIR."
        ) from error
