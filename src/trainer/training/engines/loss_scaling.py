"""Computation in fp16, with losses that are scaled so that small gradients do not become 0.

Gradients below 6e-8 are 0 in fp16, and values above 65,504 are infinite. So the loss is multiplied
by a large power of two and the gradients are divided by it. Where they overflow, the step is
skipped and the factor halved; after 2,000 steps without one it is doubled. Source: torch's
`GradScaler`, which keeps the factor here. Its own `step` is not used: it would read a value from
the device once more per step, and the norm of the gradient tells the same.
"""

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from trainer.config.settings import Config


class LossScaling:
    """The scale of a run's losses; where `train.precision` is not fp16, nothing changes.

    Nor does it `by_engine`, for an engine that computes in fp16 and scales losses by itself.
    """

    def __init__(self, config: Config, device: torch.device, *, by_engine: bool = False) -> None:
        self.is_on = config.train.precision == "fp16" and not by_engine
        self._device = device
        self._scaler = torch.amp.GradScaler(device.type, enabled=self.is_on)

    def autocast(self) -> AbstractContextManager[Any]:
        """A context in which the model computes in fp16."""
        return torch.autocast(self._device.type, torch.float16, enabled=self.is_on)

    def scale(self) -> Tensor:
        """The current factor, as a scalar on the device."""
        return self.scaled(torch.ones((), device=self._device))

    def scaled(self, loss: Tensor) -> Tensor:
        """The loss times the factor, for the backward pass."""
        return self._scaler.scale(loss)

    def unscale(self, optimizer: Any) -> None:
        """Divide the gradients by the factor; once per step, when they are reduced over ranks."""
        self._scaler.unscale_(getattr(optimizer, "optimizer", optimizer))

    def update(self) -> None:
        """Choose the factor of the next step, after `unscale` has seen the gradients of this."""
        self._scaler.update()

    def state(self) -> dict[str, float]:
        """What a saved state keeps: the factor and the steps since it changed; empty if off."""
        kept = self._scaler.state_dict()
        return {"scale": kept["scale"], "good_steps": kept["_growth_tracker"]} if kept else {}

    def load(self, state: Mapping[str, float]) -> None:
        """Continue with what `state` returned; with the first factor if scaling was off then."""
        if self.is_on and state:
            kept = {"scale": state["scale"], "_growth_tracker": int(state["good_steps"])}
            self._scaler.load_state_dict(self._scaler.state_dict() | kept)
