"""Keys in more than one shard: compared exactly, and by hashes alone where there are too many."""

from collections import Counter

import pytest
from builders.metadata import as_jsonl

from capmerge.errors import DataError
from capmerge.files.atomic import AtomicFile
from capmerge.metadata.key_bytes import joined_keys
from capmerge.shards.job import keys_name
from capmerge.shards.places import LocalFolder
from capmerge.shards.shared_keys import KeysFound, SharedKey, find_keys
from capmerge.stats import equal_hashes
from capmerge.stats.key_hashes import KeyHashes

SHARDS = {
    "a.jsonl": ["x", "1", "2", "x", ""],
    "b.jsonl": [],
    "c.jsonl": ["3", "2", "4", "\ud800"],
    "d.jsonl": ["\ud800", "5", "2", "6", "x", "7"],
}
"""The keys of each shard."""


@pytest.fixture
def out(tmp_path):
    """A folder with outputs of these keys and their hashes."""
    place = LocalFolder(tmp_path / "out")
    for name, keys in SHARDS.items():
        lines = b"".join(as_jsonl({key: {"caption": "a"}}) for key in keys)
        place.write(name, lines)
        with place.written(keys_name(name)) as path, AtomicFile(path) as file:
            KeyHashes(file).write(joined_keys(keys), new_block=True)
            file.publish()
    return place


def found_in(place, tmp_path):
    """What is found among all shards of a place."""
    return find_keys(place, [*SHARDS], tmp_path / "scratch")


def expected(*, exact):
    """What there is to find, worked out from the keys."""
    every = [key for keys in SHARDS.values() for key in keys]
    repeated = [key for key, count in Counter(every).items() if count > 1]
    holders = {key: [name for name, keys in SHARDS.items() if key in keys] for key in repeated}
    shared = tuple(SharedKey(key, (names[0], names[-1])) for key, names in holders.items())
    number = len(every) - len(set(every))
    return KeysFound(number, tuple(repeated), len(shared), shared, exact=exact)


def test_all_repeated_keys_are_found(out, tmp_path):
    """Their number, the first of them, and the shards that hold them."""
    assert found_in(out, tmp_path) == expected(exact=True)


def test_very_many_are_counted_by_their_hashes(out, tmp_path, monkeypatch):
    """The figures are the same as long as no two keys share a hash, and say how they were made."""
    monkeypatch.setattr(equal_hashes, "EXACT", 1)
    assert found_in(out, tmp_path) == expected(exact=False)


def test_keys_that_share_a_hash_are_told_apart(out, tmp_path):
    """Where all hashes are equal, the keys themselves decide."""
    for name, keys in SHARDS.items():
        out.write(keys_name(name), bytes(8 * len(keys)))
    assert found_in(out, tmp_path) == expected(exact=True)


def test_an_output_that_was_cut_is_told(out, tmp_path):
    """A message says that the output changed, and what to do."""
    out.write("d.jsonl", as_jsonl({"5": {"caption": "a"}}))
    with pytest.raises(DataError, match="the output changed since it was written"):
        found_in(out, tmp_path)
