"""An optimizer of any class that steps the weights in portions, not all of them at once.

It needs no room for more than one portion: for its gradients, which `fused_backward` frees right
after the step of each parameter, or for fp32 copies of weights in bf16, which stochastic rounding
needs. Its state has the form that the class gives it, and the types that it has for fp32 weights.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.nn import Parameter
from torch.optim import Optimizer

from trainer.training.optimizer.stochastic_rounding import StochasticRounding

PORTION = 1 << 24
"""Weights of a portion, unless a single parameter has more: copies of them take 64 MiB."""


class InPortions(Optimizer):
    """What `in_portions` adds to an optimizer class.

    While a portion steps, it is all that the class sees. Each portion finds the options of its
    group as they were before the step, because many classes count their steps there.
    """

    rounding: StochasticRounding | None = None
    """If set, weights are bf16, and the class steps copies of them in fp32."""
    is_fused: bool = False
    """True if each parameter is stepped as soon as its gradient is there, and `step` only ends."""

    def begin_step(self, step: int) -> None:
        """Tell the number of the step (from 0) that comes next."""
        if self.rounding:
            self.rounding.step = step

    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Step all weights, or end the step if all of them have been stepped one by one."""
        assert closure is None, "no optimizer that needs a closure passes the trial"
        if not self.is_fused:
            self._act_on_all(super().step)
            return
        for number, group in enumerate(self.param_groups):
            if number not in self._options:  # no gradient has reached this part
                self.step_one(number, group["params"][0])
        self._keep_options()

    def step_one(self, number: int, parameter: Parameter) -> None:
        """Step one parameter of the group of that `number`; `step` has to follow at the end."""
        with torch.no_grad():
            self._act_on(number, [parameter], super().step)

    @property
    def _options(self) -> dict[int, dict[str, Any]]:
        """The options of each group after its portions have stepped, by the group's number."""
        found: dict[int, dict[str, Any]] = self.__dict__.setdefault("_options_of_groups", {})
        return found

    def _keep_options(self) -> None:
        for number, options in self._options.items():
            self.param_groups[number].update(options)
        self._options.clear()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state; what belongs to copies in fp32 is not cut to the bf16 of the weights."""
        if not self.rounding:
            super().load_state_dict(state_dict)
            return
        # torch gives a state the type of its weight. These have no memory of their own.
        real = [group["params"] for group in self.param_groups]
        stand_ins = [[_stand_in(parameter) for parameter in group] for group in real]
        try:
            self._give(stand_ins)
            super().load_state_dict(state_dict)
        finally:
            self._give(real)
        real_of: dict[Any, Parameter] = {
            stand_in: parameter
            for group, parameters in zip(stand_ins, real, strict=True)
            for stand_in, parameter in zip(group, parameters, strict=True)
        }
        loaded = {real_of.get(key, key): kept for key, kept in self.state.items()}
        self.state = defaultdict(dict, loaded)

    def _give(self, parameters: Sequence[list[Parameter]]) -> None:
        for group, of_group in zip(self.param_groups, parameters, strict=True):
            group["params"] = of_group

    def _act_on_all(self, act: Callable[[], Any]) -> None:
        """Call `act` for one portion after the other."""
        with torch.no_grad():
            for number, group in enumerate(self.param_groups):
                for portion in iter_portions(group["params"]):
                    self._act_on(number, portion, act)
        self._keep_options()

    def _act_on(self, number: int, parameters: Sequence[Parameter], act: Callable[[], Any]) -> None:
        """Call `act` while `parameters`, or their copies in fp32, are all weights that exist."""
        groups, states = self.param_groups, self.state
        seen = [_copy(parameter) for parameter in parameters] if self.rounding else parameters
        alone = {**groups[number], "params": list(seen)}
        self.param_groups = [alone]
        if self.rounding:
            pairs = zip(seen, parameters, strict=True)
            kept: dict[Any, Any] = {
                copy: states[parameter] for copy, parameter in pairs if parameter in states
            }
            self.state = defaultdict(dict, kept)
        try:
            act()
            stepped = self.state
        finally:
            self.param_groups, self.state = groups, states
        self._options[number] = {name: value for name, value in alone.items() if name != "params"}
        if self.rounding:
            for copy, parameter in zip(seen, parameters, strict=True):
                if copy in stepped:
                    states[parameter] = stepped[copy]
                self.rounding.write(parameter, copy.detach())


def in_portions(optimizer_class: type[Any]) -> type[Any]:
    """The same class, which steps in portions; its arguments and its state are the same."""
    functions: dict[str, Any] = {"__module__": optimizer_class.__module__}
    # Schedule-free optimizers put other weights in place, computed from what they keep.
    for name in ("train", "eval"):
        if hasattr(optimizer_class, name):
            functions[name] = _for_all_portions(getattr(optimizer_class, name))
    return type(optimizer_class.__name__, (InPortions, optimizer_class), functions)


def _for_all_portions(function: Callable[[Any], None]) -> Callable[[InPortions], None]:
    def act(optimizer: InPortions) -> None:
        optimizer._act_on_all(lambda: function(optimizer))  # noqa: SLF001 -- it becomes a method

    return act


def iter_portions(parameters: Sequence[Parameter]) -> Iterator[list[Parameter]]:
    """The parameters in their order, in portions of about `PORTION` weights."""
    portion: list[Parameter] = []
    weights = 0
    for parameter in parameters:
        if portion and weights + parameter.numel() > PORTION:
            yield portion
            portion, weights = [], 0
        portion.append(parameter)
        weights += parameter.numel()
    if portion:
        yield portion


def _copy(parameter: Parameter) -> Parameter:
    """The parameter and its gradient in fp32."""
    copy = Parameter(parameter.detach().float())
    copy.grad = None if parameter.grad is None else parameter.grad.float()
    return copy


def _stand_in(parameter: Parameter) -> Parameter:
    """A parameter in fp32 of that shape, on that device, in the memory of a single number."""
    single = torch.empty((), dtype=torch.float32, device=parameter.device)
    return Parameter(single.expand(parameter.shape), requires_grad=parameter.requires_grad)
