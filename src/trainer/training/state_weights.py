"""The weights in a saved state, read without the engine that saved it.

An engine of one process or of several saves one safetensors file; DeepSpeed saves a folder with the
shards of all ranks, which its own code joins.
"""

from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import torch
from torch import Tensor

from trainer.config.model_file import read_header
from trainer.config.settings import Config
from trainer.errors import ModelError, ResumeError
from trainer.model.build import build_model
from trainer.model.model import Model
from trainer.model.save import without_wrappers
from trainer.model.tensor_file import ReadTensors
from trainer.model.trainable import parameter_groups
from trainer.training.checkpoint import SavedState
from trainer.training.ema import EMA_FILE
from trainer.training.optim import begin_step, build_optimizer, weights_for_use
from trainer.training.optimizer_classes import find_class, is_of_bitsandbytes
from trainer.training.stochastic_rounding import stochastic_rounding

_WEIGHTS = "model.safetensors"
_OPTIMIZER = "optimizer.bin"
_DEEPSPEED = "pytorch_model"
"""The folder in a state in which accelerate lets DeepSpeed save."""


class _FileState(Mapping[str, Tensor]):
    """The tensors of a file by the names of the bare model, each read when it is asked for."""

    def __init__(self, path: Path, tensors: ReadTensors) -> None:
        self._file, self._tensors = read_header(path), tensors
        names = without_wrappers({name: name for name in self._file.tensors})
        self._stored = dict(names)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors.read(self._file, self._stored[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)


@contextmanager
def state_weights(
    saved: SavedState, model: Model, config: Config, *, ema: bool = False
) -> Iterator[Mapping[str, Tensor]]:
    """The weights of a state by the names of `model.state_dict()`, as they are meant for use.

    With `ema`, the moving averages that the state holds stand for the weights that are trained.
    Raises `ResumeError` when they do not fit the model, or cannot be read here.
    """
    if not ema:
        with _last_weights(saved, model, config) as state:
            yield state
        return
    path = saved.folder / EMA_FILE
    if not path.exists():
        raise ResumeError(
            f"{saved.folder}: found no {EMA_FILE}, because the run kept no moving average "
            "(ema.decay). Leave --ema out, or name another state."
        )
    with _last_weights(saved, model, config) as state, ReadTensors() as tensors:
        averages: Any = _FileState(path, tensors)
        yield ChainMap(averages, cast("Any", state))


@contextmanager
def _last_weights(
    saved: SavedState, model: Model, config: Config
) -> Iterator[Mapping[str, Tensor]]:
    """The weights of the last step of a state.

    They are read one by one while they are asked for; those of schedule-free optimizers, and of
    DeepSpeed, are held in memory. `model` has shapes alone.
    """
    path = saved.folder / _WEIGHTS
    averages = _trains_other_weights(config)
    with ReadTensors() as tensors:
        if path.exists():
            try:
                state: Mapping[str, Tensor] = _FileState(path, tensors)
            except ModelError as error:
                raise ResumeError(f"{error} Name another state.") from error
            _check_names(saved, model, state)
            if averages:
                with _averages(saved, state, config) as state:
                    yield state
                return
        elif (saved.folder / _DEEPSPEED).is_dir():
            if averages:
                raise ResumeError(
                    f"{saved.folder}: {config.optimizer.name} trains other weights than those for "
                    "use, which cannot be told from a state of DeepSpeed. Resume the run to its "
                    "end, which writes the model."
                )
            state = _deepspeed_weights(saved)
            _check_names(saved, model, state)
        else:
            raise ResumeError(
                f"{saved.folder}: found neither {_WEIGHTS} nor {_DEEPSPEED}, expected the weights "
                "of one of them. Name another state."
            )
        yield state


def _check_names(saved: SavedState, model: Model, state: Mapping[str, Tensor]) -> None:
    wanted = model.state_dict().keys()
    if missing := sorted(wanted - state.keys()):
        raise ResumeError(
            f"{saved.folder}: found no {missing[0]} among the weights, and {len(missing) - 1:,} "
            "more are missing, expected all of the model. Name another state."
        )


def _trains_other_weights(config: Config) -> bool:
    """True for optimizers whose weights for use are not those that they train."""
    name = config.optimizer.name
    return not is_of_bitsandbytes(name) and hasattr(find_class(name), "eval")


@contextmanager
def _averages(
    saved: SavedState, state: Mapping[str, Tensor], config: Config
) -> Iterator[Mapping[str, Tensor]]:
    """The averages that a schedule-free optimizer keeps, which its state and the weights give."""
    model = build_model(config, weights=False)
    model.load_state_dict({name: state[name] for name in state}, assign=True)
    for name, parameter in build_model(config, weights=False).named_parameters():
        model.get_parameter(name).requires_grad_(parameter.requires_grad)
    groups = parameter_groups(model, config)
    rounding = stochastic_rounding(config, model)
    optimizer = build_optimizer(groups, config.optimizer, torch.device("cpu"), rounding)
    begin_step(optimizer, saved.step - 1)  # whose noise rounded the averages of the run
    try:
        content: Any = torch.load(saved.folder / _OPTIMIZER, map_location="cpu", weights_only=True)
        optimizer.load_state_dict(content)
    except (OSError, RuntimeError, ValueError, KeyError, EOFError, UnpicklingError) as error:
        raise ResumeError(
            f"{saved.folder}: {_OPTIMIZER} is damaged ({' '.join(str(error).split())[:200]}), "
            f"expected the averages of {config.optimizer.name} in it. Name another state."
        ) from error
    with weights_for_use(optimizer):
        yield model.state_dict()


def _deepspeed_weights(saved: SavedState) -> Mapping[str, Tensor]:
    """The weights that DeepSpeed saved, of any ZeRO stage, as its own script joins them."""
    folder = saved.folder / _DEEPSPEED
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ResumeError(
            f"{saved.folder}: DeepSpeed saved this state, and it cannot be imported ({error}). "
            "Install it: pip install 'capmerge[deepspeed]'."
        ) from error
    whole = sorted(folder.glob("mp_rank_*_model_states.pt"))
    state: dict[str, Tensor] = {}
    try:
        # Up to stage 2, one file has all weights as they compute, also the frozen ones of stage 1,
        # which nothing else has. It holds more than tensors, and comes from our own run.
        if whole:
            state = torch.load(whole[0], map_location="cpu", weights_only=False)["module"]
        # From stage 1 on, the shards have the weights as the optimizer keeps them, in float32.
        if any("zero" in path.name for path in folder.glob("*_optim_states.pt")):
            with redirect_stdout(StringIO()):  # it prints what it does
                state |= get_fp32_state_dict_from_zero_checkpoint(
                    str(folder.parent), tag=folder.name
                )
    except (OSError, ValueError, KeyError, RuntimeError, EOFError) as error:
        raise ResumeError(
            f"{saved.folder}: the weights of DeepSpeed cannot be joined ({error}). Name another "
            "state."
        ) from error
    return without_wrappers(state)
