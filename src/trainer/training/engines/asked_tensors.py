"""Tensors that all ranks make together, one at a time, when rank 0 asks for them."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager

from accelerate import Accelerator
from torch import Tensor

from trainer.training.engines.accelerator import from_rank_0


@contextmanager
def led_by_rank_0(
    engine: Accelerator, make: Callable[[str], Tensor]
) -> Iterator[Callable[[str], Tensor] | None]:
    """A function that calls `make` on all ranks alike, for rank 0; None for the others.

    These come into the context when rank 0 has left it. So rank 0 alone decides which tensors are
    gathered, and when, and no rank holds more than one of them.
    """
    if not engine.is_main_process:
        while (name := from_rank_0(engine, None)) is not None:
            make(name)
        yield None
        return

    def ask(name: str) -> Tensor:
        from_rank_0(engine, name)
        return make(name)

    try:
        yield ask
    finally:
        from_rank_0(engine, None)


class AskedTensors(Mapping[str, Tensor]):
    """Tensors by name, each made when it is asked for."""

    def __init__(self, names: Iterable[str], make: Callable[[str], Tensor]) -> None:
        self._names, self._make = dict.fromkeys(names), make

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._make(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)
