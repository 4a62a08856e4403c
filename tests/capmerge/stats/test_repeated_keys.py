"""Repeated keys are counted exactly, however many there are and whatever their hashes."""

import random
from collections import Counter

import pytest

from capmerge.stats import equal_hashes, repeated_keys
from capmerge.stats.repeated_keys import KeyCheck, KeyNotes, RepeatedKeys


def checked(tmp_path, blocks, doubled=()):
    """The result for the keys of some blocks, noted two pieces a block, as a run notes them."""
    notes = KeyNotes()
    with KeyCheck(tmp_path / "out.json") as check:
        sinks = check.sinks()
        for keys in blocks:
            notes.note(keys[:2], list(doubled))
            notes.note(keys[2:], [])
            for stream, data in notes.take():
                # A worker's answer may end anywhere inside a key.
                sinks[stream].write(memoryview(data)[:5], new_block=True)
                sinks[stream].write(memoryview(data)[5:], new_block=False)
        result = check.result()
    assert not list(tmp_path.iterdir())
    return result


def expected(keys):
    """The same by counting the keys themselves."""
    counts = Counter(keys)
    firsts = [key for key, count in counts.items() if count > 1][:5]
    return RepeatedKeys(len(keys) - len(counts), tuple(firsts))


KINDS = {
    "none": [f"a/{number}" for number in range(500)],
    "all of them": ["k"] * 500,
    "each twice, far apart": [f"a/{number % 250}" for number in range(500)],
    "none, in ascending order": [f"a/{number:03}" for number in range(500)],
    "the last, after others in ascending order": [*(f"a/{n:03}" for n in range(500)), "a/499"],
    "one far back, after others in ascending order": [*(f"a/{n:03}" for n in range(500)), "a/007"],
    "odd keys": [
        "",
        "\0",
        "\\0",
        "a\0b",
        "a\\0b",
        "\ud800",
        "\u00ff",
        "",
        "a\0b",
        "\0\0",
        "\ud800",
    ],
    "one very long": ["x" * 3_000_000, "y", "x" * 3_000_000],
    "no keys": [],
}


@pytest.mark.parametrize("with_numpy", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_counts_of_all_kinds(tmp_path, monkeypatch, kind, with_numpy):
    """Few keys, which are compared without numpy, and many of them give the same exact counts."""
    if with_numpy:
        monkeypatch.setattr(repeated_keys, "_WITHOUT_NUMPY", -1)
        monkeypatch.setattr(equal_hashes, "_COMPARED_AT_ONCE", 40)
    keys = KINDS[kind]
    assert checked(tmp_path, [keys[:100], keys[100:300], keys[300:]]) == expected(keys)


@pytest.mark.parametrize("exact", [1 << 14, 3])
def test_many_parts_and_any_order(tmp_path, monkeypatch, exact):
    """The hashes are compared in small parts, and beyond `EXACT` by themselves alone."""
    monkeypatch.setattr(repeated_keys, "_WITHOUT_NUMPY", 0)
    monkeypatch.setattr(equal_hashes, "_COMPARED_AT_ONCE", 64)
    monkeypatch.setattr(repeated_keys, "_READ_BYTES", 800)
    monkeypatch.setattr(equal_hashes, "_READ_BYTES", 800)
    monkeypatch.setattr(equal_hashes, "EXACT", exact)
    rng = random.Random(3)
    keys = [f"danbooru/{rng.randrange(4000)}" for _ in range(3000)]
    assert checked(tmp_path, [keys[:1000], keys[1000:]]) == expected(keys)


def test_different_keys_with_one_hash(tmp_path, monkeypatch):
    """Keys that share a hash are not taken for repeated ones."""
    monkeypatch.setattr(repeated_keys, "hash", len, raising=False)
    keys = ["aa", "bb", "c", "aa", "dd", "ddd", "bb"]
    assert checked(tmp_path, [keys]) == RepeatedKeys(2, ("aa", "bb"))
    assert checked(tmp_path, [["aa", "bb", "cc"]]) == RepeatedKeys()


def test_the_first_doubled_records(tmp_path):
    """Of the records that have a field more than once, the number and the first five are told."""
    found = checked(tmp_path, [["a"], ["b"], ["c"], ["d"]], doubled=["x", "y"])
    assert found == RepeatedKeys(0, (), 8, ("x", "y", "x", "y", "x"))
    assert "8 records have the same field more than once" in found.notes()[0]
