"""The story of a training run.

    data opened, nothing parsed -> engine -> saved state found -> model -> optimizer -> prepare ->
    resume -> one line with the derived numbers -> step after step, log and save when due -> the
    model as a diffusers folder

Every rank walks through the same calls; only printing and writing of single files is left to rank
0.
"""

import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import Any

from accelerate import Accelerator
from tqdm import tqdm

from trainer.config.load import resolved_toml, with_seed
from trainer.config.settings import Config
from trainer.data.datasets import DataSet, open_datasets
from trainer.data.epochs import EpochPlans, RunSize, identity, run_size
from trainer.data.loader import Loader, Share, build_loader
from trainer.data.plan import drop_old_plans
from trainer.data.samples import SampleMaker, build_chunker
from trainer.errors import LatentsError, NonFiniteError
from trainer.model.build import build_model
from trainer.model.noise_schedule import Schedule
from trainer.model.save import save_model
from trainer.model.trainable import parameter_groups, trained_share
from trainer.training.accelerator import build_engine, from_all_ranks, from_rank_0
from trainer.training.checkpoint import (
    check_identity,
    find_state,
    is_of,
    load_state,
    save_state,
    set_aside_later,
)
from trainer.training.loss_plot import save_loss_plot
from trainer.training.metrics import MetricsFile, Recent, peak_memory_bytes, progress_fields
from trainer.training.optim import build_optimizer, build_schedule, weights_for_use
from trainer.training.run_folder import (
    METRICS_FILE,
    MODEL_FOLDER,
    PLANS_FOLDER,
    PLOT_FILE,
    begun_seed,
    check_new,
    claimed,
    write_run_files,
)
from trainer.training.signals import Interrupts
from trainer.training.step import StepResult, Trained, train_step

MOST_REPLACED = 0.01
"""Share of an epoch's samples that may stand for others whose latents are missing or broken."""
MOST_SKIPPED = 20
"""Steps in a row that may be skipped: latents are finite, so one batch may be broken, but not all of them."""


def train(config: Config, *, resume: str | None = None, allow_change: bool = False) -> int:
    """Train as `config` says, from the start or from a saved state; the exit code: 0, or 128 + the signal that ended the run.

    `resume` is `latest` or the path of a state. Raises the errors of `trainer.errors` and
    `capmerge.errors`.
    """
    output_dir = config.train.output_dir
    state = find_state(output_dir, resume) if resume else None
    if not resume or (state and not is_of(state, output_dir)):
        check_new(output_dir)
    datasets = open_datasets(
        config
    )  # before process groups start: a first launch may build an index for minutes
    engine = build_engine(config)
    begun = state.identity["train.seed"] if state else begun_seed(output_dir) if resume else None
    config = from_rank_0(engine, with_seed(config, begun))
    derived = run_size(config, datasets, engine.num_processes)
    fixed = identity(config, datasets, derived)
    changed = check_identity(state, fixed, allow_change=allow_change) if state else []
    with (
        Interrupts() as interrupts,
        claimed(output_dir) if engine.is_main_process else nullcontext(),
    ):
        trained = _build(config, engine, derived)
        if state:
            load_state(engine, state)
        if engine.is_main_process:
            write_run_files(
                config, fixed
            )  # a state that does not fit leaves those of the run as they were
        run = _Run(trained, datasets, derived, fixed, step=state.step if state else 0)
        run.say(f"changed since the state was saved: {line}" for line in changed)
        run.say(note for dataset in datasets for note in dataset.notes)
        run.say_start(resume)
        try:
            run.train(interrupts)
            run.save()
            if interrupts.signal_number is None:
                run.finish()
            else:
                run.say_stop()
        finally:
            run.close()
    engine.end_training()
    return interrupts.exit_code


def _build(config: Config, engine: Accelerator, derived: RunSize) -> Trained:
    """Model, optimizer and rates, prepared by the engine."""
    model = build_model(config)
    bare = build_optimizer(parameter_groups(model, config), config.optimizer, engine.device)
    rates = build_schedule(bare, config.optimizer, derived.max_steps)
    prepared, optimizer = engine.prepare(model, bare)
    return Trained(
        engine,
        config,
        prepared,
        model,
        optimizer,
        rates,
        Schedule.of(config.noise).to(engine.device),
    )


