"""Hashes of keys depend on the key alone, and are the same on every machine."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from capmerge.files.atomic import AtomicFile
from capmerge.metadata.key_bytes import joined_keys
from capmerge.stats.key_hashes import KeyHashes, hash_keys

KEYS = st.lists(st.text(max_size=30) | st.just("k" * 3000))
EXPECTED = [3955746970132230982, -2099083319875716239, 5938741804297115350, -3878725503191453856]


def test_the_hashes_never_change():
    """Hashes that an earlier version wrote to disk are compared with new ones."""
    found = hash_keys(joined_keys(["", "a", "danbooru/1", "猫" * 2000]))
    assert found.tolist() == EXPECTED


@given(KEYS, st.integers(1, 50))
def test_any_division_gives_the_same(tmp_path_factory, keys, size):
    """Keys that come in parts of any size have the hashes that each of them has alone."""
    joined = joined_keys(keys)
    path = tmp_path_factory.mktemp("keys") / "x"
    with AtomicFile(path) as file:
        sink = KeyHashes(file)
        for start in range(0, len(joined), size):
            sink.write(memoryview(joined)[start : start + size], new_block=False)
        file.publish()
    found = np.frombuffer(path.read_bytes(), "<i8").tolist()
    assert found == [hash_keys(joined_keys([key]))[0] for key in keys]
    assert len(set(found)) == len(set(keys))
