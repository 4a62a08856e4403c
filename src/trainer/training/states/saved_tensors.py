"""What a state holds, by the names of parameters, whatever engine and however many ranks saved it.

Without DeepSpeed, one process saves the weights and the state of the optimizer; DeepSpeed saves a
folder with the parts of all ranks. Nothing here needs the engine.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Protocol

import torch
from torch import Tensor

from trainer.config.model_file import read_header
from trainer.errors import ModelError, ResumeError
from trainer.model.save import without_wrappers
from trainer.model.tensor_file import ReadTensors
from trainer.training.states.deepspeed_files import DeepSpeedFiles

_WEIGHTS = "model.safetensors"
_OPTIMIZER = "optimizer.bin"
_DEEPSPEED = "pytorch_model"
"""The folder in a state in which accelerate lets DeepSpeed save."""


class SavedTensors(Protocol):
    """The whole weights of a state, and what the optimizer keeps for each."""

    @property
    def options(self) -> Sequence[Mapping[str, Any]]:
        """The options of each group of the optimizer, such as its rate."""

    def names(self) -> Iterable[str]:
        """The names of all weights and buffers, as the bare model has them."""

    def weight(self, name: str) -> Tensor:
        """A weight, in the precision in which it steps."""

    def kept(self, name: str) -> Mapping[str, Any]:
        """What the optimizer keeps for a parameter, by the optimizer's names; tensors whole."""


class NamedTensors(Mapping[str, Tensor]):
    """The tensors of a file by the names of the bare model, each read when it is asked for."""

    def __init__(self, path: Path, tensors: ReadTensors) -> None:
        self._file, self._tensors = read_header(path), tensors
        self._stored = without_wrappers({name: name for name in self._file.tensors})

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors.read(self._file, self._stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


class _PlainFiles:
    """The files of one process, or of the first one with DDP."""

    def __init__(self, folder: Path, trained: Sequence[str], tensors: ReadTensors) -> None:
        self._folder, self._trained = folder, trained
        self._weights = NamedTensors(folder / _WEIGHTS, tensors)
        self._opened: dict[str, Any] | None = None

    @property
    def _optimizer(self) -> dict[str, Any]:
        if self._opened is None:
            content = torch.load(
                self._folder / _OPTIMIZER, map_location="cpu", mmap=True, weights_only=True
            )
            numbers = [number for group in content["param_groups"] for number in group["params"]]
            if len(numbers) != len(self._trained):
                raise ValueError(
                    f"found {len(numbers):,} trained parameters, expected {len(self._trained):,}"
                )
            self._opened = {
                "kept": {
                    name: content["state"].get(number, {})
                    for name, number in zip(self._trained, numbers, strict=True)
                },
                "options": [
                    {name: value for name, value in group.items() if name != "params"}
                    for group in content["param_groups"]
                ],
            }
        return self._opened

    @property
    def options(self) -> Sequence[Mapping[str, Any]]:
        """The options of each group of the optimizer, such as its rate."""
        options: Sequence[Mapping[str, Any]] = self._optimizer["options"]
        return options

    def names(self) -> Iterable[str]:
        """The names of all weights and buffers, as the bare model has them."""
        return self._weights

    def weight(self, name: str) -> Tensor:
        """A weight, as it was saved."""
        return self._weights[name]

    def kept(self, name: str) -> Mapping[str, Any]:
        """What the optimizer keeps for a parameter, by the optimizer's names."""
        kept: Mapping[str, Any] = self._optimizer["kept"].get(name, {})
        return kept


def is_of_deepspeed(folder: Path) -> bool:
    """True if DeepSpeed saved the state in `folder`."""
    return (folder / _DEEPSPEED).is_dir()


@contextmanager
def saved_tensors(folder: Path, trained: Sequence[str]) -> Iterator[SavedTensors]:
    """The tensors of the state in `folder`, read while they are asked for.

    `trained` are the names of the parameters that it trains, in the order of the optimizer's
    groups. Raises `ResumeError` when they cannot be read, also inside the context.
    """
    try:
        with ReadTensors() as reader:
            if (folder / _WEIGHTS).exists():
                yield _PlainFiles(folder, trained, reader)
            elif is_of_deepspeed(folder):
                yield DeepSpeedFiles(folder / _DEEPSPEED, trained)
            else:
                raise ResumeError(
                    f"{folder}: found neither {_WEIGHTS} nor {_DEEPSPEED}, expected the weights of "
                    "one of them. Name another state."
                )
    except ModelError as error:
        raise ResumeError(f"{error} Name another state.") from error
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, UnpicklingError) as error:
        problem = " ".join(str(error).split())[:200]
        raise ResumeError(
            f"{folder}: what it holds cannot be used here ({problem}), expected the weights of "
            "this model and the state of its optimizer. Name another state."
        ) from error
