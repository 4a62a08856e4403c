"""The weights that the optimizer steps, wherever the engine keeps them on this rank.

With one process and with DDP they are the model's own. DeepSpeed keeps them in long float32
vectors, with ZeRO a part of each on every rank, and makes the model's weights of them after each
step. To save, to average or to replace weights means to do so with these; the rest follows.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.model.save import without_wrappers
from trainer.training.engines.accelerator import sum_over_ranks
from trainer.training.engines.deepspeed_engine import gathered

_SHARDED_WEIGHTS = 3
"""The stage of ZeRO from which on no rank has whole weights."""


class Part(NamedTuple):
    """The part of a trained weight that this rank keeps."""

    name: str
    vector: Tensor
    """What the optimizer steps: the weight itself, or a vector with parts of many."""
    offset: int
    """Where the part begins in the vector."""
    start: int
    """Where it begins in the weight."""
    size: int
    """Its numbers; 0 where other ranks keep the whole weight."""
    is_whole: bool
    """True if the vector is the weight, in its shape."""

    def of(self, vector: Tensor) -> Tensor:
        """This part of a vector like its own: the weights, or what an optimizer keeps for them."""
        return vector if self.is_whole else vector[self.offset : self.offset + self.size]

    def cut(self, whole: Tensor) -> Tensor:
        """This part of a whole weight, or of anything in its shape."""
        if self.is_whole:
            return whole
        return whole.flatten()[self.start : self.start + self.size]


class Masters:
    """The parts of this rank, and the way from them to the model's weights and to whole ones."""

    def __init__(
        self, engine: Accelerator, prepared: nn.Module, model: nn.Module, optimizer: Any
    ) -> None:
        self.engine, self.optimizer = engine, innermost(optimizer)
        self.parameters: dict[str, nn.Parameter] = without_wrappers(dict(model.named_parameters()))
        """All parameters of the model by name, trained or not."""
        self._names = {id(one): name for name, one in self.parameters.items()}
        stage_of = getattr(prepared, "zero_optimization_stage", None)
        self.stage: int | None = None if stage_of is None else int(stage_of())
        """The stage of ZeRO; None without DeepSpeed."""
        self._zero: Any = None if stage_of is None else prepared.optimizer
        self.parts = list(self._iter_parts())
        """One for each trained weight, in the order of the groups; the same names on all ranks."""
        self._part_of = {part.name: part for part in self.parts}

    def _iter_parts(self) -> Iterator[Part]:
        if self.stage == _SHARDED_WEIGHTS:
            yield from self._divided_weights()
        elif self.stage:
            yield from self._divided_vectors()
        elif hasattr(self._zero, "fp32_groups"):
            for copies, weights in zip(self._zero.fp32_groups, self._zero.fp16_groups, strict=True):
                for copy, weight in zip(copies, weights, strict=True):
                    yield self._whole(weight, copy)
        else:
            for group in self.optimizer.param_groups:
                for weight in group["params"]:
                    yield self._whole(weight, weight)

    def _whole(self, weight: nn.Parameter, copy: Tensor) -> Part:
        return Part(self._names[id(weight)], copy, 0, 0, weight.numel(), is_whole=True)

    def _divided_vectors(self) -> Iterator[Part]:
        """Stages 1 and 2: a vector for each group."""
        zero = self._zero
        for weights, vector in zip(
            zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True
        ):
            for weight in weights:
                mapping, name = weight._hp_mapping, self._names[id(weight)]  # noqa: SLF001
                if mapping is None:
                    yield Part(name, vector, 0, 0, 0, is_whole=False)
                else:
                    there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
                    yield Part(name, vector, there.start, here.start, here.numel, is_whole=False)

    def _divided_weights(self) -> Iterator[Part]:
        """Stage 3: a vector for so many weights; each rank has an equal part of every weight."""
        zero = self._zero
        for weights in zero.fp16_groups:
            for weight in weights:
                vector, offset, size = zero.grad_position[zero.get_param_id(weight)]
                start = min(size * self.engine.process_index, weight.ds_numel)
                yield Part(
                    self._names[id(weight)],
                    zero.fp32_partitioned_groups_flat[vector],
                    offset,
                    start,
                    min(size, weight.ds_numel - start),
                    is_whole=False,
                )

    def loss_scale(self) -> dict[str, float]:
        """The factor by which DeepSpeed scales losses for fp16, and the steps since it changed.

        Empty where it scales none.
        """
        if not getattr(self._zero, "dynamic_loss_scale", False):
            return {}
        scaler = self._zero.loss_scaler
        steps = scaler.cur_iter - scaler.last_overflow_iter - 1
        return {"scale": float(scaler.cur_scale), "good_steps": steps % scaler.scale_window}

    def set_loss_scale(self, state: Mapping[str, float]) -> None:
        """Continue with what `loss_scale` returned, or another engine's scaling of losses."""
        if state and getattr(self._zero, "dynamic_loss_scale", False):
            scaler = self._zero.loss_scaler
            scaler.cur_scale = state["scale"]
            scaler.last_overflow_iter = scaler.cur_iter - 1 - int(state["good_steps"])

    @property
    def is_divided(self) -> bool:
        """True if no rank has whole weights."""
        return self.stage == _SHARDED_WEIGHTS

    @property
    def is_swapped(self) -> bool:
        """True if the vectors lie on a disk, where nothing but a step reads them."""
        return bool(getattr(self._zero, "swap_optimizer", False))

    def shape(self, name: str) -> torch.Size:
        """The shape of a whole weight."""
        weight = self.parameters[name]
        return torch.Size(getattr(weight, "ds_shape", weight.shape))

    @torch.no_grad()
    def to_model(self) -> None:
        """Make the weights of the model of these, after they were changed; for all ranks."""
        if self.stage == _SHARDED_WEIGHTS:
            zero = self._zero
            zero.checkpoint_event_prologue()  # no weight may be whole meanwhile
            for number in range(len(zero.fp32_partitioned_groups_flat)):
                zero._reassign_or_swap_out_partitioned_parameters(number)  # noqa: SLF001
            zero.checkpoint_event_epilogue()
        elif self.stage:
            self._zero.update_lp_params()
        else:
            for part in self.parts:
                weight = self.parameters[part.name]
                if weight is not part.vector:
                    weight.copy_(part.vector)

    def whole(self, name: str) -> Tensor:
        """A weight as the optimizer steps it, or as it is if it is not trained.

        For all ranks alike, because it may have to be gathered; so that a model never has to be
        gathered at once.
        """
        weight, part = self.parameters[name], self._part_of.get(name)
        if self.stage != _SHARDED_WEIGHTS and (part is None or weight.dtype == torch.float32):
            return weight.detach()
        if part is None:
            return self.whole_as_computed(name)
        if part.is_whole:
            return part.vector.detach()
        from deepspeed.utils import safe_get_full_fp32_param

        found = safe_get_full_fp32_param(weight)
        assert isinstance(found, Tensor)
        return found

    def whole_as_computed(self, name: str) -> Tensor:
        """A weight in the type in which the model computes; for all ranks alike."""
        weight = self.parameters[name]
        if self.stage != _SHARDED_WEIGHTS:
            return weight.detach()
        with gathered(weight):
            return weight.detach().clone()

    def joined(self, part: Part, values: Tensor) -> Tensor:
        """A whole tensor of the parts that all ranks have of it; for all ranks alike.

        Added up as whole numbers, so that each bit stays as it is.
        """
        if part.is_whole:
            return values
        shape = self.shape(part.name)
        whole = torch.zeros(shape.numel(), device=self.engine.device)
        whole[part.start : part.start + part.size] = values.to(whole.device)
        return sum_over_ranks(self.engine, whole.view(torch.int32)).view(torch.float32).view(shape)

    @torch.no_grad()
    def load(
        self,
        weight: Callable[[str], Tensor],
        kept: Callable[[str], Mapping[str, Any]],
        options: Iterable[Mapping[str, Any]],
    ) -> None:
        """Take over whole weights and what an optimizer kept for them; for all ranks.

        `options` are those of the groups. Raises `ValueError` or `RuntimeError` for what does not
        fit.
        """
        for name, parameter in self.parameters.items():
            if name not in self._part_of:
                self._set_untrained(parameter, weight(name))
        for part in self.parts:
            found = weight(part.name)
            if found.shape != self.shape(part.name):
                raise ValueError(
                    f"{part.name}: found {[*found.shape]}, expected {[*self.shape(part.name)]}"
                )
            part.of(part.vector.detach()).copy_(part.cut(found))
        self._load_kept(kept, options)
        self.to_model()

    def _set_untrained(self, parameter: nn.Parameter, value: Tensor) -> None:
        if self.stage != _SHARDED_WEIGHTS:
            parameter.copy_(value)
            return
        with gathered(parameter, modifier_rank=0):
            if self.engine.is_main_process:
                parameter.copy_(value)

    def _load_kept(
        self,
        kept: Callable[[str], Mapping[str, Any]],
        options: Iterable[Mapping[str, Any]],
    ) -> None:
        with self.stepped_vectors():
            content = self.optimizer.state_dict()
            vectors = [one for group in self.optimizer.param_groups for one in group["params"]]
            parts: dict[int, list[Part]] = {id(vector): [] for vector in vectors}
            for part in self.parts:
                parts[id(part.vector)].append(part)
            content["state"] = {
                number: _kept_for(vector, parts[id(vector)], kept)
                for number, vector in enumerate(vectors)
            }
            content["param_groups"] = [
                {**group, **saved, "params": group["params"]}
                for group, saved in zip(content["param_groups"], options, strict=True)
            ]
            self.optimizer.load_state_dict(content)

    @contextmanager
    def stepped_vectors(self) -> Iterator[None]:
        """Inside the context, the optimizer has its vectors, which ZeRO-3 gives it for a step."""
        if self.stage != _SHARDED_WEIGHTS:
            yield
            return
        self._zero._set_fp32_optimizer_param_groups()  # noqa: SLF001
        try:
            yield
        finally:
            self._zero._clear_fp32_optimizer_param_groups()  # noqa: SLF001


def _kept_for(
    vector: Tensor, parts: Iterable[Part], kept: Callable[[str], Mapping[str, Any]]
) -> dict[str, Any]:
    """What an optimizer keeps for a vector, made of that for the weights whose `parts` it has."""
    found: dict[str, Any] = {}
    for part in parts:
        for slot, value in kept(part.name).items():
            if not isinstance(value, Tensor) or value.dim() == 0:
                if slot in found and found[slot] != value:
                    raise ValueError(f"{slot} of {part.name} is not that of its neighbours")
                found[slot] = deepcopy(value)  # each vector counts its own steps
            elif part.is_whole:
                found[slot] = value.clone()
            else:
                whole = found.setdefault(slot, torch.zeros(vector.shape, dtype=value.dtype))
                part.of(whole).copy_(part.cut(value))
    return found


def innermost(optimizer: Any) -> Any:
    """The optimizer of torch inside the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
