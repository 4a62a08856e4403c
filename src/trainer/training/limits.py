"""What may go wrong in a run before it stops: skipped steps, replaced samples, broken gradients.

It counts and words the errors; `active_run` saves what is sound, and raises them.
"""

from collections.abc import Callable

from trainer.config.settings import Config
from trainer.data.epochs import RunSize
from trainer.errors import LatentsError, NonFiniteError
from trainer.training.states.checkpoint import newest_state
from trainer.training.step import StepResult

MOST_REPLACED = 0.01
"""Largest share of an epoch that may be replacements for missing or broken latents."""
MOST_SKIPPED = 20
"""Largest number of steps in a row that may be skipped.

Latents are checked to be finite, so a single batch may break a gradient, but not every one.
"""


class Limits:
    """What has gone wrong so far; `say` is told of it."""

    def __init__(self, config: Config, size: RunSize, say: Callable[..., None]) -> None:
        self._config, self._size, self._say = config, size, say
        self.skipped_in_row = 0
        """Steps that had no finite gradient, since the last one that was taken.

        If there are any, the weights may be damaged."""
        self._replaced_in_epoch = 0

    def count_skipped(self, step: int, result: StepResult) -> None:
        """Warn if `step` was skipped, and raise `NonFiniteError` after `MOST_SKIPPED` in a row."""
        self.skipped_in_row = 0 if result.taken else self.skipped_in_row + 1
        if not result.taken and result.may_scale_less:
            self._say(
                f"step {step:,} was skipped: its gradients overflow fp16 with a loss scale of "
                f"{result.loss_scale:,.0f}, which is halved now."
            )
        elif self.skipped_in_row == 1:
            self._say(
                f"WARNING: step {step:,} was skipped: its gradient norm is {result.grad_norm}."
            )
        if self.skipped_in_row == MOST_SKIPPED:
            raise NonFiniteError(
                f"step {step:,}: found no finite gradient in {MOST_SKIPPED} steps in a row, "
                "expected at least one: the weights are damaged. The states in "
                f"{self._config.train.output_dir} are from before these steps. Lower the learning "
                "rate, then resume with --resume latest --allow-change."
            )

    def count_replaced(self, step: int, result: StepResult) -> LatentsError | None:
        """The error when more than `MOST_REPLACED` of the epoch are replacements; None before."""
        if (step - 1) % self._size.steps_per_epoch == 0:
            self._replaced_in_epoch = 0
        self._replaced_in_epoch += result.replaced
        samples = self._size.samples_per_epoch
        if self._replaced_in_epoch <= MOST_REPLACED * samples:
            return None
        return LatentsError(
            f"step {step:,}: found {self._replaced_in_epoch:,} samples of this epoch without "
            f"usable latents, expected at most {MOST_REPLACED:.0%} of {samples:,}. Cache the files "
            "named above again, then resume with --resume latest."
        )

    def broken_gradient(self, step: int, result: StepResult) -> NonFiniteError:
        """The error for a gradient of `step` that is not finite, where no step may be skipped."""
        self.skipped_in_row += 1
        found = f"step {step:,}: the gradient norm is {result.grad_norm}, expected a finite number."
        if not self._config.optimizer.fused_backward:
            return NonFiniteError(
                f"{found} The state after step {step - 1:,} is saved. Set "
                'train.on_nonfinite = "skip" and resume with --resume latest, or lower the '
                "learning rate and resume with --resume latest --allow-change."
            )
        newest = newest_state(self._config.train.output_dir)
        way_on = (
            f"Lower the learning rate and resume with --resume {newest} --allow-change."
            if newest
            else "No state had been saved yet: lower the learning rate and start anew."
        )
        return NonFiniteError(
            f"{found} With optimizer.fused_backward, the backward pass had stepped the weights "
            f"before that was known, so they are broken and not saved. {way_on}"
        )
