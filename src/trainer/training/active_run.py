"""A run on its way: its steps, what is due after each, and how it ends.

Every rank makes the same calls; only writing single files is left to rank 0.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple, Self

from capmerge.errors import CapmergeError
from trainer.config.settings import family_of
from trainer.data.batch import Batch
from trainer.data.datasets import DataSet
from trainer.data.epochs import EpochPlans, RunSize
from trainer.data.held_out import HeldOut
from trainer.data.loader import build_loader
from trainer.data.micro_batches import Share
from trainer.data.plan_files import drop_old_plans
from trainer.data.samples import SampleMaker, build_chunker
from trainer.data.workers import kill_workers
from trainer.errors import (
    BatchTimeoutError,
    NonFiniteError,
    RankError,
)
from trainer.model.flow_sampling import sampling_note
from trainer.training.engines.accelerator import from_all_ranks, problem_of_lost_rank
from trainer.training.engines.equal_ranks import check_equal_ranks
from trainer.training.limits import Limits
from trainer.training.loss_plot import save_loss_plot
from trainer.training.optimizer.moved_weights import FIRST_STEPS, NOTE, WARNING, MovedWeights
from trainer.training.optimizer.stepping import weights_for_use
from trainer.training.results import write_results
from trainer.training.run_folder import (
    METRICS_FILE,
    PLANS_FOLDER,
    PLOT_FILE,
)
from trainer.training.run_log import RunLog
from trainer.training.sampling import Sampler, set_aside_later_samples
from trainer.training.signals import Interrupts
from trainer.training.speed.prefetch import BatchesAhead
from trainer.training.states.due_saves import Saves
from trainer.training.states.saving import set_aside_later
from trainer.training.step import Requests, StepResult, TrainState, train_step
from trainer.training.validation import FailedRanksError, Validation

if TYPE_CHECKING:
    from trainer.training.speed.compile import CompileLog


class EndedElsewhereError(Exception):
    """The run ends with `exit_code`, by an error of another rank, which tells it itself."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another rank ended with {exit_code}")
        self.exit_code = exit_code


class _Failure(NamedTuple):
    """What the other ranks need to know about an error."""

    text: str
    exit_code: int
    is_timeout: bool

    @classmethod
    def of(cls, error: Exception) -> Self:
        code = error.exit_code if isinstance(error, CapmergeError) else 1
        return cls(str(error), code, isinstance(error, BatchTimeoutError))


