"""The next micro-batch, asked for and copied to the device while the present one is computed."""

from collections.abc import Iterator
from typing import Any, Self

import torch

from trainer.data.batch import Batch


class BatchesAhead:
    """An iterator over micro-batches on `device`.

    `fetch` takes the next one of `batches` before it is asked for. An error on the way, and the end
    of the batches, come when the batch is asked for, so that the step before is not disturbed. From
    page-locked memory, as the loader makes its batches for CUDA, the copy runs beside the
    computation.
    """

    def __init__(self, batches: Iterator[Batch], device: torch.device) -> None:
        self._batches, self._device = batches, device
        is_cuda = device.type == "cuda"
        self._beside: Any = torch.cuda.Stream(device) if is_cuda else None  # type: ignore[no-untyped-call]
        self._next: Batch | Exception | None = None

    def __iter__(self) -> Self:
        return self

    def fetch(self) -> None:
        """Take the next batch, unless that is done already, and begin to copy it."""
        if self._next is not None:
            return
        try:
            batch = next(self._batches)
        except Exception as error:  # noqa: BLE001 -- raised again when the batch is asked for
            self._next = error
            return
        with torch.cuda.stream(self._beside):  # nothing without a stream
            self._next = batch.to(self._device)

    @property
    def problem(self) -> Exception | None:
        """The error that waits for the next batch to be asked for."""
        return self._next if isinstance(self._next, Exception) else None

    def __next__(self) -> Batch:
        self.fetch()
        fetched, self._next = self._next, None
        if isinstance(fetched, Exception):
            raise fetched
        assert fetched is not None
        if self._beside is not None:
            present = torch.cuda.current_stream(self._device)
            present.wait_stream(self._beside)
            fetched.record_stream(present)
        return fetched
