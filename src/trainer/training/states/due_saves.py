"""When the states of a run are saved, and what is told when one could not be."""

import time
from collections.abc import Callable
from typing import Any

from trainer.config.load import resolved_toml
from trainer.training.states.loading import layout_of
from trainer.training.states.saving import save_state
from trainer.training.step import TrainState


class Saves:
    """The states that a run has saved since it went on after `after_step`.

    `fixed` is what a resumed run must share. `say` is told of a state that could not be saved.
    """

    def __init__(
        self,
        state: TrainState,
        fixed: dict[str, Any],
        steps_per_epoch: int,
        say: Callable[..., None],
        *,
        after_step: int,
    ) -> None:
        self._state, self._fixed, self._steps_per_epoch = state, fixed, steps_per_epoch
        self._say = say
        self.step, self._at = after_step, time.monotonic()
        """The step of the newest state; the step at which the run began when there is none yet."""
        self.unsaved: set[int] = set()
        """The steps whose states could not be saved."""

    def are_due_by_clock(self) -> bool:
        """True if `checkpoint.every_minutes` have passed by this rank's clock."""
        minutes = self._state.config.checkpoint.every_minutes
        return minutes > 0 and time.monotonic() - self._at >= minutes * 60

    def are_due_by_step(self, step: int) -> bool:
        """True if a state is due after this step; all ranks give the same answer."""
        checkpoint = self._state.config.checkpoint
        every, epochs = checkpoint.every_steps, checkpoint.every_epochs
        return bool(
            (every and step % every == 0)
            or (epochs and step % (epochs * self._steps_per_epoch) == 0)
        )

    def save(self, step: int, *, replaces_older: bool) -> None:
        """Save the full state, unless it is saved already; only warn if the disk is full.

        A state that `replaces_older` ones lets `checkpoint.keep` of them be; weights that may be
        damaged replace none.
        """
        if step == self.step and step:
            return
        state, config = self._state, self._state.config
        saved, problem = save_state(
            state.engine,
            config.train.output_dir,
            step,
            {
                "identity": self._fixed,
                "loss_scale": state.scaling.state() or state.masters.loss_scale(),
                "layout": layout_of(state),
            },
            resolved_toml(config),
            ema=state.ema,
            keep=config.checkpoint.keep if replaces_older else None,
        )
        self._at = time.monotonic()
        if saved:
            self.step = step
            return
        is_first = not self.unsaved
        self.unsaved.add(step)
        if is_first:
            self._say(
                f"WARNING: the state after step {step:,} could not be saved ({problem}). "
                "The older states are kept and the run continues. Free some disk space."
            )
