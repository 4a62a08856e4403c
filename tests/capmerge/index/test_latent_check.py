"""The strict check of a file of latents: whatever it passes, every reader reads alike."""

from io import BytesIO

import numpy as np
import pytest
from builders.packed import BROKEN, EXACT, SIZE, arrays, sound_members, zipped
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.files.openable import InMemory
from capmerge.index.latent_check import check_file


def _saved():
    file = BytesIO()
    np.savez(file, **arrays())
    return file.getvalue()


SOUND = {"saved": _saved(), "compressed": zipped(*sound_members(), compressed=True)}


@pytest.mark.parametrize("name", EXACT)
def test_sound_files_of_other_layouts(name):
    """They pass, for the size that they hold."""
    assert check_file(InMemory(name, EXACT[name]()), SIZE) == ("", "")


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files(name):
    """Each is broken by its bytes, and told as what it is."""
    make, problem = BROKEN[name]
    fault, told = check_file(InMemory(name, make()))
    assert (fault, problem in told) == ("broken", True), told


@settings(max_examples=400, deadline=None)
@given(
    name=st.sampled_from(sorted(SOUND)),
    at=st.floats(0, 1),
    near_end=st.booleans(),
    change=st.one_of(
        st.tuples(st.just("replace"), st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("insert"), st.binary(min_size=1, max_size=8)),
        st.tuples(st.just("remove"), st.integers(1, 64)),
        st.tuples(st.just("cut"), st.none()),
    ),
)
def test_any_damage_is_found_or_does_no_harm(name, at, near_end, change):
    """No change of some bytes goes unseen, unless numpy reads the very same arrays."""
    whole = SOUND[name]
    # Half of the places are in the directory, which is small.
    place = int(at * (len(whole) - 1))
    if near_end:
        place = len(whole) - 1 - int(at * 300)
    kind, value = change
    data = {
        "replace": lambda: whole[:place] + value + whole[place + len(value) :],
        "insert": lambda: whole[:place] + value + whole[place:],
        "remove": lambda: whole[:place] + whole[place + value :],
        "cut": lambda: whole[:place],
    }[kind]()
    fault, problem = check_file(InMemory("x.npz", data), SIZE)
    assert bool(fault) == bool(problem)
    if not fault:
        with np.load(BytesIO(data), allow_pickle=False) as found:
            assert sorted(found.files) == sorted(arrays())
            for array, expected in arrays().items():
                np.testing.assert_array_equal(found[array], expected, strict=True)
