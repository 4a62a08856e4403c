import pickle
import tempfile
from collections import Counter
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from builders.plans import opened, rows_of, samples_of
from hypothesis import given, settings
from hypothesis import strategies as st

from capmerge.rng import Chance, SampleId
from trainer.data.plan import count_epoch, deal
from trainer.data.shuffle import hash_of

RECORD = st.tuples(
    st.sampled_from([512, 640, 768]), st.sampled_from([512, 768]), st.integers(1, 3), st.booleans()
)


@st.composite
def some_sets(draw):
    """One to three small data sets with at least one usable record."""
    chunks = draw(st.booleans())
    sets = [
        rows_of(
            draw(st.lists(RECORD, max_size=40)),
            chunks=chunks,
            repeats=draw(st.integers(1, 3)),
            usable=draw(st.booleans()),
        )
        for _ in range(draw(st.integers(1, 3)))
    ]
    return [*sets, rows_of([(512, 512, 1, True)], chunks=chunks)]


@settings(deadline=None)
@given(
    sets=some_sets(),
    global_batch_size=st.integers(1, 12),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
)
def test_an_epoch_has_each_sample_once_in_pure_batches(sets, global_batch_size, seed, epoch):
    """Every usable record of every set and repeat is trained once, in batches of one bucket.

    Only the last batch of a bucket is short.
    """
    with tempfile.TemporaryDirectory() as folder:
        plan = opened(
            Path(folder), sets, global_batch_size=global_batch_size, seed=seed, epoch=epoch
        )
        batches = [plan.batch(place) for place in range(plan.steps)]
        found = Counter(sample for batch in samples_of(plan) for sample in batch)
    expected = {
        (dataset, record, repeat)
        for dataset, rows in enumerate(sets)
        for record, repeat in product(range(len(rows.width)), range(rows.repeats))
        if rows.usable is None or rows.usable[record]
    }
    assert found == dict.fromkeys(expected, 1)
    sizes = {}
    for batch in batches:
        for dataset, record in zip(batch.dataset.tolist(), batch.record.tolist(), strict=True):
            rows = sets[dataset]
            chunks = None if rows.chunks is None else rows.chunks[record]
            assert (batch.width, batch.height, batch.chunks) == (
                rows.width[record],
                rows.height[record],
                chunks,
            )
        sizes.setdefault((batch.width, batch.height, batch.chunks), []).append(len(batch.record))
    for found_sizes in sizes.values():
        assert sorted(found_sizes)[1:] == [global_batch_size] * (len(found_sizes) - 1)
        assert 1 <= min(found_sizes) <= global_batch_size
    assert (len(sizes), plan.steps) == count_epoch(sets, global_batch_size)


@settings(deadline=None, max_examples=30)
@given(
    sets=some_sets(),
    global_batch_size=st.integers(1, 12),
    seed=st.integers(0, 2**63 - 1),
    epoch=st.integers(0, 1000),
)
def test_the_plan_is_what_its_definition_says(sets, global_batch_size, seed, epoch):
    """Code that follows the words of the module's definition finds the same batches."""
    numbered = [
        (dataset, record, repeat)
        for dataset, rows in enumerate(sets)
        for repeat, record in product(range(rows.repeats), range(len(rows.width)))
    ]

    def in_order(numbers, purpose):
        key = Chance(SampleId(seed, epoch, "")).below(2**64, purpose)
        return sorted(
            numbers, key=lambda number: hash_of(np.array([number], dtype=np.uint64), key)[0]
        )

    buckets = {}
    for number, (dataset, record, _) in enumerate(numbered):
        rows = sets[dataset]
        if rows.usable is None or rows.usable[record]:
            kind = (
                rows.width[record],
                rows.height[record],
                0 if rows.chunks is None else rows.chunks[record],
            )
            buckets.setdefault(kind, []).append(number)
    batches = []
    for kind in sorted(buckets):
        members = in_order(buckets[kind], "order of samples")
        batches += [
            members[at : at + global_batch_size] for at in range(0, len(members), global_batch_size)
        ]
    expected = [
        [numbered[number] for number in batches[batch]]
        for batch in in_order(range(len(batches)), "order of batches")
    ]
    with tempfile.TemporaryDirectory() as folder:
        plan = opened(
            Path(folder), sets, global_batch_size=global_batch_size, seed=seed, epoch=epoch
        )
        assert samples_of(plan) == expected


def test_a_plan_never_changes(tmp_path):
    """A run that a later release resumes trains the same batches."""
    rows = rows_of([(512, 512, 1, True)] * 5 + [(768, 512, 1, True)] * 4)
    plan = opened(tmp_path, [rows], seed=2**63 - 1, epoch=3, global_batch_size=2)
    assert [[record for _, record, _ in batch] for batch in samples_of(plan)] == [
        [7, 5],
        [6, 8],
        [3, 4],
        [1],
        [2, 0],
    ]


def test_a_plan_pickles_as_its_path(tmp_path):
    """A pickled plan holds only its path and reads the same batches."""
    plan = opened(tmp_path)
    sent = pickle.dumps(plan)
    assert len(sent) < 500
    assert samples_of(pickle.loads(sent)) == samples_of(plan)


@pytest.mark.parametrize("place", [-1, 10**6])
def test_a_step_outside_the_epoch_is_refused(tmp_path, place):
    """The error for a step outside of the epoch says which steps there are."""
    with pytest.raises(IndexError, match=f"found step {place} of the epoch, expected 0 to "):
        opened(tmp_path).batch(place)


@given(
    ranks=st.integers(1, 5),
    accumulation=st.integers(1, 5),
    batch_size=st.integers(1, 4),
    data=st.data(),
)
def test_dealing_is_even_and_whole(ranks, accumulation, batch_size, data):
    """Each sample is dealt once with weight 1, in slices that differ by at most one.

    Every slice has at least one sample and fits in a micro-batch.
    """
    n_samples = data.draw(st.integers(1, ranks * accumulation * batch_size))
    dealt = deal(n_samples, ranks=ranks, accumulation=accumulation, batch_size=batch_size)
    slices = [slots for of_ranks in dealt for slots in of_ranks]
    assert (len(dealt), {len(of_ranks) for of_ranks in dealt}) == (accumulation, {ranks})
    assert [place for slots in slices if slots.weight for place in slots.places] == list(
        range(n_samples)
    )
    real = [len(slots.places) if slots.weight else 0 for slots in slices]
    assert max(real) - min(real) <= 1
    assert max(real) <= batch_size
    assert all(
        len(slots.places) == 1 and 0 <= slots.places[0] < n_samples
        for slots in slices
        if not slots.weight
    )


def test_too_many_samples_are_not_dealt():
    """A batch that does not fit in the slices raises `ValueError`."""
    for n_samples in (0, 5):
        with pytest.raises(
            ValueError,
            match=f"found {n_samples} samples, expected 1 to 1 ranks x 2 micro-steps x 2",
        ):
            deal(n_samples, ranks=1, accumulation=2, batch_size=2)
