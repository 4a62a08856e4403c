"""Values with tensors from worker processes to the training process, through memory that both map and that is written again and again.

Torch gives each tensor that crosses a file of shared memory of its own, whose pages are made,
zeroed and mapped on both sides each time: on a virtual machine 2.4 ms a MiB, where copying takes
0.09. Here the pages stay. Knows nothing of batches.
"""

import mmap
import pickle
import struct
from io import BytesIO
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_TURN = struct.Struct("<2q")  # where the slot begins, and the turn of its worker
_ALIGNMENT_BYTES = 64
_HEAD_BYTES = _ALIGNMENT_BYTES  # of a slot: the turn again


class Handover:
    """Memory for `workers` forked processes of a loader, in which each has `slots` places of `slot_bytes`, used by turns.

    To be made before the processes are: they inherit it. Pages that are never written take no
    memory.
    """

    def __init__(self, workers: int, slots: int, slot_bytes: int) -> None:
        self._slots, self._slot_bytes = (
            slots,
            -(-slot_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES + _HEAD_BYTES,
        )
        self._memory = torch.frombuffer(
            mmap.mmap(-1, workers * slots * self._slot_bytes), dtype=torch.uint8
        )
        self._turn = 0

    def put(self, value: Any, worker: int) -> bytes:
        """`value` as bytes, its tensors in the next slot of `worker`, whose process this is; those that do not fit are in the bytes."""
        self._turn += 1
        start = (worker * self._slots + self._turn % self._slots) * self._slot_bytes
        self._head(start).fill_(self._turn)
        written = BytesIO()
        _Writer(written, self._memory[start : start + self._slot_bytes]).dump(value)
        return _TURN.pack(start, self._turn) + written.getvalue()

    def take(self, data: bytes, *, pinned: bool = False) -> Any:
        """What was put, its tensors copied, into page-locked memory if asked; before the same worker has put `slots` values more."""
        start, turn = _TURN.unpack_from(data)
        value = _Reader(
            BytesIO(data[_TURN.size :]),
            self._memory[start : start + self._slot_bytes].numpy(),
            pinned=pinned,
        ).load()
        if self._head(start).item() != turn:
            raise AssertionError(f"slot at {start} was written again before it was read")
        return value

    def _head(self, start: int) -> Tensor:
        return self._memory[start : start + 8].view(torch.int64)


class _Writer(pickle.Pickler):
    """Pickles a value but for its tensors, which it copies into a slot."""

    def __init__(self, file: BytesIO, slot: Tensor) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._slot, self._end = slot, _HEAD_BYTES

    def persistent_id(self, value: Any) -> tuple[int, int, torch.dtype, tuple[int, ...]] | None:
        """Where a tensor was copied to; None for what is pickled."""
        if not isinstance(value, Tensor):
            return None
        start, size = self._end, value.numel() * value.element_size()
        if start + size > len(self._slot):
            return None
        self._slot[start : start + size].view(value.dtype).copy_(value.reshape(-1))
        self._end = start + -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return start, size, value.dtype, tuple(value.shape)


class _Reader(pickle.Unpickler):
    """Reads what a `_Writer` wrote."""

    def __init__(self, file: BytesIO, slot: NDArray[np.uint8], *, pinned: bool) -> None:
        super().__init__(file)
        self._slot, self._pinned = slot, pinned

    def persistent_load(self, place: tuple[int, int, torch.dtype, tuple[int, ...]]) -> Tensor:
        """A copy of the tensor at a place of the slot."""
        start, size, dtype, shape = place
        # By numpy: torch's threads, awake for a while after such a copy, halve the samples a second
        # of two workers on two cores.
        copy = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        np.copyto(copy.numpy(), self._slot[start : start + size])
        return copy.view(dtype).view(shape)