class _Run:
    """A run on its way."""

    def __init__(
        self,
        trained: Trained,
        datasets: Sequence[DataSet],
        derived: RunSize,
        fixed: dict[str, Any],
        *,
        step: int,
    ) -> None:
        self.trained, self.datasets, self.derived, self.fixed = trained, datasets, derived, fixed
        self.engine, self.config = trained.engine, trained.config
        self.folder = self.config.train.output_dir
        self.step = step  # optimizer steps that are done
        self.saved_step, self.saved_at = step, time.monotonic()
        self.replaced_in_epoch = 0
        self.skipped_in_row = 0
        self.recent = Recent()
        self.metrics: MetricsFile | None = None
        if self.engine.is_main_process:
            self.say(
                f"a state later than step {step:,} is kept as {path}"
                for path in set_aside_later(self.folder, step)
            )
            self.metrics = MetricsFile(self.folder / METRICS_FILE, after_step=step)
        if self.config.log.trackers:
            self.engine.init_trackers(
                self.config.log.project, config={"config": resolved_toml(self.config)}
            )

    def close(self) -> None:
        """Close what is open."""
        if self.metrics:
            self.metrics.close()

    def say(self, lines: Iterable[str]) -> None:
        """Print lines once, whatever the number of ranks; the progress bar stays whole."""
        for line in lines:
            if self.engine.is_main_process:
                tqdm.write(line, file=sys.stderr)

    def say_start(self, resume: str | None) -> None:
        """One line with the derived numbers."""
        derived, begun = self.derived, "starts"
        if resume:
            begun = (
                f"resumes at step {self.step:,}"
                if self.step
                else "no state was saved yet: starts again at step 0"
            )
        trained = ", ".join(
            f"{part} {count / total:.1%} of {total:,}"
            for part, (count, total) in trained_share(self.trained.bare_model).items()
        )
        line = (
            f"{begun}: seed {self.config.train.seed}; {derived.records:,} records, {derived.samples_per_epoch:,} samples an epoch "
            f"in {derived.buckets:,} buckets; {derived.global_batch_size:,} samples a step, {derived.steps_per_epoch:,} steps an epoch, "
            f"{derived.max_steps:,} in all; trained: {trained}"
        )
        self.say([line])

    def say_stop(self) -> None:
        """That the run ended early, and how it goes on."""
        state = (
            "its state is saved" if self.saved_step == self.step else "its state could not be saved"
        )
        self.say(
            [
                f"stopped after step {self.step:,} of {self.derived.max_steps:,}; {state}. Go on with --resume latest."
            ]
        )

    def train(self, interrupts: Interrupts) -> None:
        """Train from the step at hand to the last one, or until a signal."""
        last, on_nonfinite = self.derived.max_steps, self.config.train.on_nonfinite
        batches = iter(self._loader())
        stop = save_due = False
        with tqdm(
            total=last, initial=self.step, unit="step", disable=not self.engine.is_main_process
        ) as bar:
            while self.step < last and not stop:
                result = train_step(
                    self.trained,
                    batches,
                    self.step,
                    lambda: (interrupts.signal_number is not None, self._clock_asks()),
                )
                if not result.taken and on_nonfinite == "stop":
                    self._stop_nonfinite(result)
                self.step += 1
                self._log(result, bar)
                self._count_skipped(result)
                stop, by_clock = result.wishes
                save_due = save_due or by_clock or self._step_asks()
                if (
                    save_due and result.taken
                ):  # weights that give no finite gradient would push out the states before them
                    self.save()
                    save_due = False
                self._count_replaced(result)
                if (
                    self.step % self.derived.steps_per_epoch == 0
                    and self.engine.is_local_main_process
                ):
                    drop_old_plans(
                        self.folder / PLANS_FOLDER, self.step // self.derived.steps_per_epoch
                    )

    def _loader(self) -> Loader:
        config, engine = self.config, self.engine
        return build_loader(
            SampleMaker(config, self.datasets, self.derived.max_steps).make,
            EpochPlans(self.folder / PLANS_FOLDER, config, self.datasets, self.derived),
            [dataset.rows for dataset in self.datasets],
            build_chunker(config),
            share=Share(
                engine.process_index,
                engine.num_processes,
                config.train.batch_size,
                config.train.accumulation,
            ),
            on_missing=[dataset.settings.on_missing for dataset in self.datasets],
            steps_per_epoch=self.derived.steps_per_epoch,
            start_step=self.step,
            max_steps=self.derived.max_steps,
            workers=config.train.workers,
        )

    def _clock_asks(self) -> bool:
        """Whether it is time to save, by this rank's clock."""
        minutes = self.config.checkpoint.every_minutes
        return minutes is not None and time.monotonic() - self.saved_at >= minutes * 60

    def _step_asks(self) -> bool:
        """Whether to save after this step; the same on all ranks."""
        wanted, epochs = self.config.checkpoint.every_steps, self.config.checkpoint.every_epochs
        return bool(
            (wanted and self.step % wanted == 0)
            or (epochs and self.step % (epochs * self.derived.steps_per_epoch) == 0)
        )

    def save(self) -> None:
        """Save the full state, unless that of this step is there; a full disk is said loudly, and the run goes on."""
        if self.step == self.saved_step and self.step:
            return
        keep = (
            None if self.skipped_in_row else self.config.checkpoint.keep
        )  # weights that may be spoilt push no state out
        saved, problem = save_state(self.engine, self.folder, self.step, self.fixed, keep=keep)
        self.saved_at = time.monotonic()
        if saved:
            self.saved_step = self.step
        else:
            self.say(
                [
                    f"WARNING: step {self.step:,} could not be saved ({problem}). The older states stand; the run goes on. Free some room."
                ]
            )

    def _log(self, result: StepResult, bar: Any) -> None:
        """Show a step's numbers, and write them where they are wanted; a line tells of its own step, so a resumed run writes the same."""
        log, epoch = self.config.log, (self.step - 1) // self.derived.steps_per_epoch
        self.recent.add(result.counts, result.seconds, result.waited_seconds)
        line: dict[str, Any] = {
            "loss": result.loss,
            "epoch": epoch,
            "grad_norm": result.grad_norm,
            **result.rates,
            **self.recent.speed(self.engine.num_processes),
        }
        line |= {"memory_bytes": peak_memory_bytes(self.engine.device), **result.counts}
        if not result.taken:
            line["skipped"] = True
        bar.set_postfix(progress_fields(line, self.recent.event_shares()), refresh=False)
        bar.update()
        if self.step % log.every_steps:
            return
        if log.trackers:
            self.engine.log(line, step=self.step)
        if log.samples:
            line |= {
                "keys": from_all_ranks(self.engine, result.keys),
                "captions": from_all_ranks(self.engine, result.captions),
            }
        if self.metrics and (problem := self.metrics.write(self.step, **line)):
            self.say(
                [
                    f"WARNING: the numbers of step {self.step:,} are lost: {problem}. The run goes on. Free some room."
                ]
            )

    def _count_skipped(self, result: StepResult) -> None:
        """Tell of a skipped step. Raises `NonFiniteError` when `MOST_SKIPPED` are skipped in a row."""
        self.skipped_in_row = 0 if result.taken else self.skipped_in_row + 1
        if self.skipped_in_row == 1:
            self.say(
                [
                    f"WARNING: step {self.step:,} is skipped: the norm of its gradient is {result.grad_norm}."
                ]
            )
        if self.skipped_in_row == MOST_SKIPPED:
            raise NonFiniteError(
                f"step {self.step:,}: found no finite gradient for {MOST_SKIPPED} steps, expected one at least: the weights are spoilt. "
                f"The states in {self.folder} are older than that. Lower the learning rate, and --resume latest."
            )

    def _count_replaced(self, result: StepResult) -> None:
        """Raise `LatentsError` when more samples of the epoch than `MOST_REPLACED` stand for others."""
        if (self.step - 1) % self.derived.steps_per_epoch == 0:
            self.replaced_in_epoch = 0
        self.replaced_in_epoch += result.replaced
        most = MOST_REPLACED * self.derived.samples_per_epoch
        if self.replaced_in_epoch > most:
            self.save()
            raise LatentsError(
                f"step {self.step:,}: found {self.replaced_in_epoch:,} samples of this epoch without usable latents, expected at most "
                f"{MOST_REPLACED:.0%} of {self.derived.samples_per_epoch:,}. Cache the files named above again, then --resume latest."
            )

    def _stop_nonfinite(self, result: StepResult) -> None:
        self.skipped_in_row += 1
        self.save()
        raise NonFiniteError(
            f"step {self.step + 1:,}: the norm of the gradient is {result.grad_norm}, expected a finite number. The state after step "
            f'{self.step:,} is saved. Lower the learning rate, or set train.on_nonfinite = "skip", and --resume latest.'
        )

    def finish(self) -> None:
        """Save the trained model as a diffusers folder, and draw the losses."""
        with weights_for_use(self.trained.optimizer):
            gathered = self.engine.get_state_dict(
                self.trained.model, unwrap=False
            )  # collective: every rank takes part
            if self.engine.is_main_process:
                folder = self.folder / MODEL_FOLDER
                state = {
                    name.removeprefix("module."): tensor for name, tensor in gathered.items()
                }  # DDP's wrapper
                if self.skipped_in_row and not all(
                    bool(tensor.isfinite().all()) for tensor in state.values()
                ):
                    raise NonFiniteError(
                        f"step {self.step:,}: the weights are not finite any more, so no model is written. The states of {self.folder} "
                        "from before the skipped steps are kept: lower the learning rate, and --resume with the path of one."
                    )
                missing = save_model(self.trained.bare_model, state, folder, self.config)
                self.say(
                    [
                        f"the trained model: {folder}"
                        + "".join(f"; {part} is not in it" for part in missing)
                    ]
                )
                problem = save_loss_plot(self.folder / METRICS_FILE, self.folder / PLOT_FILE)
                self.say([problem or f"the losses: {self.folder / PLOT_FILE}"])
        self.engine.wait_for_everyone()
