"""Equal hashes are found on disk, whatever their order, number and division into parts."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.stats import equal_hashes
from capmerge.stats.duplicates import RecordHashes, groups_of
from capmerge.stats.equal_hashes import compare, each_once

LISTS = st.lists(st.lists(st.integers(-3, 3) | st.integers(-(2**63), 2**63 - 1), max_size=40))


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A path whose folder takes the scratch files."""
    return tmp_path_factory.mktemp("scratch") / "x"


@pytest.fixture(scope="module", autouse=True)
def _small_parts():
    """Few hashes fill a part, so that all of the ways are gone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(equal_hashes, "_COMPARED_AT_ONCE", 8)
        patch.setattr(equal_hashes, "_READ_BYTES", 64)
        yield


def _parts(lists):
    return (np.array(hashes, np.int64) for hashes in lists)


@settings(max_examples=30)
@given(LISTS, st.integers(0, 4))
def test_each_hash_with_its_places(beside, lists, bits):
    """Each different hash comes once, with its number and its first and last place."""
    every = [value for hashes in lists for value in hashes]
    found = {}
    for once in each_once(_parts(lists), len(every), beside, bits):
        assert np.all(np.diff(once.hashes) > 0)
        for value, *about in zip(*(column.tolist() for column in once), strict=True):
            assert value not in found
            found[value] = about
    places = {value: [n for n, other in enumerate(every) if other == value] for value in every}
    assert found == {value: [at[0], at[-1], len(at)] for value, at in places.items()}


@settings(max_examples=30)
@given(LISTS)
def test_the_repeated_ones(beside, lists):
    """Their number, their first places and the hashes themselves."""
    every = [value for hashes in lists for value in hashes]
    counts = Counter(every)
    found = compare(each_once(_parts(lists), len(every), beside))
    repeated = {value for value, count in counts.items() if count > 1}
    assert found.records == len(every) - len(counts)
    assert found.hashes == repeated
    assert found.firsts == sorted(every.index(value) for value in repeated)[:5]


@settings(max_examples=30)
@given(LISTS)
def test_groups_are_those_in_memory(beside, lists):
    """Duplicates that are compared on disk are those that one process finds in memory."""
    every = [value for hashes in lists for value in hashes]
    memory = RecordHashes()
    memory.write(np.array(every, "<i8").tobytes(), new_block=True)
    assert groups_of(each_once(_parts(lists), len(every), beside)) == memory.groups()