class ActiveRun:
    """The step at which a run is, and what it does before, after and instead of the next one."""

    def __init__(
        self,
        state: TrainState,
        datasets: Sequence[DataSet],
        split: HeldOut,
        size: RunSize,
        fixed: dict[str, Any],
        *,
        step: int,
    ) -> None:
        self.state, self.datasets, self.size, self.fixed = state, split.datasets, size, fixed
        self.engine, self.config = state.engine, state.config
        self.folder = self.config.train.output_dir
        self.step = step  # optimizer steps that are done
        self.is_stepping = False  # the optimizer may have changed a part of the weights
        set_aside = set_aside_later(self.folder, step) if self.engine.is_main_process else []
        self.log = RunLog(self.engine, self.config, size, after_step=step)
        self.validation = Validation(state, datasets, split, self.log, size.max_steps)
        if self.engine.is_main_process:
            set_aside_later_samples(self.folder, step)
        self.sampler = Sampler(state, self.log.say)
        self.limits = Limits(self.config, size, self.log.say)
        self.saves = Saves(state, fixed, size.steps_per_epoch, self.log.say, after_step=step)
        self.log.say(*(f"a state later than step {step:,} is kept as {path}" for path in set_aside))

    def train(self, interrupts: Interrupts) -> None:
        """Train from the current step to the last one, or until a signal arrives."""
        try:
            self._train(interrupts)
        finally:
            kill_workers()

    def _train(self, interrupts: Interrupts) -> None:
        last, on_nonfinite = self.size.max_steps, self.config.train.on_nonfinite
        told_at = min(last, self.step + FIRST_STEPS)
        watched = self._watch_bf16()
        compiled = self._watch_compiler()
        batches = BatchesAhead(interrupts.bounded(self._iter_batches()), self.engine.device)
        save_requested = False
        failure: Exception | None = None

        def requests() -> Requests:
            self.is_stepping = True
            return Requests(interrupts.signal_number is not None, self.saves.are_due_by_clock())

        with self.log.progress_bar(self.step):
            stop_requested = not self._validate(interrupts)
            while self.step < last and not stop_requested:
                # Train one optimizer step; on a broken gradient, stop if the settings say so.
                try:
                    result = train_step(self.state, batches, self.step, requests, failure)
                except BatchTimeoutError as error:
                    self.log.say(f"WARNING: {error}")
                    return
                self.is_stepping = False
                if result.failed:
                    self._stop_failed(result.failure)
                    return
                if not result.taken and not result.may_scale_less and on_nonfinite == "stop":
                    self._stop_nonfinite(result)
                self.step += 1
                failure = self._log_step(result)
                if compiled:
                    self.log.say(*compiled.lines(self.step, result.seconds))
                self.limits.count_skipped(self.step, result)
                if (every := self.config.engine.check_ranks_every_steps) and not self.step % every:
                    self._check_equal_ranks()
                if watched and self.step == told_at:
                    self.log.say(f"{watched.share():.1%} of the weights moved up to step {told_at}")

                # Save when due. Weights that give no finite gradient would replace good states, so
                # the save waits for the next step that is taken.
                stop_requested = result.stop_requested
                save_requested |= result.save_requested or self.saves.are_due_by_step(self.step)
                if save_requested and result.taken:
                    self.save()
                    save_requested = False

                # Make samples when due; those of the last step come with the model.
                if self.sampler.is_due(self.step) and self.step < last and not stop_requested:
                    self.sampler.make(self.step, lambda: interrupts.signal_number is not None)

                # Watch the share of replaced samples, and drop the plans of finished epochs.
                self._check_replaced(result)
                epoch, steps_into_epoch = divmod(self.step, self.size.steps_per_epoch)
                if not steps_into_epoch and self.engine.is_local_main_process:
                    drop_old_plans(self.folder / PLANS_FOLDER, epoch, hold_room=self.step < last)
                stop_requested = stop_requested or not self._validate(interrupts)
            # A wait for the next batch that a signal has cut short.
            if isinstance(batches.problem, BatchTimeoutError):
                self.log.say(f"WARNING: {batches.problem}")

    def _check_equal_ranks(self) -> None:
        """Raise `RankError` on rank 0, if the weights of the ranks differ, and end the others."""
        try:
            check_equal_ranks(self.engine, self.state.bare_model, self.step)
        except RankError as error:
            if self.engine.is_main_process:
                raise
            raise EndedElsewhereError(error.exit_code) from None

    def _validate(self, interrupts: Interrupts) -> bool:
        """Validate if that is due; False if a signal ended it, and the run has to stop."""
        try:
            return self.validation.run_if_due(self.step, interrupts)
        except BatchTimeoutError as error:
            self.log.say(f"WARNING: {error}")
        except FailedRanksError as error:
            self._stop_failed(error.failure)
        return False

    def _log_step(self, result: StepResult) -> Exception | None:
        """Log the numbers of the step; an error of one of several ranks is returned, not raised.

        Only rank 0 writes, and the others would wait for it.
        """
        try:
            self.log.log_step(self.step, result)
        except Exception as error:
            alone = self.engine.num_processes == 1 or self.step == self.size.max_steps
            if alone or problem_of_lost_rank(error):
                raise
            return error
        return None

    def _stop_failed(self, failure: Exception | None) -> None:
        """Save the last good state with all ranks after an error of some, and end them alike.

        The ranks with an error raise it, and the others `EndedElsewhereError`. If no more came of
        it than a wait that was given up after a signal, the run ends as after any signal.
        """
        told = None if failure is None else _Failure.of(failure)
        failures = dict(enumerate(from_all_ranks(self.engine, [told])))
        rank, first = next((rank, found) for rank, found in failures.items() if found)
        if all(found.is_timeout for found in failures.values() if found):
            self.log.say(f"WARNING: rank {rank}, {first.text}")
            return
        if self.step > self.saves.step:
            self.save()
        self.log.say(f"An error of rank {rank} ends all {len(failures):,} processes of the run.")
        if failure is None or (told == first and rank != self.engine.process_index):
            raise EndedElsewhereError(first.exit_code)
        raise failure

    def _watch_bf16(self) -> MovedWeights | None:
        """Tell how bf16 weights are rounded; what they are, to tell later how many moved."""
        if self.config.train.precision != "full_bf16" or self.step == self.size.max_steps:
            return None
        self.log.say(NOTE if self.config.optimizer.stochastic_rounding else WARNING)
        trained = [p for p in self.state.bare_model.parameters() if p.requires_grad]
        # Weights that ZeRO-3 has divided are empty here.
        return MovedWeights(trained) if all(p.numel() for p in trained) else None

    def _watch_compiler(self) -> "CompileLog | None":
        if not self.config.speed.compile:
            return None
        from trainer.training.speed.compile import CompileLog  # takes a second to import

        return CompileLog()

    @contextmanager
    def saved_on_errors(self) -> Iterator[None]:
        """Save the last good state before an error ends the training, and say so.

        The weights are sound unless the gradient was not finite, or the error was raised while the
        optimizer stepped. Saving takes all ranks, and the others know nothing of the error, so only
        a single process saves.
        """
        try:
            yield
        except NonFiniteError:
            raise
        except Exception as error:
            if problem_of_lost_rank(error):  # `train` names the newest state
                raise
            begun = self.is_stepping or self.state.engine_step.has_begun
            is_sound = not begun and self.step > self.saves.step
            if is_sound and self.engine.num_processes == 1:
                try:
                    self.save()
                except Exception as hindrance:  # noqa: BLE001 -- it must not hide the error itself
                    problem = f"{type(hindrance).__name__}: {hindrance}"
                    self.log.say(f"WARNING: step {self.step:,} could not be saved: {problem}")
            self.log.say_end(self.step, self.saves.step)
            raise

    def _iter_batches(self) -> Iterator[Batch]:
        """This rank's micro-batches from the current step to the last one."""
        train, engine = self.config.train, self.engine
        loader = build_loader(
            SampleMaker(self.config, self.datasets, self.size.max_steps).make,
            EpochPlans(self.folder / PLANS_FOLDER, self.config, self.datasets, self.size),
            [dataset.rows for dataset in self.datasets],
            build_chunker(self.config),
            share=Share(
                engine.process_index, engine.num_processes, train.batch_size, train.accumulation
            ),
            on_missing=[dataset.settings.on_missing for dataset in self.datasets],
            steps_per_epoch=self.size.steps_per_epoch,
            start_step=self.step,
            max_steps=self.size.max_steps,
            workers=train.workers,
            channels=family_of(self.config.model).latent_channels,
            contrasts=self.config.loss.contrastive > 0,
        )
        return iter(loader)

    def save(self) -> None:
        """Save the full state, unless it is saved already; only warn if the disk is full."""
        self.saves.save(self.step, replaces_older=not self.limits.skipped_in_row)

    def _check_replaced(self, result: StepResult) -> None:
        """Save and raise `LatentsError` when too much of the epoch are replacements."""
        if problem := self.limits.count_replaced(self.step, result):
            self.save()
            raise problem

    def _stop_nonfinite(self, result: StepResult) -> None:
        """Save the state before the broken step, if it is still there; raise `NonFiniteError`."""
        problem = self.limits.broken_gradient(self.step + 1, result)
        if not self.config.optimizer.fused_backward:
            self.save()
        raise problem

    def finish(self, interrupts: Interrupts) -> None:
        """Save the model in the formats of `[export]`, plot the losses, and make the samples."""
        write_results(
            self.state,
            self.step,
            self.fixed["model fingerprint"],
            self.log.say,
            may_be_broken=self.limits.skipped_in_row > 0,
        )
        if self.engine.is_main_process:
            note = sampling_note(self.config.noise, self.config.model.family)
            if note and "single" not in self.config.export.formats:  # which tells it itself
                self.log.say(note)
            plot = self.folder / PLOT_FILE
            problem = save_loss_plot(self.folder / METRICS_FILE, plot)
            self.log.say(problem or f"loss plot: {plot}")
        self.engine.wait_for_everyone()
        with weights_for_use(self.state.optimizer):
            self.sampler.make(self.step, lambda: interrupts.signal_number is not None)
