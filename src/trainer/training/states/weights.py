"""The weights in a saved state that are meant for use, read without the engine that saved it."""

from collections import ChainMap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor

from trainer.config.settings import Config
from trainer.errors import ResumeError
from trainer.model.build import build_model
from trainer.model.model import Model
from trainer.model.tensor_file import ReadTensors
from trainer.model.trainable import parameter_groups, trained_names
from trainer.training.ema import EMA_FILE
from trainer.training.engines.asked_tensors import AskedTensors
from trainer.training.optimizer.build import build_optimizer
from trainer.training.optimizer.classes import find_class, is_of_bitsandbytes
from trainer.training.optimizer.stepping import begin_step, weights_for_use
from trainer.training.optimizer.stochastic_rounding import stochastic_rounding
from trainer.training.states.checkpoint import SavedState
from trainer.training.states.saved_tensors import NamedTensors, SavedTensors, saved_tensors


@contextmanager
def state_weights(
    saved: SavedState, model: Model, config: Config, *, ema: bool = False
) -> Iterator[Mapping[str, Tensor]]:
    """The weights of a state by the names of `model.state_dict()`, as they are meant for use.

    With `ema`, the moving averages that the state holds stand for the weights that are trained.
    They are read one by one while they are asked for; only those of schedule-free optimizers are
    held in memory. `model` has shapes alone. Raises `ResumeError` when they do not fit the model,
    or cannot be read here.
    """
    path = saved.folder / EMA_FILE
    if ema and not path.exists():
        raise ResumeError(
            f"{saved.folder}: found no {EMA_FILE}, because the run kept no moving average "
            "(ema.decay). Leave --ema out, or name another state."
        )
    with saved_tensors(saved.folder, trained_names(model)) as tensors, ReadTensors() as reader:
        _check_names(saved, model, tensors)
        state: Mapping[str, Tensor] = AskedTensors(tensors.names(), tensors.weight)
        if ema:
            averages: Any = NamedTensors(path, reader)
            state = ChainMap(averages, cast("Any", state))
        if ema or not _trains_other_weights(config):
            yield state
        else:
            with _averages(model, tensors, config, saved.step) as state:
                yield state


def _check_names(saved: SavedState, model: Model, tensors: SavedTensors) -> None:
    if missing := sorted(model.state_dict().keys() - set(tensors.names())):
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
    shapes: Model, tensors: SavedTensors, config: Config, step: int
) -> Iterator[Mapping[str, Tensor]]:
    """The averages that a schedule-free optimizer keeps, which its state and the weights give.

    `step` is the number of steps that are done.
    """
    model = build_model(config, weights=False)
    model.load_state_dict({name: tensors.weight(name) for name in tensors.names()}, assign=True)
    for name, parameter in shapes.named_parameters():
        model.get_parameter(name).requires_grad_(parameter.requires_grad)
    groups = parameter_groups(model, config)
    rounding = stochastic_rounding(config, model)
    optimizer = build_optimizer(groups, config.optimizer, torch.device("cpu"), rounding)
    begin_step(optimizer, step - 1)  # whose noise rounded the averages of the run
    content = optimizer.state_dict()
    content["state"] = {
        number: dict(tensors.kept(name)) for number, name in enumerate(trained_names(model))
    }
    content["param_groups"] = [
        {**saved, "params": group["params"]}
        for group, saved in zip(content["param_groups"], tensors.options, strict=True)
    ]
    optimizer.load_state_dict(content)
    with weights_for_use(optimizer):
        yield model.state_dict()
