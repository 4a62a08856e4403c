import hashlib
import struct

import pytest

from capmerge.rng import Chance, SampleId


def test_chance_is_what_its_module_says():
    """The definition in the module's docstring, written out again, gives the same numbers."""
    seed, epoch, key, dataset, repeat = 77, 3, "k\udc80", 2, 5
    message = (
        struct.pack("<4q", dataset, epoch, repeat, 0)
        + b"line\0"
        + key.encode("utf-8", "surrogatepass")
    )
    digest = hashlib.blake2b(
        message, key=seed.to_bytes(16, "little", signed=True), person=b"capmerge"
    ).digest()
    word = struct.unpack("<8Q", digest)[0]
    assert Chance(SampleId(seed, epoch, key, dataset, repeat)).below(10**6, "line") == word % 10**6


def test_chance_takes_limits_of_any_size():
    """A limit past 64 bits uses more words, and a limit below 1 is refused."""
    numbers = [Chance(SampleId(1, epoch, "a")).below(10**40, "x") for epoch in range(200)]
    assert max(numbers) > 9 * 10**39
    assert min(numbers) < 10**39
    assert len(set(numbers)) == 200
    with pytest.raises(ValueError, match="expected 1 or more"):
        Chance(SampleId(1, 0, "a")).below(0, "x")
