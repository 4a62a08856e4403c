import multiprocessing
import sys

import pytest
import torch

from trainer.data.shared_memory import Handover

VALUES = [
    {
        "a": torch.arange(6.0).reshape(2, 3),
        "b": (torch.tensor([1, 2]), "text", None),
        "c": torch.tensor(7),
    },
    [
        torch.zeros(0, 4),
        torch.ones(3, dtype=torch.bool),
        torch.full((5,), 2.5, dtype=torch.bfloat16),
        torch.arange(12).view(3, 4).T,
    ],
]


def assert_same(one, two):
    """Two values are equal, tensors bit for bit."""
    if isinstance(one, torch.Tensor):
        assert one.dtype == two.dtype
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert_same(list(one.items()), list(two.items()))
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_same(left, right)
    else:
        assert one == two


@pytest.mark.parametrize("value", VALUES)
def test_what_is_put_is_taken(value):
    """Tensors come back with their shapes and types, and so does everything around them."""
    handover = Handover(workers=2, slots=3, slot_bytes=1000)
    assert_same(handover.take(handover.put(value, 1)), value)


def test_tensors_cross_in_the_slot_and_large_ones_in_the_bytes():
    """Tensors that fit cross in the slot, and larger ones in the bytes."""
    handover = Handover(workers=1, slots=1, slot_bytes=4096)
    assert len(handover.put(torch.ones(1000), 0)) < 400
    large = [torch.arange(5000.0), torch.arange(100.0)]
    data = handover.put(large, 0)
    assert len(data) > 20_000
    assert_same(handover.take(data), large)


def test_what_was_taken_is_a_copy():
    """A value that was taken stays valid when its slot is written again."""
    handover = Handover(workers=1, slots=1, slot_bytes=4096)
    first = handover.take(handover.put(torch.ones(100), 0))
    handover.take(handover.put(torch.zeros(100), 0))
    assert torch.equal(first, torch.ones(100))


def test_slots_are_used_by_turns():
    """As many values as slots can wait; after one more, the oldest is refused."""
    handover = Handover(workers=2, slots=3, slot_bytes=4096)
    waiting = [handover.put(torch.full((9,), float(number)), 1) for number in range(3)]
    other = handover.put(torch.full((9,), 9.0), 0)
    assert [handover.take(data)[0].item() for data in (*waiting, other)] == [0, 1, 2, 9]
    handover.put(torch.zeros(9), 1)
    handover.put(torch.zeros(9), 1)
    with pytest.raises(AssertionError, match="written again before it was read"):
        handover.take(waiting[1])


@pytest.mark.skipif(sys.platform != "linux", reason="the memory is inherited by forked processes")
def test_between_processes():
    """A value that a forked process puts is taken by the process that made the memory."""
    handover = Handover(workers=1, slots=2, slot_bytes=1 << 20)
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")

    def put():
        # As in a DataLoader worker: OpenMP's threads do not survive a fork.
        torch.set_num_threads(1)
        there.send_bytes(handover.put(torch.arange(1e5), 0))

    process = context.Process(target=put)
    process.start()
    data = here.recv_bytes()
    process.join()
    assert len(data) < 1000
    assert torch.equal(handover.take(data), torch.arange(1e5))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_into_page_locked_memory():
    """With a GPU, the copies are page-locked and equal."""
    handover = Handover(workers=1, slots=1, slot_bytes=4096)
    taken = handover.take(handover.put(torch.arange(10.0).view(2, 5), 0), pinned=True)
    assert taken.is_pinned()
    assert torch.equal(taken.cuda().cpu(), torch.arange(10.0).view(2, 5))
