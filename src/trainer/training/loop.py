"""A training run, from opening its data to writing the trained model.

    data opened, nothing parsed -> engine -> saved state found -> model -> optimizer -> prepare ->
    resume -> one line with the derived numbers -> step after step, log and save when due -> the
    model as a diffusers folder

Every rank makes the same calls; only printing and writing single files is left to rank 0.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

from accelerate import Accelerator

from capmerge.errors import CapmergeError
from trainer.config.load import with_seed
from trainer.config.settings import Config
from trainer.data.datasets import DataSet, latents_fingerprint, open_datasets
from trainer.data.epochs import RunSize, identity, length_warnings, run_size
from trainer.data.held_out import hold_out
from trainer.errors import (
    ConfigError,
    RankError,
)
from trainer.model.build import build_model, model_fingerprint
from trainer.model.model import Model
from trainer.model.noise_schedule import Schedule
from trainer.model.sd2_guess import guess_on_source
from trainer.model.source import check_source
from trainer.model.trainable import parameter_groups, trained_share
from trainer.training.active_run import ActiveRun, EndedElsewhereError
from trainer.training.ema import Ema, check_ema
from trainer.training.engines.accelerator import (
    build_engine,
    check_installed,
    first_of_ranks,
    from_rank_0,
    is_deepspeed,
    leave_ranks,
    prepare,
    problem_of_lost_rank,
)
from trainer.training.engines.deepspeed_engine import (
    DeepSpeedStep,
    divide_early,
    register_shared_reads,
)
from trainer.training.engines.divided_optimizer import check_divided
from trainer.training.engines.fused_backward import FusedStep, check_fused_backward
from trainer.training.engines.heartbeat import Heartbeat
from trainer.training.engines.launcher import Launched, agreed
from trainer.training.engines.loss_scaling import LossScaling
from trainer.training.engines.masters import Masters
from trainer.training.engines.torch_step import EngineStep, TorchStep
from trainer.training.optimizer.build import build_optimizer, notes_on_optimizer
from trainer.training.optimizer.fused_kernel import fit_loaded_state
from trainer.training.optimizer.options import options_of
from trainer.training.optimizer.rates import build_schedule
from trainer.training.optimizer.stochastic_rounding import stochastic_rounding
from trainer.training.run_folder import (
    begun_seed,
    check_new,
    claimed,
    write_run_files,
)
from trainer.training.sampling import check_samples
from trainer.training.signals import Interrupts, exit_code
from trainer.training.speed.speed_up import speed_up
from trainer.training.states.checkpoint import (
    find_states,
    is_of,
    newest_sound,
    newest_state,
)
from trainer.training.states.continuation import (
    NO_SAVED_CONFIG,
    check_loaded,
    check_same_run,
    with_rounding_of,
)
from trainer.training.states.loading import load_into
from trainer.training.step import TrainState
from trainer.training.step_clock import StepClock


def train(
    config: Config,
    *,
    resume: str | None = None,
    allow_change: bool = False,
    name: str = "the config",
) -> int:
    """Train as `config` says, and return the exit code: 0, or 128 + the signal that ended the run.

    `name` is the file of the config in messages.
    `resume` is `latest`, or the path of a saved state or a run; None starts a new run. Raises the
    errors of `trainer.errors` and `capmerge.errors`; among them `RankError` when another process of
    the run is lost.
    """
    end: int | CapmergeError
    try:
        return _train(agreed(config, name), resume=resume, allow_change=allow_change)
    except EndedElsewhereError as error:
        end = error.exit_code
    except CapmergeError as error:
        end = error.with_traceback(None)
    except Exception as error:
        if not (problem := problem_of_lost_rank(error)):
            raise
        end = RankError(_lost(problem, config.train.output_dir))
    # Here, outside of the handlers, nothing holds the frames of the run and its model any more.
    leave_ranks()
    if isinstance(end, int):
        return end
    raise end


def _lost(problem: str, output_dir: Path) -> str:
    """The message about a lost rank. No save is tried: it would wait for that rank."""
    newest = newest_state(output_dir)
    kept = f"the newest saved state is {newest}" if newest else "no state has been saved yet"
    return (
        f"{problem}, expected all to train to the end. See the messages of the process that ended, "
        f"or hangs. Nothing was saved now; {kept}. Continue with --resume latest."
    )


def _train(launched: Launched, *, resume: str | None, allow_change: bool) -> int:
    config = launched.config

    # Find the state to resume from, or make sure that no earlier run would be overwritten.
    output_dir = config.train.output_dir
    states = [] if resume is None else find_states(output_dir, resume)
    if resume is None or (states and not is_of(states[0], output_dir)):
        check_new(output_dir)

    check_ema(config)
    check_installed(launched)

    # Open the data before process groups start: a first launch may build an index for minutes.
    datasets = open_datasets(config)
    check_samples(config)

    # Start the engine, choose the state and the seed, and check that a resumed run is still the
    # same run.
    engine = build_engine(launched)
    saved, damaged = newest_sound(engine, states)
    begun = (
        saved.identity["train.seed"]
        if saved
        else begun_seed(output_dir)
        if resume is not None
        else None
    )
    config = from_rank_0(engine, with_seed(config, begun))
    config, rounding_note = with_rounding_of(saved, config, uses_deepspeed=launched.uses_deepspeed)
    check_fused_backward(config, engine.num_processes)
    split = hold_out(config, datasets)
    size = run_size(config, split.datasets, engine.num_processes)
    if saved and size.max_steps < saved.step:
        raise ConfigError(
            f"train.max_steps: the run would end at step {size.max_steps:,}, but {saved.folder} "
            f"is the state after step {saved.step:,}, expected at least that many. Raise "
            "train.max_steps (or train.max_epochs), or --resume an older state."
        )
    fixed = from_rank_0(
        engine, identity(config, split.datasets, size) | _fingerprints(config, split.datasets)
    )
    changed = check_same_run(saved, fixed, config, allow_change=allow_change) if saved else []

    with (
        Interrupts() as interrupts,
        claimed(output_dir) if engine.is_main_process else nullcontext(),
    ):
        # Build and prepare everything that trains, then load the saved state into it.
        state = build_state(build_model(config), config, engine, size)
        source = check_source(state.shapes(), config)
        if saved:
            built = options_of(state.optimizer)
            changed += load_into(state, saved)
            if not is_deepspeed(engine):
                fit_loaded_state(state.optimizer, built)
            if state.ema and not state.ema.load(saved.folder):
                changed.append(f"ema: {saved.folder} holds no average, so it begins anew there")
            with state.masters.stepped_vectors():
                changed += check_loaded(
                    saved, state.rates, built, config, allow_change=allow_change
                )
        # Only now: a state that does not fit leaves the files of the run as they were.
        if engine.is_main_process:
            trained = trained_share(state.bare_model)
            write_run_files(config, fixed, {"size": asdict(size), "trained": trained})

        # Tell how the run starts, train, and save the last state and the model.
        run = ActiveRun(state, datasets, split, size, fixed, step=saved.step if saved else 0)
        run.log.say(*(f"WARNING: {problem} An older state is used." for problem in damaged))
        if saved and not saved.config_file.exists():
            run.log.say(f"{saved.folder}: {NO_SAVED_CONFIG}")
        run.log.say(*(f"changed since the state was saved: {line}" for line in changed))
        run.log.say(*([rounding_note] if rounding_note else []))
        run.log.say(*(note for dataset in datasets for note in dataset.notes))
        if split.held_out and any("records left out" in line for line in changed):
            run.log.say(
                "WARNING: some of the records that are held out from now on may have been trained "
                "before, so their loss says less than that of records that never were."
            )
        run.log.say(*split.notes)
        run.log.say(*notes_on_optimizer(config.optimizer, engine.device))
        run.log.say(*length_warnings(config, size.max_steps))
        run.log.say(*guess_on_source(state.shapes(), source, config))
        resumed = resume is not None
        run.log.say_start(state.bare_model, run.step, resumed=resumed, speed=state.speed)
        try:
            with Heartbeat(engine, lambda problem: _lost(problem, output_dir)):
                with run.saved_on_errors():
                    run.train(interrupts)
                run.save()
                # The signal may have reached one rank only, but all of them end the run alike.
                stopped_by = first_of_ranks(engine, interrupts.signal_number)
                if stopped_by is None:
                    run.finish(interrupts)
                else:
                    run.log.say_stop(run.step, is_saved=run.saves.step == run.step)
        finally:
            if (unsaved := len(run.saves.unsaved)) > 1:
                run.log.say(f"WARNING: {unsaved:,} states could not be saved in this run.")
            run.log.close()
    # Drop DDP before the process group, as `leave_ranks` says.
    del run, state
    engine.free_memory()
    engine.end_training()
    return exit_code(stopped_by)


def _fingerprints(config: Config, datasets: Sequence[DataSet]) -> dict[str, str]:
    """What a resumed run must share besides `identity`: files that may lie elsewhere by then."""
    return {"model fingerprint": model_fingerprint(config)} | {
        f"data.{dataset.number}.latents fingerprint": latents_fingerprint(dataset)
        for dataset in datasets
    }


def build_state(model: Model, config: Config, engine: Accelerator, size: RunSize) -> TrainState:
    """The model, its optimizer and its learning rates, prepared by the engine."""
    speed = speed_up(model, config, engine, size.buckets)
    if is_deepspeed(engine):
        divide_early(engine.deepspeed_plugin, model, config.train.precision)
    groups = parameter_groups(model, config)
    rounding = stochastic_rounding(config, model)
    bare = build_optimizer(groups, config.optimizer, engine.device, rounding)
    if is_deepspeed(engine):
        check_divided(config.optimizer, groups, engine.device, config.engine.zero_stage)
    rates = build_schedule(bare, config.optimizer, size.max_steps)
    prepared, optimizer = prepare(engine, config, model, bare)
    schedule = Schedule.of(config.noise).to(engine.device)
    scaling = LossScaling(config, engine.device, by_engine=is_deepspeed(engine))
    engine_step: EngineStep
    if is_deepspeed(engine):
        register_shared_reads(model)
        engine_step = DeepSpeedStep(prepared)
    elif config.optimizer.fused_backward:
        engine_step = FusedStep(engine, bare, optimizer)
    else:
        clip = config.optimizer.clip_grad_norm
        engine_step = TorchStep(engine, prepared, optimizer, scaling, clip)
    masters = Masters(engine, prepared, model, optimizer)
    ema = Ema(masters, config.ema) if config.ema.decay else None
    return TrainState(
        engine=engine,
        config=config,
        model=prepared,
        bare_model=model,
        optimizer=optimizer,
        rates=rates,
        schedule=schedule,
        scaling=scaling,
        engine_step=engine_step,
        clock=StepClock(engine.device, engine.process_index, engine.num_processes),
        masters=masters,
        ema=ema,
        speed=speed,
    )
