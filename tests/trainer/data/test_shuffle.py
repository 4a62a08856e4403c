import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from trainer.data import shuffle as order
from trainer.data.shuffle import fill_in_order, hash_of

KEYS = st.integers(0, 2**64 - 1)


def splitmix64(key):
    """The outputs of splitmix64 by its published definition, with Python's integers."""
    word = 2**64 - 1
    while True:
        key = (key + 0x9E3779B97F4A7C15) & word
        z = ((key ^ (key >> 30)) * 0xBF58476D1CE4E5B9) & word
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & word
        yield z ^ (z >> 31)


def test_the_hash_is_splitmix64():
    """The hash equals the published outputs for the seed 1234567."""
    published = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    assert hash_of(np.arange(5, dtype=np.uint64), 1234567).tolist() == published


@given(KEYS)
def test_the_hash_is_defined_for_every_key(key):
    """Integer overflow in numpy wraps around as the definition says."""
    stream = splitmix64(key)
    assert hash_of(np.arange(20, dtype=np.uint64), key).tolist() == [
        next(stream) for _ in range(20)
    ]


@given(
    key=KEYS,
    groups=st.lists(st.integers(0, 4), min_size=1, max_size=200),
    piece=st.integers(1, 50),
    bits=st.sampled_from([1, 2, 18]),
)
def test_groups_follow_each_other_in_the_order_of_the_hash(key, groups, piece, bits):
    """The order is that of one plain sort, however the numbers are split into arrays."""
    groups = np.array(groups, dtype=np.int64)
    numbers = np.arange(len(groups), dtype=np.uint64) * np.uint64(7)
    out = np.zeros(len(numbers), dtype=np.uint32)
    pieces = [
        (numbers[at : at + piece], groups[at : at + piece]) for at in range(0, len(numbers), piece)
    ]
    before, order._PART_BITS = order._PART_BITS, bits
    try:
        fill_in_order(out, lambda: pieces, np.bincount(groups, minlength=5), key)
    finally:
        order._PART_BITS = before
    assert out.tolist() == numbers[np.lexsort((hash_of(numbers, key), groups))].tolist()


def test_many_numbers_are_parted_without_loss():
    """750,000 numbers, which is more than one part holds, come in the order of a plain sort."""
    numbers = np.arange(750_000, dtype=np.uint64)
    out = np.zeros(len(numbers), dtype=np.uint32)
    fill_in_order(
        out,
        lambda: [(numbers, np.zeros(len(numbers), dtype=np.int64))],
        np.array([len(numbers)]),
        5,
    )
    assert np.array_equal(out, np.argsort(hash_of(numbers, 5)))
