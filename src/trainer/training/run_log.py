"""Everything that a run prints and logs: messages, progress bar, metrics.jsonl and trackers.

Every rank calls every method; only rank 0 prints and writes.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from trainer.config.load import resolved_toml
from trainer.config.settings import Config
from trainer.data.epochs import RunSize
from trainer.model.model import Model
from trainer.model.trainable import trained_share
from trainer.training.engines.accelerator import engine_name, from_all_ranks
from trainer.training.metrics import MetricsFile, Recent, peak_memory_bytes, progress_fields
from trainer.training.run_folder import METRICS_FILE, VALIDATION_FILE
from trainer.training.step import StepResult


class RunLog:
    """The log of a run that continues after `after_step` steps; later lines of it are removed."""

    def __init__(
        self, engine: Accelerator, config: Config, size: RunSize, *, after_step: int
    ) -> None:
        self._engine, self._settings, self._size = engine, config.log, size
        self._seed = config.train.seed
        self._recent = Recent()
        self._bar: Any = None
        self._metrics: MetricsFile | None = None
        self._validations: MetricsFile | None = None
        self._lost_lines = 0
        if engine.is_main_process:
            folder = config.train.output_dir
            self._metrics = MetricsFile(folder / METRICS_FILE, after_step=after_step)
            # A run whose validation was turned off since cuts the file back too.
            path = folder / VALIDATION_FILE
            if config.validation.records or config.validation.share or path.exists():
                self._validations = MetricsFile(path, after_step=after_step)
        if self._settings.trackers:
            engine.init_trackers(self._settings.project, config={"config": resolved_toml(config)})

    def close(self) -> None:
        """Close the metrics file, and print how many of its lines are lost if not just one."""
        if self._lost_lines > 1:
            self.say(f"WARNING: the metrics of {self._lost_lines:,} steps are lost.")
        for file in (self._metrics, self._validations):
            if file:
                file.close()

    def say(self, *lines: str) -> None:
        """Print lines once, whatever the number of ranks, without breaking the progress bar.

        A terminal that is gone, as after a dropped ssh connection, keeps no run from saving.
        """
        for line in lines:
            if self._engine.is_main_process:
                with suppress(OSError):
                    tqdm.write(line, file=sys.stderr)

    def say_start(self, model: Model, step: int, *, resumed: bool, speed: str) -> None:
        """Print how the run starts, in one line with the derived numbers.

        `speed` is what `[speed]` has chosen, in words.
        """
        size, begun = self._size, "starts"
        if resumed:
            begun = (
                f"resumes at step {step:,}"
                if step
                else "no state was saved yet: starts again at step 0"
            )
        trained = ", ".join(
            f"{part} {count / total:.1%} of {total:,} parameters"
            for part, (count, total) in trained_share(model).items()
        )
        self.say(
            f"{begun}: seed {self._seed}; {size.records:,} records, "
            f"{size.samples_per_epoch:,} samples per epoch in {size.buckets:,} buckets; "
            f"{size.global_batch_size:,} samples per step, {size.steps_per_epoch:,} steps "
            f"per epoch, {size.max_steps:,} steps in total; "
            f"engine: {engine_name(self._engine)}; trained: {trained}; {speed}"
        )

    def say_stop(self, step: int, *, is_saved: bool) -> None:
        """Print that a signal ended the run early, and how to continue it."""
        state = "its state is saved" if is_saved else "its state could not be saved"
        self.say(
            f"stopped after step {step:,} of {self._size.max_steps:,}; {state}. "
            "Continue with --resume latest."
        )

    def say_end(self, step: int, saved_step: int) -> None:
        """Print that an error ends the run after `step` steps, and from which state it can go on.

        `saved_step` is the step of the newest state, or 0 when there is none.
        """
        if saved_step:
            state = f"the state after step {saved_step:,} is saved. Continue with --resume latest."
        else:
            state = "there is no saved state yet."
        self.say(f"The run ends after step {step:,} of {self._size.max_steps:,}: {state}")

    def progress_bar(self, step: int) -> Any:
        """The progress bar from `step` on, to be entered before the first `log_step`."""
        self._bar = tqdm(
            total=self._size.max_steps,
            initial=step,
            unit="step",
            disable=not self._engine.is_main_process,
        )
        return self._bar

    def log_step(self, step: int, result: StepResult) -> None:
        """Show the numbers of the step that made it `step` steps, and write them where wanted.

        A line depends on its own step alone, so a resumed run writes the same lines.
        """
        # The numbers of this rank, shown beside the progress bar.
        self._recent.add(result.counts, result.seconds, result.waited_seconds)
        self._recent.add_ranks(result.rank_times)
        line: dict[str, Any] = {
            "loss": result.loss,
            "epoch": (step - 1) // self._size.steps_per_epoch,
            "grad_norm": result.grad_norm,
            **result.rates,
            **self._recent.speed(self._engine.num_processes),
            "memory_bytes": peak_memory_bytes(self._engine.device),
            **result.counts,
        }
        if result.loss_scale is not None:
            line["loss_scale"] = result.loss_scale
        if not result.taken:
            line["skipped"] = True
        self._bar.set_postfix(progress_fields(line, self._recent.event_shares()), refresh=False)
        self._bar.update()

        # Trackers and metrics.jsonl, every `log.every_steps`. What all ranks do comes first: a
        # tracker may raise an error on rank 0.
        if step % self._settings.every_steps:
            return
        more: dict[str, Any] = {}
        if ranks := self._recent.ranks():
            more["ranks"] = ranks
        if self._settings.samples:
            more |= {
                "keys": from_all_ranks(self._engine, result.keys),
                "captions": from_all_ranks(self._engine, result.captions),
            }
        if self._settings.trackers:
            self._engine.log(line, step=step)
        if self._metrics and (problem := self._metrics.write(step, **line, **more)):
            self._lost_lines += 1
            if self._lost_lines == 1:
                self.say(
                    f"WARNING: the metrics of step {step:,} are lost: {problem}. "
                    "The run continues. Free some disk space."
                )

    def log_validation(self, step: int, line: dict[str, Any]) -> None:
        """Print, write and track the results of the validation after `step` steps."""
        held_out, train = line["held_out"], line["train"]
        averages = ""
        if "ema" in held_out:
            averages = (
                f"; of the moving average {held_out['ema']['loss']:.6g}, "
                f"trained {train['ema']['loss']:.6g}"
            )
        self.say(
            f"validation after step {step:,}: held-out loss {held_out['raw']['loss']:.6g}, "
            f"trained {train['raw']['loss']:.6g}{averages}; {line['seconds']:.3g} seconds, "
            f"{line['share_of_time']:.1%} of the time so far"
        )
        if self._settings.trackers:
            self._engine.log(dict(_flat(line, "validation")), step=step)
        if self._validations and (problem := self._validations.write(step, **line)):
            self.say(f"WARNING: the validation after step {step:,} is lost: {problem}.")


def _flat(values: Mapping[str, Any], name: str) -> Iterator[tuple[str, float]]:
    """The numbers in nested tables by their paths, such as `validation/train/raw/loss`."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}/{key}")
        else:
            yield f"{name}/{key}", value
