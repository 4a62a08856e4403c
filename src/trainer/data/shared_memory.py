"""Reused shared memory that carries tensors from worker processes to the training process.

Torch gives each tensor that crosses its own file of shared memory, whose pages are created, zeroed
and mapped on both sides each time: 2.4 ms per MiB on a virtual machine, where copying takes 0.09.
Here the pages stay mapped and are written again and again.

How it works: every worker owns a few slots and fills them in turn. Tensors are copied into a slot;
everything else, and the offset of each tensor, is pickled into the bytes that cross by a pipe. The
training process copies the tensors out before the worker returns to the same slot; the turn number
at the head of the slot proves that it did.
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

# The offset of the slot, and the turn of its worker.
_TURN = struct.Struct("<2q")
_ALIGNMENT_BYTES = 64
# The head of a slot holds the turn again.
_HEAD_BYTES = _ALIGNMENT_BYTES


class Handover:
    """Shared memory in which each of `workers` forked processes has `slots` slots of `slot_bytes`.

    Create it before the processes, which inherit it. Pages that are never written take no memory.
    """

    def __init__(self, workers: int, slots: int, slot_bytes: int) -> None:
        self._slots = slots
        self._slot_bytes = -(-slot_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES + _HEAD_BYTES
        self._memory = torch.frombuffer(
            mmap.mmap(-1, workers * slots * self._slot_bytes), dtype=torch.uint8
        )
        self._turn = 0

    def put(self, value: Any, worker: int) -> bytes:
        """The value as bytes, with its tensors in the next slot of `worker`.

        To be called in the process of that worker. Tensors that do not fit go into the bytes.
        """
        self._turn += 1
        start = (worker * self._slots + self._turn % self._slots) * self._slot_bytes
        self._head(start).fill_(self._turn)
        written = BytesIO()
        _Writer(written, self._memory[start : start + self._slot_bytes]).dump(value)
        return _TURN.pack(start, self._turn) + written.getvalue()

    def take(self, data: bytes, *, pinned: bool = False) -> Any:
        """The value that was put, with its tensors copied, into page-locked memory if `pinned`.

        To be called before the same worker has put `slots` more values; raises `AssertionError`
        otherwise.
        """
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
    """A pickler that copies tensors into a slot and pickles everything else."""

    def __init__(self, file: BytesIO, slot: Tensor) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self._slot, self._end = slot, _HEAD_BYTES

    def persistent_id(self, value: Any) -> tuple[int, int, torch.dtype, tuple[int, ...]] | None:
        """The place that a tensor was copied to; None for everything that is to be pickled."""
        if not isinstance(value, Tensor):
            return None
        start, size = self._end, value.numel() * value.element_size()
        if start + size > len(self._slot):
            return None
        self._slot[start : start + size].view(value.dtype).copy_(value.reshape(-1))
        self._end = start + -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        return start, size, value.dtype, tuple(value.shape)


class _Reader(pickle.Unpickler):
    """The unpickler of values that a `_Writer` wrote."""

    def __init__(self, file: BytesIO, slot: NDArray[np.uint8], *, pinned: bool) -> None:
        super().__init__(file)
        self._slot, self._pinned = slot, pinned

    def persistent_load(self, place: tuple[int, int, torch.dtype, tuple[int, ...]]) -> Tensor:
        """A copy of the tensor at `place` in the slot."""
        start, size, dtype, shape = place
        # With numpy: torch's threads stay awake for a while after such a copy, which halves the
        # samples per second of two workers on two cores.
        copy = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        np.copyto(copy.numpy(), self._slot[start : start + size])
        return copy.view(dtype).view(shape)
